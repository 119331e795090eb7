"""The tokenizer in the metadata of a GGUF file, as one of the `tokenizers` library.

A GGUF file names how text is split before the merges ("smollm", "llama-bpe", …) instead of describing it; the rules
belong to the models' own tokenizer.json files, and the names to `llama_vocab::impl::load` of llama.cpp.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from cpm_jax.data.errors import DataError
from cpm_jax.data.tokenizer import Tokenizer

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """How a byte-level tokenizer cuts text before the merges.

    Attributes:
        patterns: regular expressions, each of which cuts the pieces of the one before.
        ignore_merges: whether a piece that is a token stays whole even if no merges lead to it.
        add_bos: whether texts begin with the bos token, where the file does not say.
        nfc: whether text is brought to Unicode's composed form.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_DIGITS_APART = Splitting((r"\p{N}", GPT2_PATTERN))
_LLAMA3 = Splitting((_WORDS.replace("DIGITS", r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_QWEN = Splitting((_WORDS.replace("DIGITS", r"\p{N}"),))
SPLITTINGS = {
    "default": Splitting((r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Splitting((GPT2_PATTERN,)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS_APART),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    "smaug-bpe": Splitting(_LLAMA3.patterns),
    "qwen2": Splitting(_QWEN.patterns, nfc=True),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez", "stablelm2"), _QWEN),
    "tekken": Splitting((_TEKKEN,), ignore_merges=True, add_bos=True),
    "minicpm5": Splitting((r"\p{N}{1,3}", _WORDS.replace("DIGITS", r"\p{N}+")), ignore_merges=True),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # what tokenizer.ggml.token_type says of a token
IDS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where the file does not say


def _cut_at(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Makes each match of a pattern a piece of its own."""
    if pattern == r"\p{N}":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: str) -> Tokenizer | None:
    """Builds the tokenizer that a GGUF file describes.

    Args:
        metadata: of the file, by key.
        path: of the file, for messages.

    Returns:
        The tokenizer with its special tokens and chat template; None if the file has none.

    Raises:
        DataError: the tokenizer is of a kind that is not known, or damaged.
    """
    kind = metadata.get("tokenizer.ggml.model", "none")
    if kind in ("none", "no_vocab"):
        return None
    try:
        if kind == "gpt2":
            return _Reader(metadata, path).byte_level()
        if kind == "llama":
            return _Reader(metadata, path).sentencepiece()
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{path}: its tokenizer cannot be built: {error}; {_ADVICE}") from error
    raise DataError(f"{path} has a tokenizer of the kind {kind!r}; known are gpt2 and llama: {_ADVICE}")


_ADVICE = "give the model's own tokenizer.json with --gin.TOKENIZER=…"


class _Reader:
    def __init__(self, metadata: Mapping[str, Any], path: str):
        self._metadata = metadata
        self._path = path
        self._tokens: list[str] = self._list("tokens", str)
        self._types: list[int] = self._list("token_type", int, len(self._tokens), [NORMAL] * len(self._tokens))
        # llama.cpp fills the vocabulary up to the rows of the embedding with tokens that no text has.
        self._vocab = {
            token: index
            for index, (token, type_) in enumerate(zip(self._tokens, self._types, strict=True))
            if not (type_ == UNUSED and token.startswith("[PAD"))
        }

    def _list(self, name: str, of: type, length: int | None = None, default: list[Any] | None = None) -> list[Any]:
        values = self._metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(values, list) or not values or not all(isinstance(value, of) for value in values):
            raise DataError(f"{self._path}: tokenizer.ggml.{name} must be a list of {of.__name__}; {_ADVICE}")
        if length is not None and len(values) != length:
            raise DataError(
                f"{self._path}: tokenizer.ggml.{name} has {len(values):,} values for {length:,} tokens; {_ADVICE}"
            )
        return values

    def byte_level(self) -> Tokenizer:
        name = self._metadata.get("tokenizer.ggml.pre", "default")
        if name not in SPLITTINGS:
            raise DataError(
                f"{self._path}: tokenizer.ggml.pre is {name!r}; known are {', '.join(sorted(SPLITTINGS))}: {_ADVICE}"
            )
        splitting = SPLITTINGS[name]
        merges = []
        for merge in self._list("merges", str):
            left, _, right = merge.partition(" ")
            merges.append((left, right))
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=self._vocab, merges=merges, ignore_merges=splitting.ignore_merges)
        )
        if splitting.nfc:
            backend.normalizer = normalizers.NFC()
        # Patterns that have a name go by it, as in the models' own files: other readers of tokenizer.json know those.
        patterns, use_regex = splitting.patterns, splitting.patterns[-1] == GPT2_PATTERN
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(_cut_at(pattern) for pattern in (patterns[:-1] if use_regex else patterns)),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        return self._finish(backend, {}, add_bos=splitting.add_bos)

    def sentencepiece(self) -> Tokenizer:
        """SentencePiece's BPE: the pair that makes the token of the highest score is merged first.

        The `tokenizers` library merges by rank, so all ways to cut a token in two are ranked by its score.
        """
        scores = self._list("scores", float, len(self._tokens))
        normal = {token: scores[index] for token, index in self._vocab.items() if self._types[index] == NORMAL}
        cuts = [
            (score, token[:place], token[place:])
            for token, score in normal.items()
            for place in range(1, len(token))
            if token[:place] in normal and token[place:] in normal
        ]
        cuts.sort(key=lambda cut: -cut[0])
        special = _SENTENCEPIECE_IDS
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab=self._vocab,
                merges=[(left, right) for _, left, right in cuts],
                unk_token=self._special("unknown", special),
                fuse_unk=True,
                byte_fallback=BYTE in self._types,
            )
        )
        space = normalizers.Replace(" ", "▁")
        prefix = self._metadata.get("tokenizer.ggml.add_space_prefix", True)
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if prefix else []),
            ]
        )
        return self._finish(backend, special, add_bos=True)

    def _special(self, name: str, defaults: Mapping[str, int]) -> str | None:
        index = self._metadata.get(f"tokenizer.ggml.{name}_token_id", defaults.get(name))
        if index is None:
            return None
        if not 0 <= index < len(self._tokens):
            raise DataError(
                f"{self._path}: tokenizer.ggml.{name}_token_id = {index}: there are {len(self._tokens):,} tokens"
            )
        return self._tokens[index]

    def _finish(self, backend: tokenizers.Tokenizer, defaults: Mapping[str, int], *, add_bos: bool) -> Tokenizer:
        """Adds what stays whole in a text, the bos token, and the settings of tokenizer_config.json."""
        for type_ in (CONTROL, USER_DEFINED):
            whole = [
                AddedToken(token, special=type_ == CONTROL, normalized=False)
                for token, index in self._vocab.items()
                if self._types[index] == type_
            ]
            backend.add_tokens(whole)
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{ours: token for ours, name in IDS.items() if (token := self._special(name, defaults)) is not None},
        }
        if self._metadata.get("tokenizer.ggml.add_bos_token", add_bos):
            if (bos := settings.get("bos_token")) is None:
                raise DataError(f"{self._path}: texts shall begin with a bos token, but it names none; {_ADVICE}")
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, self._vocab[bos])]
            )
        if template := self._metadata.get("tokenizer.chat_template"):
            settings["chat_template"] = template
        return Tokenizer(backend, settings)
