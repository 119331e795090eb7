"""Turns the text of documents into tokens and loss masks; what the processes of `prepare` do."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from cpm_jax.data.chat import ChatError, Conversation
from cpm_jax.data.errors import DataError
from cpm_jax.data.packing import TokenizedDocuments
from cpm_jax.data.sources import Format
from cpm_jax.data.tokenizer import Tokenizer

LongConversations = Literal["reject", "truncate"]


# Characters. Tokenizers need some hundred bytes of memory per token while they work, so a longer document is tokenised
# in parts that end with a line, where hardly any tokenizer would have joined what follows.
_LONG_DOCUMENT = 1 << 23


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Documents that were tokenised together.

    Attributes:
        documents: the tokens; a rejected document has length 0.
        rejects: (index of the document, reason, detail).
        truncated: how many conversations were cut to fit a record.
    """

    documents: TokenizedDocuments
    rejects: tuple[tuple[int, str, str], ...] = ()
    truncated: int = 0


class Encoder:
    """Tokenises documents of one format."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        format: Format,
        seq_len: int,
        long_conversations: LongConversations,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
    ):
        """Checks that the tokenizer has what the format needs.

        Args:
            tokenizer: what to tokenise with.
            format: of the documents.
            seq_len: tokens per row; a record has one more.
            long_conversations: what to do with a conversation that is longer than a record.
            min_tokens: shorter documents are rejected.
            max_tokens: longer documents are rejected.

        Raises:
            DataError: it has no end-of-document token, or no chat template.
        """
        self._tokenizer = tokenizer
        self._format = format
        self._max_tokens = seq_len + 1
        self._long_conversations = long_conversations
        self._least, self._most = min_tokens, max_tokens
        if format == "chat":
            tokenizer.require_chat_template()
        elif tokenizer.eos_id is None:
            raise DataError(
                "the tokenizer has no eos_token, with which documents end: give the folder of its "
                "tokenizer_config.json, and name one there"
            )

    @classmethod
    def load(
        cls,
        folder: Path,
        format: Format,
        seq_len: int,
        long_conversations: LongConversations,
        min_tokens: int | None = None,
        max_tokens: int | None = None,
    ) -> "Encoder":
        """An encoder with the tokenizer of a folder."""
        return cls(Tokenizer.load(folder), format, seq_len, long_conversations, min_tokens, max_tokens)

    def __call__(self, texts: Sequence[str]) -> Encoded:
        """Tokenises documents, as `Document.text` holds them."""
        return self._encode_chat(texts) if self._format == "chat" else self._encode_text(texts)

    def _encode_text(self, texts: Sequence[str]) -> Encoded:
        before = [self._tokenizer.bos_id] if self._tokenizer.add_bos else []
        after = [self._tokenizer.eos_id]
        short = iter(self._tokenizer.encode_batch([text for text in texts if len(text) <= _LONG_DOCUMENT]))
        pieces, rejects = [], []
        for index, text in enumerate(texts):
            parts = [next(short)] if len(text) <= _LONG_DOCUMENT else map(self._tokenizer.encode, _cut(text))
            tokens = np.concatenate([np.array(ids, np.uint32) for ids in (before, *parts, after)])
            if reason := self._out_of_range(len(tokens)):
                rejects.append((index, reason, f"{len(tokens)} tokens"))
                tokens = np.zeros(0, np.uint32)
            pieces.append(tokens)
        lengths = np.array([len(piece) for piece in pieces], np.uint32)
        return Encoded(TokenizedDocuments(np.concatenate([*pieces, np.zeros(0, np.uint32)]), lengths), tuple(rejects))

    def _out_of_range(self, num_tokens: int) -> str:
        if self._least is not None and num_tokens < self._least:
            return f"fewer than {self._least} tokens"
        return f"more than {self._most} tokens" if self._most is not None and num_tokens > self._most else ""

    def _encode_chat(self, texts: Sequence[str]) -> Encoded:
        pieces, masks, rejects, truncated = [], [], [], 0
        for index, text in enumerate(texts):
            try:
                tokens, mask = self.encode_conversation(Conversation.from_record(json.loads(text)))
                if reason := self._out_of_range(len(tokens)):
                    raise ChatError(reason, f"{len(tokens)} tokens")
                if len(tokens) > self._max_tokens:
                    if self._long_conversations == "reject":
                        raise ChatError("longer than a record", f"{len(tokens)} tokens, at most {self._max_tokens}")
                    tokens, mask = tokens[: self._max_tokens], mask[: self._max_tokens]
                    truncated += 1
                if not mask[1:].any():
                    raise ChatError("no assistant turn", "no token to learn within the record")
            except ChatError as error:
                rejects.append((index, error.reason, error.detail))
                tokens, mask = np.zeros(0, np.uint32), np.zeros(0, np.bool_)
            pieces.append(tokens)
            masks.append(mask)
        lengths = np.array([len(piece) for piece in pieces], np.uint32)
        tokens = np.concatenate([*pieces, np.zeros(0, np.uint32)])
        mask = np.concatenate([*masks, np.zeros(0, np.bool_)])
        return Encoded(TokenizedDocuments(tokens, lengths, mask), tuple(rejects), truncated)

    def encode_conversation(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a conversation (uint32), and for each whether the assistant says any of its characters.

        Raises:
            ChatError: the chat template refuses the conversation.
        """
        text, spans = self._tokenizer.require_chat_template().render_with_spans(conversation)
        ids, offsets = self._tokenizer.encode_with_offsets(text)
        begins, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), np.bool_)
        for begin, end in spans:
            mask[np.searchsorted(ends, begin, side="right") : np.searchsorted(begins, end, side="left")] = True
        return np.array(ids, np.uint32), mask


def _cut(text: str) -> Iterator[str]:
    begin = 0
    while begin < len(text):
        end = begin + _LONG_DOCUMENT
        if end < len(text):
            end = text.rfind("\n", begin, end) + 1 or end
        yield text[begin:end]
        begin = end
