"""Real text from which contexts of any number of tokens are cut."""

import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int

from cpm_jax.data.sources import Document, Reject, read_documents
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.errors import TaskError

# Where a sentence or a line ends, in Latin and in Chinese punctuation.
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]’”]*\s+|[。！？…]+[”’」』）]*|\n+")
_BETWEEN = "\n\n"  # documents
DEFAULT_TOKENS = 1_000_000  # enough for contexts to differ, and the same whatever lengths are asked for
_CHARS_PER_TOKEN = 16  # of a document at most: no more of a huge one is tokenised than can be used
_WORD = 24  # characters that a word which the cut splits may have


class Haystack:
    """A stream of text, with the places of its tokens.

    Attributes:
        text: the text.
        num_tokens: tokens of it.
        sha256: hash of the text.
    """

    def __init__(self, documents: Iterable[str], tokenizer: Tokenizer, num_tokens: int = DEFAULT_TOKENS):
        """Joins and tokenises texts, from the first on, until there are enough.

        Args:
            documents: the texts.
            tokenizer: of the model.
            num_tokens: how many tokens will do; fewer are taken where there are no more.

        Raises:
            TaskError: there is no text.
        """
        texts, ends = list[str](), list[Int[np.ndarray, " k"]]()
        self.num_tokens = place = 0
        for document in documents:
            text = document[: (num_tokens - self.num_tokens) * _CHARS_PER_TOKEN].strip()
            _, offsets = tokenizer.encode_with_offsets(text)
            if offsets:
                texts.append(text)
                ends.append(place + np.array([end for _, end in offsets], np.int64))
                place += len(text) + len(_BETWEEN)
                self.num_tokens += len(offsets)
            if self.num_tokens >= num_tokens:
                break
        if not texts:
            raise TaskError("the haystack has no text")
        self.text = _BETWEEN.join(texts)
        self.sha256 = hashlib.sha256(self.text.encode("utf-8", "replace")).hexdigest()
        self._ends = np.concatenate(ends)
        # Passages begin with a sentence, the last of which ends with the text.
        starts = np.searchsorted(self._ends, boundaries(self.text)[:-1], side="right")
        self._sentence_starts = np.unique(starts[starts < self.num_tokens])

    @classmethod
    def read(cls, source: str, tokenizer: Tokenizer, num_tokens: int = DEFAULT_TOKENS) -> "Haystack":
        """Reads texts.

        Args:
            source: anything that `data.sources.read_documents` takes: a folder, .txt, .jsonl, a glob pattern, ….
            tokenizer: of the model.
            num_tokens: how many tokens will do.

        Raises:
            DataError: the source does not exist.
            TaskError: it holds no text.
        """
        rejects: list[Reject] = []

        def texts() -> Iterator[str]:
            for document in read_documents(source):
                if isinstance(document, Document):
                    yield document.text
                else:
                    rejects.append(document)

        try:
            return cls(texts(), tokenizer, num_tokens)
        except TaskError as error:
            why = f": {rejects[0].id}: {rejects[0].reason}" if rejects else ""
            raise TaskError(f"haystack {source!r} holds no text{why}") from error

    def sentence_start(self, place: float) -> int:
        """The token that begins a sentence, `place` in [0, 1) of the way through all of them."""
        return int(self._sentence_starts[int(place * len(self._sentence_starts))])

    def passage(self, start: int, num_tokens: int) -> str:
        """Consecutive text of about a number of tokens; after its end the haystack begins again.

        Args:
            start: first token.
            num_tokens: tokens; the last word is left out where it would be cut in two.
        """
        pieces = []
        while num_tokens > 0:
            stop = min(start + num_tokens, self.num_tokens)
            pieces.append(self._cut(start, stop))
            num_tokens -= stop - start
            start = 0
        return _BETWEEN.join(pieces).strip()

    def _cut(self, start: int, stop: int) -> str:
        first = int(self._ends[start - 1]) if start else 0
        last = int(self._ends[stop - 1])
        if last < len(self.text) and not self.text[last].isspace():
            space = max(self.text.rfind(character, first, last) for character in " \n\t")
            if last - space <= _WORD:
                last = max(space, first)
        return self.text[first:last]


def boundaries(text: str) -> Int[np.ndarray, " n"]:
    """The characters before which something can be inserted between sentences: 0, …, the length of the text."""
    inside = [match.end() for match in _SENTENCE_END.finditer(text)]
    return np.unique(np.array([0, *inside, len(text)], np.int64))


def insert(text: str, needles: list[tuple[float, str]], tokenizer: Tokenizer) -> str:
    """Puts sentences into a text, between two of its own.

    Args:
        text: real text.
        needles: depth, as the share of the text's tokens that come before, and sentence.
        tokenizer: that counts the tokens.
    """
    _, offsets = tokenizer.encode_with_offsets(text)
    ends = np.array([0, *(end for _, end in offsets)], np.int64)
    places = boundaries(text)
    depth_of_place = (np.searchsorted(ends, places, side="right") - 1) / max(len(offsets), 1)
    chosen = [
        (int(places[np.abs(depth_of_place - depth).argmin()]), number, needle)
        for number, (depth, needle) in enumerate(needles)
    ]
    pieces, done = list[str](), 0
    for place, _, needle in sorted(chosen):
        before = text[done:place]
        pieces += [before, "" if not before or before[-1].isspace() else " ", needle, " "]
        done = place
    return "".join([*pieces, text[done:]]).strip()
