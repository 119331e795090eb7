"""Tokenizers from GGUF metadata give the ids of llama.cpp (recorded), of transformers, and survive being saved."""

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from cpm_jax.data.chat import CHATML, Conversation
from cpm_jax.data.errors import DataError
from cpm_jax.data.gguf_tokenizer import tokenizer_from_gguf
from cpm_jax.data.tokenizer import Tokenizer

RECORDED = json.loads((Path(__file__).parent / "llama_cpp_tokens.json").read_text("utf-8"))
TEXTS = RECORDED["texts"]
SPECIAL = ["<|im_start|>", "<|im_end|>"]


def byte_level(pre: str, **more):
    tokens = RECORDED["byte_level"]["tokens"]
    metadata = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3] * 5 + [1] * (len(tokens) - 5),
        "merges": RECORDED["byte_level"]["merges"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | more).items() if value is not None}


def sentencepiece(**more):
    pieces = RECORDED["sentencepiece"]["pieces"]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPECIAL]
    metadata = {
        "model": "llama",
        "tokens": special + pieces,
        "token_type": [2, 3, 3] + [6] * 256 + [3, 3] + [1] * len(pieces),
        "scores": [0.0] * len(special) + [-float(rank) for rank in range(len(pieces))],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | more).items() if value is not None}


def recorded_metadata(name: str):
    if name.startswith("llama") and name != "llama-bpe":
        return sentencepiece(add_space_prefix=False if "no space prefix" in name else None)
    return byte_level(name)


@pytest.mark.parametrize("name", RECORDED["ids"])
def test_ids_are_those_of_llama_cpp(name):
    tokenizer = tokenizer_from_gguf(recorded_metadata(name), "model.gguf")
    assert [tokenizer.encode(text) for text in TEXTS] == RECORDED["ids"][name]
    assert tokenizer.add_bos == RECORDED["adds_bos"][name]


def test_the_recorded_vocabularies_tell_the_rules_apart():
    cut_as_llama_bpe = ("smaug-bpe", "minicpm5")
    different = {name: json.dumps(ids) for name, ids in RECORDED["ids"].items() if name not in cut_as_llama_bpe}
    assert len(set(different.values())) == len(different)


def test_a_piece_that_is_a_token_may_stay_whole_without_merges():
    """What "llama-bpe" has and "smaug-bpe" has not: the same rules, and the merges that lead to a token left out."""
    merges = [merge for merge in RECORDED["byte_level"]["merges"] if merge.replace(" ", "") != "Hello"]
    ids = RECORDED["byte_level"]["tokens"].index("Hello")
    assert tokenizer_from_gguf(byte_level("llama-bpe", merges=merges), "model.gguf").encode("Hello") == [ids]
    assert len(tokenizer_from_gguf(byte_level("smaug-bpe", merges=merges), "model.gguf").encode("Hello")) > 1


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken", "deepseek-r1-qwen"])
def test_ids_are_those_of_transformers(pre):
    metadata = byte_level(pre)
    theirs, _ = convert_gguf_tokenizer(
        "llama",
        {
            "tokenizer_type": "gpt2",
            "pre_tokenizer_type": pre,
            "tokens": metadata["tokenizer.ggml.tokens"],
            "token_type": metadata["tokenizer.ggml.token_type"],
            "merges": metadata["tokenizer.ggml.merges"],
        },
    )
    ours = tokenizer_from_gguf(metadata, "model.gguf")
    assert [ours.encode(text) for text in TEXTS] == [
        theirs.encode(text, add_special_tokens=False).ids for text in TEXTS
    ]


@pytest.mark.parametrize("name", RECORDED["ids"])
def test_text_comes_back(name):
    tokenizer = tokenizer_from_gguf(recorded_metadata(name), "model.gguf")
    for text in TEXTS:
        if name == "llama" and SPECIAL[0] in text:
            continue  # a space is put before each piece between special tokens, as llama.cpp does
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_composed_characters_are_those_of_qwen():
    qwen, smollm = (tokenizer_from_gguf(byte_level(pre), "model.gguf") for pre in ("qwen2", "smollm"))
    assert qwen.encode("cafe\u0301") == qwen.encode("café")
    assert smollm.encode("cafe\u0301") != smollm.encode("café")


def test_special_tokens_and_chat_template(tmp_path):
    metadata = byte_level("smollm", padding_token_id=2, unknown_token_id=0, add_bos_token=True)
    tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.chat_template": CHATML}, "model.gguf")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert tokenizer.encode_prompt("a")[0] == 1
    conversation = Conversation([{"role": "user", "content": "hi"}])
    text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
    ids = tokenizer.encode(text)
    assert ids.count(metadata["tokenizer.ggml.tokens"].index(SPECIAL[0])) == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi\nassistant\n"
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert theirs.bos_token_id == 1
    assert theirs.eos_token_id == theirs.pad_token_id == 2
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert Tokenizer.load(tmp_path).encode(text) == tokenizer.encode(text)


def test_tokens_that_fill_the_vocabulary_up_are_left_out():
    tokens = RECORDED["byte_level"]["tokens"]
    padded = [*tokens, "[PAD620]", "[PAD621]"]
    types = [3] * 5 + [1] * (len(tokens) - 5) + [5, 5]
    tokenizer = tokenizer_from_gguf(byte_level("smollm", tokens=padded, token_type=types), "model.gguf")
    assert tokenizer.vocab_size == len(tokens)
    assert tokenizer.encode(TEXTS[0]) == RECORDED["ids"]["smollm"][0]


def test_user_defined_tokens_stay_whole_and_visible():
    tokens = RECORDED["byte_level"]["tokens"]
    types = [3] * 5 + [1] * (len(tokens) - 5) + [4]
    tokenizer = tokenizer_from_gguf(
        byte_level("smollm", tokens=[*tokens, "<｜tool｜>"], token_type=types), "model.gguf"
    )
    ids = tokenizer.encode("a<｜tool｜>b")
    assert ids[1] == len(tokens)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<｜tool｜>b"


@pytest.mark.parametrize("kind", [None, "none", "no_vocab"])
def test_files_without_a_tokenizer(kind):
    assert tokenizer_from_gguf({} if kind is None else {"tokenizer.ggml.model": kind}, "model.gguf") is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, r"kind 't5'; known are gpt2 and llama: give the model's own tokenizer\.json"),
        (byte_level("klingon"), r"tokenizer\.ggml\.pre is 'klingon'; known are codeshell, .*: give .*TOKENIZER="),
        (byte_level("smollm", merges=None), r"tokenizer\.ggml\.merges must be a list of str"),
        (byte_level("smollm", merges=["Ġ zzz"]), r"cannot be built: .*out of vocabulary"),
        (byte_level("smollm", token_type=[1, 1]), r"token_type has 2 values for \d+ tokens"),
        (byte_level("smollm", tokens=[1, 2]), r"tokenizer\.ggml\.tokens must be a list of str"),
        (byte_level("smollm", eos_token_id=10_000), r"eos_token_id = 10000: there are \d+ tokens"),
        (byte_level("smollm", bos_token_id=None, add_bos_token=True), r"begin with a bos token, but it names none"),
        (sentencepiece(scores=None), r"tokenizer\.ggml\.scores must be a list of float"),
    ],
)
def test_what_cannot_be_used(metadata, message):
    with pytest.raises(DataError, match=rf"model\.gguf.*{message}"):
        tokenizer_from_gguf(metadata, "model.gguf")


def test_byte_alphabet_is_complete():
    """The recorded vocabulary has every byte, so that no comparison above passes because bytes are dropped."""
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(RECORDED["byte_level"]["tokens"])
