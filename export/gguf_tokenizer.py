"""A tokenizer as metadata of a GGUF file: the reverse of `cpm_jax/data/gguf_tokenizer.py`, by the same tables.

GGUF names the rule by which text is split instead of holding it. So a tokenizer whose rule is not among the known ones,
or that does something for which GGUF has no word, is refused: llama.cpp would give other ids without a warning.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from cpm_jax.common.config import ConfigError
from cpm_jax.data.chat import ChatError
from cpm_jax.data.gguf_tokenizer import (
    BYTE,
    CONTROL,
    GPT2_PATTERN,
    IDS,
    NORMAL,
    SPLITTINGS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from cpm_jax.data.tokenizer import Tokenizer

Json = Mapping[str, Any]

_SPACE = "▁"
# What llama.cpp takes for the end of a text where a file does not say, by tokenizer.ggml.model.
_ASSUMED_EOS = {"gpt2": 11, "llama": 2}


def tokenizer_to_gguf(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int] = ()) -> dict[str, Any]:
    """The metadata that describes a tokenizer.

    Args:
        tokenizer: ours.
        vocab_size: rows of the model's embedding; ids that the tokenizer does not have become unused tokens.
        eos_token_ids: the tokens that end a text by the model's own configuration; where the tokenizer names none, the
            first of them does.

    Raises:
        ConfigError: GGUF has no words for what the tokenizer does, or it has more tokens than the model.
    """
    content = tokenizer.to_json()
    model = content["model"]
    if model["type"] != "BPE":
        _refuse(f"its model is {model['type']}", "BPE, byte-level or SentencePiece's")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            _refuse(f"its model has {name} = {model[name]!r}", "none")
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"ModelConfig.vocab_size = {vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens, so it is not the "
            "one that this model was trained with",
            field="ModelConfig.vocab_size",
        )
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in content["added_tokens"]:
        for flag in ("lstrip", "rstrip", "single_word"):
            if added[flag]:
                _refuse(f"its token {added['content']!r} has {flag} = True", "False")
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    byte_level = _has_byte_level(content["pre_tokenizer"])
    described = (_byte_level if byte_level else _sentencepiece)(content, tokens, types)
    return {
        **{f"tokenizer.ggml.{key}": value for key, value in described.items()},
        **_special(tokenizer, [token for token in eos_token_ids if 0 <= token < vocab_size]),
    }


def tokenizer_notes(metadata: Json) -> Iterator[str]:
    """What llama.cpp does otherwise with a tokenizer that was written, in sentences."""
    splitting = SPLITTINGS.get(metadata.get("tokenizer.ggml.pre", ""))
    if splitting is not None and splitting.nfc:
        yield (
            "the tokenizer brings text to Unicode's composed form (NFC) first, which llama.cpp does not: text in "
            "another form gets other ids there"
        )
    if "tokenizer.ggml.eos_token_id" not in metadata:
        yield (
            "the token that ends a text is left out, as neither tokenizer nor configuration names one: llama.cpp takes "
            f"token {_ASSUMED_EOS[metadata['tokenizer.ggml.model']]} for it"
        )


def _refuse(found: str, accepted: str) -> NoReturn:
    raise ConfigError(
        f"the tokenizer cannot be written into GGUF: {found}; accepted is {accepted}. Write a Hugging Face folder, "
        "which holds any tokenizer, or give another one with TOKENIZER",
        field="tokenizer",
    )


# Byte-level BPE.


def _steps(step: Json | None, kind: str) -> list[Json]:
    """The steps of a pre-tokenizer or normalizer, which may be none, one, or a sequence."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [inner for part in step[kind] for inner in _steps(part, kind)]
    return [step]


def _has_byte_level(pre_tokenizer: Json | None) -> bool:
    return any(step["type"] == "ByteLevel" for step in _steps(pre_tokenizer, "pretokenizers"))


def _patterns(pre_tokenizer: Json) -> tuple[str, ...] | None:
    """The regular expressions that cut text one after another; None where it is cut in another way."""
    *before, last = _steps(pre_tokenizer, "pretokenizers")
    patterns = []
    for step in before:
        match step:
            case {"type": "Digits", "individual_digits": True}:
                patterns.append(r"\p{N}")
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern)
            case _:
                return None
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    return (*patterns, GPT2_PATTERN) if last["use_regex"] else tuple(patterns)


def _byte_level(content: Json, tokens: Sequence[str], types: Sequence[int]) -> dict[str, Any]:
    model, patterns = content["model"], _patterns(content["pre_tokenizer"])
    normalizer = [step["type"] for step in _steps(content["normalizer"], "normalizers")]
    if normalizer not in ([], ["NFC"]):
        _refuse(f"it normalises text by {', '.join(normalizer)}", "nothing, or NFC")
    if model.get("byte_fallback"):
        _refuse("its model is byte-level and has byte_fallback = True", "one of the two")
    ignore_merges = bool(model.get("ignore_merges"))
    rule = (patterns, bool(normalizer), ignore_merges)
    known = [name for name, s in SPLITTINGS.items() if (s.patterns, s.nfc, s.ignore_merges) == rule]
    if not known:
        shown = content["pre_tokenizer"] if patterns is None else patterns
        _refuse(
            f"it splits text by {shown}{' after NFC' if normalizer else ''} with ignore_merges = {ignore_merges}",
            f"the rule of one of {', '.join(SPLITTINGS)} (cpm_jax/data/gguf_tokenizer.py)",
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return {"model": "gpt2", "pre": known[0], "tokens": list(tokens), "token_type": list(types), "merges": merges}


# SentencePiece's BPE.


def _prefixes_space(content: Json) -> bool | None:
    """Whether a space is put before each piece of text; None where spaces are treated in another way."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    pre = _steps(content["pre_tokenizer"], "pretokenizers")
    match _steps(content["normalizer"], "normalizers"), pre:
        case [first, second], [] if (first, second) == (prepend, replace):
            return True
        case [only], [] if only == replace:
            return False
        case [], [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}]:
            return False
    return None


def _sentencepiece(content: Json, tokens: Sequence[str], types: list[int]) -> dict[str, Any]:
    """The score of a token takes the place of the rank of the merges that make it."""
    if (prefix := _prefixes_space(content)) is None:
        _refuse(
            f"its normalizer is {content['normalizer']} and its pre-tokenizer {content['pre_tokenizer']}",
            "a byte-level pre-tokenizer, or SentencePiece's: Replace ' ' by '▁', after Prepend '▁' or not",
        )
    model = content["model"]
    scores = [0.0] * len(tokens)
    ids, ranks = model["vocab"], dict[str, int]()
    last = ""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if (made := left + right) != last and made in ranks:
            _refuse(
                f"its merges make {made!r} at two ranks with others between them",
                "the order of SentencePiece, where all merges that make a token have its score",
            )
        ranks.setdefault(made, len(ranks))
        last = made
    _check_all_cuts(ids, ranks, model["merges"], types)
    for token, index in ids.items():
        if types[index] == NORMAL:
            scores[index] = -float(ranks.get(token, len(ranks)))
        if len(token) == 6 and token.startswith("<0x") and model.get("byte_fallback"):
            types[index] = BYTE
    if model.get("unk_token") is not None:
        types[_vocabulary(content)[model["unk_token"]]] = UNKNOWN
    return {
        "model": "llama",
        "tokens": list(tokens),
        "scores": scores,
        "token_type": list(types),
        "add_space_prefix": prefix,
    }


def _check_all_cuts(ids: Mapping[str, int], ranks: Json, merges: Sequence[Any], types: Sequence[int]) -> None:
    """llama.cpp joins any two neighbours that make a token; so every such pair must be a merge here too."""
    known = {tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges}
    normal = {token for token, index in ids.items() if types[index] == NORMAL}
    for token in normal:
        for place in range(1, len(token)):
            cut = (token[:place], token[place:])
            if cut not in known and cut[0] in normal and cut[1] in normal:
                _refuse(f"its merges do not join {cut[0]!r} and {cut[1]!r}, of which it has the whole", "that all do")


# Of both kinds.


def _vocabulary(content: Json) -> dict[str, int]:
    """The ids of all tokens: some may stand among the added ones alone."""
    return content["model"]["vocab"] | {added["content"]: added["id"] for added in content["added_tokens"]}


def _special(tokenizer: Tokenizer, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """Ids of the special tokens, what is put around a text, and the chat template."""
    ids: dict[str, int | None] = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    content = tokenizer.to_json()
    vocab = _vocabulary(content)
    ids |= {name: vocab.get(token) for name, token in tokenizer.special_tokens.items()}
    if ids["eos_token"] is None:
        ids["eos_token"] = next(iter(eos_token_ids), None)
    eos_id = ids["eos_token"]
    found: dict[str, Any] = {
        f"tokenizer.ggml.{IDS[name]}_token_id": index for name, index in ids.items() if index is not None
    }
    around = list(tokenizer.affixes)
    if tokenizer.add_bos:
        around = around[1:]
    add_eos = bool(around) and around == [eos_id]
    if around and not add_eos:
        _refuse(f"it puts the tokens {tokenizer.affixes} around a text", "bos before it and eos after it, or less")
    found |= {"tokenizer.ggml.add_bos_token": tokenizer.add_bos, "tokenizer.ggml.add_eos_token": add_eos}
    if (template := tokenizer.chat_template) is not None:
        found["tokenizer.chat_template"] = template.source
        with contextlib.suppress(ChatError):  # a template that refuses a plain conversation
            for text in template.end_of_turn():
                if (index := vocab.get(text)) is not None and index != eos_id:
                    found["tokenizer.ggml.eot_token_id"] = index
    return found
