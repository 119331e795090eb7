"""Text of the C++ runtime: its ids and texts are those of the library that the tokenizers come from."""

import copy
import dataclasses
import functools
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from benchmarks.pretrained import smollm2_path
from cpm_jax.checkpoints.gguf import GgufSource
from cpm_jax.data.gguf_tokenizer import tokenizer_from_gguf
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.generate import Generator, collect
from cpm_jax.inference.sampling import SamplingConfig
from export.hf import export_hf
from tests.export import small_models
from tests.export.cuda.native_build import ENVIRONMENT, skip_without_tokenizers

pytestmark = pytest.mark.slow  # all need the build

PLAIN = dataclasses.replace(small_models.PLAIN, max_position_embeddings=128)
TEXTS = [
    "def add(a, b):\n    return a + b  # 12345 + 6\n\n\n\tend",
    "It's what we'll say: they've 3,000.50 dollars, don't they?  Two  spaces,   three.",
    "学而时习之，不亦说乎？ 有朋自远方來",
    "Ça déjà-vu, naïve façade; Straße, ÆØÅ, Ελληνικά, русский язык, עברית, العربية १२३",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u00a0 \u3000 x\u200by ½ ² Ⅷ",
    " leading and trailing ",
    "x" * 60 + " " + "ab" * 30,
    "<|im_start|>user\nHello<|im_end|>\n<|endoftext|>",
    "{\"key\": [1, 2.5e-3], 'b': null}\n\n",
]


@pytest.fixture(autouse=True)
def _needs_tokenizers(tmp_path):
    skip_without_tokenizers(tmp_path)


def execute(runtime, program: str, *arguments) -> str:
    """What a program says, with its ends of lines. A random model's bytes need not be characters."""
    command = [str(runtime.folder / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(errors="replace")


def read_texts(runtime, folder: Path, texts, scratch: Path) -> tuple[list[list[int]], list[str]]:
    """What the runtime makes of texts: their ids, and the text of those."""
    (scratch / "texts").write_text("\n".join(text.replace("\n", "\\n") for text in texts) + "\n", "utf-8", newline="")
    lines = execute(runtime, "tokenize", folder, scratch / "texts").split("\n")
    assert len(lines) == 2 * len(texts) + 1
    ids = [list(map(int, line.split())) for line in lines[:-1:2]]
    return ids, [line.replace("\\n", "\n") for line in lines[1::2]]


# Byte-level BPE.


@pytest.fixture(scope="module", params=["trained", "SmolLM2"])
def text_tokenizer(request):
    if request.param == "trained":
        return Tokenizer.train(TEXTS, 320)
    found = GgufSource(smollm2_path()).tokenizer()
    assert found is not None
    return found


def test_ids_and_text_are_those_of_the_trainer(text_tokenizer, runtime, tmp_path):
    text_tokenizer.save(tmp_path / "folder")
    ids, decoded = read_texts(runtime, tmp_path / "folder", TEXTS, tmp_path)
    expected = [text_tokenizer.encode_prompt(text) for text in TEXTS]
    assert ids == expected
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "folder/tokenizer.json"))
    assert decoded == [theirs.decode(ids, skip_special_tokens=True) for ids in expected]


def test_the_token_that_begins_a_text_may_be_one_step_of_several(runtime, tmp_path):
    """As in Llama 3's tokenizer.json, which also has tokens that no merge makes."""
    Tokenizer.train(TEXTS, 320).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    steps = [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}]
    content["post_processor"] = {"type": "Sequence", "processors": [*steps, content["post_processor"]]}
    content["model"] |= {"ignore_merges": True, "vocab": content["model"]["vocab"] | {"Zqj": 999}}
    file.write_text(json.dumps(content))
    expected = tokenizers.Tokenizer.from_file(str(file)).encode("Zqj a").ids
    assert 999 in expected
    assert read_texts(runtime, tmp_path, ["Zqj a"], tmp_path)[0] == [expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.replace('"content": "', '"content": "", "was": "', 1), "has an added token without text"),
        (lambda file: '{"post_processor": ' + "[" * 10**6 + "]" * 10**6 + "}", "nested in more than 32 others"),
        (lambda file: file.replace('"vocab": {', '"vocab": {"Zqj": 999,'), 'no merge makes the token "Zqj"'),
        (lambda file: file.replace('"merges": [', '"merges": ["a b",'), 'merges[0] = "a b": accepted is a list of two'),
        (lambda file: file.replace('"id": 4,', '"id": 4294967300,'), "id = 4294967300: accepted is a whole number"),
        (lambda file: file.replace('"type": "Digits"', '"type": "Unknown"'), "is not computed here; give token ids"),
    ],
)
def test_a_tokenizer_that_is_not_computed_or_would_not_end_is_an_error(change, message, runtime, tmp_path):
    Tokenizer.train(TEXTS, 320).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(change(file.read_text()))
    done = runtime.execute("cpm", tmp_path, "--prompt", "a")
    assert done.returncode == 1
    assert message in done.stderr


def test_the_program_takes_and_prints_text(runtime, tmp_path):
    tokenizer = Tokenizer.train(TEXTS, 320)
    export_hf(small_models.random_params(PLAIN), PLAIN, tokenizer, tmp_path / "hf", layout="llama")
    prompt = "def add(a, b):\n"
    ids = ",".join(map(str, tokenizer.encode_prompt(prompt)))
    arguments = ["--max-new-tokens", 12, "--capacity", 64, "--ignore-eos"]
    by_ids = runtime.run(tmp_path / "hf", "--ids", ids, *arguments)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    assert len(by_ids.ids) == 12
    said = execute(runtime, "cpm", tmp_path / "hf", "--prompt", prompt, *arguments)
    assert said == theirs.decode(by_ids.ids, skip_special_tokens=True) + "\n"
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path)
    done = runtime.execute("cpm", tmp_path, "--prompt", prompt)
    assert done.returncode == 1
    assert "tokenizer.json cannot be read" in done.stderr


# SentencePiece's BPE.

RECORDED = json.loads((Path(__file__).parents[2] / "data/llama_cpp_tokens.json").read_text("utf-8"))
SPECIAL = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|im_start|>", "<|im_end|>"]
MORE_TEXTS = [
    *RECORDED["texts"],
    "",
    " ",
    *(" " * spaces + "x" + " " * (7 - spaces) for spaces in range(8)),
    "\t\t tabs\tand\r\n\n\n",
    "▁",
    " ▁▁ a▁b",
    "<s>",
    "a<s>b</s> <|im_start|> c<|im_end|><|im_end|>",
    "<0x41><0x4",
    "Wir sagten: <tool>Neu York</tool> in New York City, New  York",
    "한국어 ไทย தமிழ் ქართული հայերեն አማርኛ 日本語カタカナ Tiếng Việt",
    "\ufffd \u0000 \u2028 \ue000 \U0010ffff",
    *("-" * length + "=" * length for length in (3, 5, 16, 33)),
]
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
SPACES = {"Prepend": (PREPEND, None), "Replace": (REPLACE, None), "Metaspace": (None, METASPACE)}


def trained_pieces() -> list[str]:
    """Pieces in the order in which `tokenizers` learns them, from documentation in English and what else is here."""
    unk, *_ = SPECIAL
    backend = tokenizers.Tokenizer(models.BPE(unk_token=unk, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=len(SPECIAL) + 2400, special_tokens=SPECIAL, show_progress=False)
    docs = sorted((Path(__file__).parents[3] / "docs").glob("*.md"))
    backend.train_from_iterator([file.read_text("utf-8") for file in docs] + TEXTS + RECORDED["texts"], trainer)
    vocabulary = backend.get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)[len(SPECIAL) :]
    # The characters come first and have no merges: to SentencePiece they are the last.
    return sorted(pieces, key=lambda piece: len(piece) == 1)


@functools.cache
def sentencepiece_json(pieces: str) -> dict:
    """A tokenizer.json with every merge that SentencePiece would do, as those of Llama 2 have."""
    found = RECORDED["sentencepiece"]["pieces"] if pieces == "recorded" else trained_pieces()
    metadata = {
        "model": "llama",
        "tokens": SPECIAL + found,
        "token_type": [2, 3, 3] + [6] * 256 + [3, 3] + [1] * len(found),
        "scores": [0.0] * len(SPECIAL) + [-float(rank) for rank in range(len(found))],
    }
    tokenizer = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, "file")
    assert tokenizer is not None
    return tokenizer.to_json()


def sentencepiece(pieces: str, spaces: str) -> tokenizers.Tokenizer:
    content = copy.deepcopy(sentencepiece_json(pieces))
    content["normalizer"], content["pre_tokenizer"] = SPACES[spaces]
    if spaces != "Prepend":
        content["decoder"]["decoders"].pop()  # Strip
    if pieces == "recorded":  # as older files have them
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def save(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def text_of(tokenizer: tokenizers.Tokenizer, ids: list[int]) -> str:
    """Text of tokens that continue a text: a space before them stays."""
    content = json.loads(tokenizer.to_str())
    content["decoder"]["decoders"] = content["decoder"]["decoders"][:3]
    return tokenizers.Tokenizer.from_str(json.dumps(content)).decode(ids)


def check_texts(runtime, tokenizer: tokenizers.Tokenizer, texts: list[str], scratch: Path) -> list[list[int]]:
    save(tokenizer, scratch / "folder")
    ids, decoded = read_texts(runtime, scratch / "folder", texts, scratch)
    expected = [tokenizer.encode(text).ids for text in texts]
    for text, ours, theirs in zip(texts, ids, expected, strict=True):
        assert ours == theirs, text
    assert decoded == [text_of(tokenizer, ids) for ids in expected]
    return ids


def random_texts(tokenizer: tokenizers.Tokenizer, number: int) -> list[str]:
    """Tokens and parts of tokens in a row, with few kinds each, so that they often meet."""
    draw = random.Random(0)
    known = [token.replace("▁", " ") for token in tokenizer.get_vocab() if not token.startswith("<")]
    parts = []
    for _ in range(number):
        few = draw.choices(known, k=3)
        few += [token[: draw.randint(1, len(token))] for token in few]
        parts.append("".join(draw.choices(few, k=12)).replace("\\", ""))
    return parts


@pytest.mark.parametrize("spaces", SPACES)
@pytest.mark.parametrize("pieces", ["recorded", "trained"])
def test_ids_of_sentencepiece_are_those_of_tokenizers(pieces, spaces, runtime, tmp_path):
    tokenizer = sentencepiece(pieces, spaces)
    assert pieces == "recorded" or tokenizer.get_vocab_size() > 2000
    texts = [*TEXTS, *MORE_TEXTS, *random_texts(tokenizer, 300)]
    ids = check_texts(runtime, tokenizer, texts, tmp_path)
    assert ids[texts.index("")] == [1]  # <s>
    used = {index for text in ids for index in text}
    assert len(used & set(range(3, 259))) > 50  # bytes
    assert len(used - set(range(len(SPECIAL)))) > 300


def test_the_text_of_sentencepiece_comes_back(runtime, tmp_path):
    tokenizer = sentencepiece("trained", "Replace")
    save(tokenizer, tmp_path)
    _, decoded = read_texts(runtime, tmp_path, TEXTS[:7], tmp_path)
    assert decoded == TEXTS[:7]
    tokenizer = sentencepiece("trained", "Prepend")
    save(tokenizer, tmp_path)
    _, decoded = read_texts(runtime, tmp_path, TEXTS[:7], tmp_path)
    assert decoded == [" " + text for text in TEXTS[:7]]


@pytest.mark.parametrize("spaces", SPACES)
def test_text_is_cut_at_added_tokens_as_tokenizers_does(spaces, runtime, tmp_path):
    """Some are normalised themselves, some stand in texts as they are, and the longest counts."""
    tokenizer = sentencepiece("recorded", spaces)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<tool>x", normalized=False)])
    tokenizer.add_tokens([AddedToken("New York", normalized=True), AddedToken("<|x", normalized=True)])
    tokenizer.add_tokens([AddedToken("l▁x", normalized=False)])
    tokenizer.add_special_tokens([AddedToken("Neu York", normalized=False)])
    texts = [
        *MORE_TEXTS,
        "<tool>x<tool> y <tool> <tool>xx",
        "New York New York,New York<tool>New York",
        " New York▁New▁York",
        "a <|x<|x<|<|x <|x",
        "l x l▁x",
        "Neu York New York",
    ]
    ids = check_texts(runtime, tokenizer, texts, tmp_path)
    assert set(range(tokenizer.get_vocab_size() - 6, tokenizer.get_vocab_size())) <= {i for text in ids for i in text}


def changed(*path, to):
    """A change of tokenizer.json at a path of names and indices."""

    def change(content):
        *before, last = path
        for name in before:
            content = content[name]
        content[last] = to(content[last]) if callable(to) else to

    return change


def with_token(token, index):
    return changed("model", "vocab", to=lambda vocab: vocab | {token: index})


def merged(place, *merges):
    """Tokens with merges at a place among the others."""

    def change(content):
        vocab = content["model"]["vocab"]
        for left, right in merges:
            for token in (left, right, left + right):
                vocab.setdefault(token, len(vocab))
        content["model"]["merges"][place:place] = map(list, merges)

    return change


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
STRIP = {"type": "Strip", "content": " ", "start": 0, "stop": 1}
REFUSED = {
    # What is not computed here.
    'type = "Unigram": accepted is BPE; give token ids (--ids)': changed("model", "type", to="Unigram"),
    "dropout = 0.1: accepted is null": changed("model", "dropout", to=0.1),
    'end_of_word_suffix = "</w>": accepted is null': changed("model", "end_of_word_suffix", to="</w>"),
    "byte_fallback = false: accepted is true": changed("model", "byte_fallback", to=False),
    "ignore_merges = true: accepted is false": changed("model", "ignore_merges", to=True),
    "normalizer and pre_tokenizer: accepted are ByteLevel, the normalizer Replace": changed("normalizer", to=None),
    "accepted is Replace ' ' by '▁', after Prepend or not; give": changed("normalizer", to={"type": "NFKC"}),
    'prepend = "_": accepted is ▁': changed("normalizer", "normalizers", 0, "prepend", to="_"),
    "accepted is none after this normalizer": changed("pre_tokenizer", to=METASPACE),
    "decoder: accepted are Replace": changed("decoder", "decoders", 3, to=STRIP),
    "decoder: accepted are": changed("decoder", to=None),
    "lstrip = true: accepted is false; give": changed("added_tokens", 1, "lstrip", to=True),
    "rstrip = true: accepted is false": changed("added_tokens", 1, "rstrip", to=True),
    "single_word = true: accepted is false": changed("added_tokens", 1, "single_word", to=True),
    # What SentencePiece would compute otherwise.
    'makes "ell" at another rank than before': merged(0, ("e", "l"), ("el", "l"), ("H", "o"), ("e", "ll")),
    'no merge joins "X" and "as", of which it has the whole': merged(0, ("X", "a"), ("Xa", "s")),
    "accepted is tokens that are no bytes": merged(0, ("H", "<0x41>")),
    "lacks <0x41>: accepted are vocabularies with all bytes": changed(
        "model", "vocab", to=lambda vocab: {token: index for token, index in vocab.items() if token != "<0x41>"}
    ),
    # Damage.
    "type = 3: accepted is a text": changed("model", "type", to=3),
    "tokenizer.json lacks model": changed("model", to=None),
    "model lacks merges": changed("model", "merges", to=None),
    "vocab = []: accepted is an object": changed("model", "vocab", to=[]),
    "Zq = -1: accepted is a whole number": with_token("Zq", -1),
    "Zq = 2147483648: accepted is a whole number from 0 to 2147483647": with_token("Zq", 2**31),
    "Zq = 1e+300: accepted is a whole number": with_token("Zq", 1e300),
    "vocab has two tokens of the id 7": with_token("Zq", 7),
    "vocab has a token without text": with_token("", 10_000),
    'merges[0] = ["Zq","a"]: accepted is tokens of the vocabulary': changed("model", "merges", 0, to=["Zq", "a"]),
    'merges[0] = ["a"]: accepted is two tokens': changed("model", "merges", 0, to=["a"]),
    'merges[0] = "a b c": accepted is two tokens': changed("model", "merges", 0, to="a b c"),
    "of at most 512 bytes together": merged(0, ("x" * 400, "x" * 400)),
    "id = 2147483647: accepted is 1": changed("added_tokens", 0, "id", to=2**31 - 1),
    "id = 2147483648: accepted is a whole number": changed("added_tokens", 0, "id", to=2**31),
    "has an added token without text": changed("added_tokens", 0, "content", to=""),
    "is an added token a second time": changed("added_tokens", to=lambda tokens: [tokens[0], *tokens]),
    "id = 9999: accepted is 668": changed(
        "added_tokens", to=lambda tokens: [*tokens, ADDED | {"content": "<new>", "id": 9999}]
    ),
    "nested in more than 32 others": changed("decoder", to=json.loads("[" * 40 + "]" * 40)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_sentencepiece_would_not_compute_is_refused(message, runtime, tmp_path):
    content = copy.deepcopy(sentencepiece_json("recorded"))
    REFUSED[message](content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    done = runtime.execute("cpm", tmp_path, "--prompt", "a")
    assert done.returncode == 1
    assert message in done.stderr


def test_ids_need_not_follow_each_other(runtime, tmp_path):
    """No memory is taken for the ids between."""
    content = copy.deepcopy(sentencepiece_json("recorded"))
    content["model"]["vocab"]["好"] = 2**31 - 1
    content["added_tokens"], content["post_processor"] = [], None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ids, _ = read_texts(runtime, tmp_path, ["好 <s>"], tmp_path)
    assert ids == [tokenizers.Tokenizer.from_str(json.dumps(content)).encode("好 <s>").ids]
    assert 2**31 - 1 in ids[0]


def test_tokens_that_no_merge_makes_are_in_no_text(runtime, tmp_path):
    """SentencePiece would join two neighbours that make one."""
    content = copy.deepcopy(sentencepiece_json("recorded"))
    content["model"]["vocab"] |= {"Hex": 668, "<tool>": 669, "l\n\n\n": 670}
    check_texts(runtime, tokenizers.Tokenizer.from_str(json.dumps(content)), ["Hex <tool>l\n\n\n"], tmp_path)


def test_text_that_is_no_utf8_is_an_error(runtime, tmp_path):
    save(sentencepiece("recorded", "Replace"), tmp_path)
    (tmp_path / "texts").write_bytes(b"abc\xe4\xbd\n")
    done = runtime.execute("tokenize", tmp_path, tmp_path / "texts")
    assert done.returncode == 1
    assert "the tokenizer would change a part of this text here; give token ids (--ids)" in done.stderr


def test_no_damage_of_a_tokenizer_is_a_crash(runtime, tmp_path):
    """Any value may be another one: that is an error, or a tokenizer."""
    draw = random.Random(0)
    values = [
        0,
        -1,
        2**31,
        2**64,
        1e300,
        None,
        True,
        [],
        {},
        "",
        "▁",
        "<0x41>",
        "a b",
        [1],
        ["a", "b"],
        "\0",
        "x" * 999,
    ]
    (tmp_path / "texts").write_text("a b\\n<s> Hello 你好<0x41>\n")
    codes = []
    for _ in range(60):
        content = copy.deepcopy(sentencepiece_json("recorded"))
        content["model"]["merges"] = content["model"]["merges"][:20]  # so that others are met as often
        for _ in range(draw.choice([1, 1, 3])):
            place = content
            while True:
                key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
                if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.1:
                    break
                place = place[key]
            place[key] = draw.choice(values)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        done = runtime.execute("tokenize", tmp_path, tmp_path / "texts")
        codes.append(done.returncode)
        assert done.returncode == 0 or "\ntokenize: " in done.stderr, (content, done.stderr)
    assert set(codes) == {0, 1}


@pytest.mark.parametrize("spaces", ["Prepend", "Replace"])
def test_the_program_continues_text_as_jax_does(spaces, runtime, tmp_path):
    tokenizer = Tokenizer(sentencepiece("trained", spaces), {"bos_token": "<s>", "eos_token": "</s>"})
    config = dataclasses.replace(PLAIN, vocab_size=tokenizer.vocab_size)
    params = small_models.random_params(config)
    # What bytes that are no characters look like differs, and depends on how many come at once.
    params["lm_head"]["kernel"][..., 3:259] = 0
    export_hf(params, config, tokenizer, tmp_path / "hf", layout="llama")
    spaces_first = set()
    for prompt in ("The capital of France is", "export: 学而", "a "):
        ids = tokenizer.encode_prompt(prompt)
        stream = Generator(config, params, tokenizer).stream(
            [ids], sampling=SamplingConfig(temperature=0), max_new_tokens=24
        )
        (ours,) = collect(stream)
        said = execute(runtime, "cpm", tmp_path / "hf", "--prompt", prompt, "--max-new-tokens", 24, "--capacity", 64)
        whole = tokenizer.decode([*ids, *ours.token_ids], skip_special_tokens=True)
        assert len(ours.token_ids) > 8
        assert whole + "\n" == tokenizer.decode(ids, skip_special_tokens=True) + said
        # Ours leaves the space out with which a text begins.
        assert said.removeprefix(" ") == ours.text.removeprefix(" ") + "\n"
        spaces_first.add(said.startswith(" "))
    assert np.any(list(spaces_first))
