"""Byte-level tokenizers in Hugging Face's file format: load any, train one, encode, decode, stream."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from cpm_jax.data.chat import CHATML, ChatError, ChatTemplate, Conversation
from cpm_jax.data.errors import DataError

PAD, BOS, EOS, IM_START, IM_END = "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"
_SPECIAL_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A tokenizer together with its special tokens and its chat template.

    Attributes:
        vocab_size: one more than the largest token id.
        bos_id: the token that begins a document, or None.
        eos_id: the token that ends a document, or None.
        pad_id: the token to pad with; `eos_id` if the tokenizer names none.
        add_bos: whether the tokenizer's own convention is to begin every text with `bos_id`.
        affixes: all tokens that it puts around a text by its own convention, in their order.
        special_tokens: the named special tokens, such as {"eos_token": "</s>"}.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: dict[str, Any]):
        """Wraps a tokenizer of the `tokenizers` library; `settings` is the content of its tokenizer_config.json."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._settings = settings
        self.special_tokens = _special_tokens(settings)
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        pad_id = self._special_id("pad_token")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.affixes: list[int] = backend.encode("").ids
        self.add_bos = self.bos_id is not None and self.affixes[:1] == [self.bos_id]
        self.chat_template = _chat_template(settings, self.special_tokens)

    def _special_id(self, name: str) -> int | None:
        if name not in self.special_tokens:
            return None
        token = self.special_tokens[name]
        if (token_id := self._backend.token_to_id(token)) is None:
            raise DataError(f"tokenizer_config.json says {name} = {token!r}, which tokenizer.json does not have")
        return token_id

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Loads a tokenizer.json, or a folder with one.

        Special tokens and the chat template come from the files beside it: `tokenizer_config.json`,
        `special_tokens_map.json`, `chat_template.jinja`, as far as there are any.

        Raises:
            DataError: there is no such file, or it is not a tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise DataError(f"tokenizer {str(path)!r}: no such tokenizer.json, nor a folder that holds one")
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text("utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"tokenizer {str(file)!r} cannot be read: {error}") from error
        settings = _read_json(file.with_name("special_tokens_map.json"))
        settings |= _read_json(file.with_name("tokenizer_config.json"))
        template_file = file.with_name("chat_template.jinja")
        if template_file.is_file():
            try:
                settings["chat_template"] = template_file.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{template_file} is not UTF-8: {error.reason}") from error
        if isinstance(templates := settings.get("chat_template"), list):
            try:
                named = {item["name"]: item["template"] for item in templates}
            except (TypeError, KeyError) as error:
                raise DataError(
                    f'tokenizer {str(file)!r}: the items of its list chat_template must be {{"name": …, "template": …}}'
                ) from error
            settings["chat_template"] = named.get("default")
        try:
            return cls(backend, settings)
        except DataError as error:
            raise DataError(f"tokenizer {str(file)!r}: {error}") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Trains a byte-level BPE with the special tokens of MiniCPM and ChatML; equal texts give equal files.

        Args:
            texts: what to learn from.
            vocab_size: number of tokens, at least the 256 bytes and the special tokens. Texts with too few different
                words give a smaller vocabulary.

        Raises:
            DataError: `vocab_size` is too small.
        """
        special = [PAD, BOS, EOS, IM_START, IM_END]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if vocab_size < (least := len(special) + len(alphabet)):
            raise DataError(f"vocab_size {vocab_size} is too small: the bytes and special tokens alone are {least}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, special.index(BOS))]
        )
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "additional_special_tokens": [IM_START, IM_END],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHATML,
        }
        return cls(backend, settings)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, a folder that `transformers.AutoTokenizer` loads."""
        folder = Path(folder)
        os.makedirs(folder, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), "utf-8")
        settings = json.dumps(self._settings, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / "tokenizer_config.json").write_text(settings + "\n", "utf-8")

    def to_json(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        return json.loads(self._backend.to_str())

    @property
    def sha256(self) -> str:
        """The hash by which a dataset and a checkpoint know that they belong together: of the saved tokenizer.json."""
        return hashlib.sha256(self._backend.to_str(pretty=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any token that the text does not spell out."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of a text that a model is to continue: as `encode`, after `bos_id` where `add_bos` says so."""
        before = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        return before + self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, for many texts at a time (in parallel threads, unless TOKENIZERS_PARALLELISM is "false")."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, with the range of characters of each token."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens; exactly the text that was encoded, if the tokenizer does not normalise."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        """The text of a conversation, in the words of the tokenizer's chat template.

        Raises:
            DataError: the tokenizer has no chat template.
            ChatError: the template refuses the conversation.
        """
        return self.require_chat_template().render(conversation, add_generation_prompt=add_generation_prompt)

    def require_chat_template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            DataError: there is none.
        """
        if self.chat_template is None:
            raise DataError("the tokenizer has no chat template: put a chat_template.jinja beside its tokenizer.json")
        return self.chat_template


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The named special tokens of a tokenizer_config.json, where a token is a text or an object with its content."""
    tokens = {}
    for name in _SPECIAL_NAMES:
        if (token := settings.get(name)) is None:
            continue
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str):
            raise DataError(
                f'tokenizer_config.json says {name} = {token!r}: accepted are a text and {{"content": a text, …}}'
            )
        tokens[name] = text
    return tokens


def _chat_template(settings: dict[str, Any], special_tokens: dict[str, str]) -> ChatTemplate | None:
    if (source := settings.get("chat_template")) is None:
        return None
    if not isinstance(source, str):
        raise DataError(f"its chat_template is {type(source).__name__}: accepted is Jinja in a text")
    try:
        return ChatTemplate(source, special_tokens)
    except ChatError as error:
        raise DataError(f"its {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object")
    return content


class StreamDecoder:
    """Decodes tokens one at a time, holding back characters whose bytes are not complete yet."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # The tokens said last are decoded together with the new ones, because some decoders drop a leading space.
        self._said: list[int] = []
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that has become final, possibly none."""
        self._pending.append(int(token))
        text = self._pending_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._said, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """The rest, where incomplete characters show as U+FFFD."""
        text = self._pending_text()
        self._said, self._pending = [], []
        return text

    def _pending_text(self) -> str:
        said = self._tokenizer.decode(self._said, skip_special_tokens=self._skip)
        text = self._tokenizer.decode(self._said + self._pending, skip_special_tokens=self._skip)
        return text[len(said) :]
