"""Tokenizers against `transformers`, which reads the folders that we write."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cpm_jax.data.chat import Conversation
from cpm_jax.data.errors import DataError
from cpm_jax.data.sources import Document, read_documents
from cpm_jax.data.tokenizer import StreamDecoder, Tokenizer

SAMPLES = [
    "",
    " leading and trailing  ",
    "def f(x):\n    return x ** 2  # naïve\n\n\n",
    "数据处理 🙂👩‍👩‍👧 é é \t\r\n \u200b",
    "2026 + 3.14159 = ?",
    "<|im_start|>user\nhello<|im_end|>\n</s><pad>",
    "".join(map(chr, range(1, 1000))),
]


@pytest.fixture(scope="module")
def texts():
    documents = [item.text for item in read_documents("stdlib") if isinstance(item, Document)]
    return sorted(documents, key=len)[200:300]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(texts, 600)


def test_training_is_deterministic(texts, tokenizer, tmp_path):
    assert Tokenizer.train(iter(texts), 600).sha256 == tokenizer.sha256
    assert tokenizer.vocab_size == 600


def test_too_small_a_vocabulary():
    with pytest.raises(DataError, match="vocab_size 200 is too small: the bytes and special tokens alone are 261"):
        Tokenizer.train(["text"], 200)


def test_transformers_reads_what_we_write(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in SAMPLES:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert theirs(text)["input_ids"] == tokenizer.encode_prompt(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch(SAMPLES) == [tokenizer.encode(text) for text in SAMPLES]
    special = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert special == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert len(theirs) == tokenizer.vocab_size
    assert tokenizer.add_bos


def test_saving_and_loading_change_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    again = Tokenizer.load(tmp_path / "a")
    again.save(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert again.sha256 == tokenizer.sha256


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_is_exact(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("é数🙂\ufffd"))))
def test_streaming_says_the_same(tokenizer, text):
    stream = StreamDecoder(tokenizer, skip_special_tokens=False)
    pieces = [stream.add(token) for token in tokenizer.encode(text)]
    assert "".join([*pieces, stream.flush()]) == text


def test_streaming_holds_back_half_a_character(tokenizer):
    stream = StreamDecoder(tokenizer)
    tokens = tokenizer.encode("a🙂b")
    assert len(tokens) == 6
    assert [stream.add(token) for token in tokens] == ["a", "", "", "", "🙂", "b"]
    assert stream.add(tokens[1]) == ""
    assert stream.flush() == "\ufffd"


def test_streaming_keeps_the_spaces_of_sentencepiece(tmp_path):
    """Metaspace decoders drop the space before the first word of whatever they decode."""
    backend = tokenizers.Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    stream = StreamDecoder(Tokenizer(backend, {}))
    assert "".join(stream.add(token) for token in [0, 1, 1, 0]) == "a b b a"


@pytest.mark.parametrize("form", ["string", "added token", "special_tokens_map"])
def test_special_tokens_in_every_form_that_hugging_face_writes(tokenizer, tmp_path, form):
    tokenizer.save(tmp_path)
    config_file = tmp_path / "tokenizer_config.json"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "in the config"}
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    if form == "string":
        config |= names
    elif form == "added token":
        config |= {name: {"content": token, "__type": "AddedToken"} for name, token in names.items()}
    else:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    config_file.write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (3, 4, 4)
    assert not loaded.add_bos  # the file begins texts with <s>, which is not this bos_token
    (tmp_path / "chat_template.jinja").write_text("in a file")
    assert Tokenizer.load(tmp_path).apply_chat_template(Conversation([])) == "in a file"


def test_bad_tokenizers_are_named(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"nowhere': no such tokenizer\.json, nor a folder that holds one"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(DataError, match=r"eos_token = '<eos>', which tokenizer\.json does not have"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("{", "tokenizer_config.json is not JSON"),
        ("[" * 100_000, "tokenizer_config.json is not JSON"),
        ({"eos_token": 4}, "says eos_token = 4: accepted are a text"),
        ({"eos_token": ["</s>"]}, "says eos_token = ['</s>']: accepted are a text"),
        ({"bos_token": {"id": 1}}, "says bos_token = {'id': 1}: accepted are a text"),
        ({"chat_template": "{% if %}"}, "its chat template is not valid: "),
        ({"chat_template": {"default": "x"}}, "its chat_template is dict: accepted is Jinja in a text"),
        ({"chat_template": ["x"]}, "the items of its list chat_template must be"),
        ({"chat_template": [{"name": "default"}]}, "the items of its list chat_template must be"),
        ({"chat_template": [{"name": "default", "template": 3}]}, "its chat_template is int"),
    ],
)
def test_settings_that_mean_nothing_are_named(tokenizer, tmp_path, settings, words):
    tokenizer.save(tmp_path)
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(DataError) as caught:
        Tokenizer.load(tmp_path)
    assert words in str(caught.value)


def test_a_template_file_that_is_no_text(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"chat_template\.jinja is not UTF-8"):
        Tokenizer.load(tmp_path)


def _word_piece():
    vocab = {"[UNK]": 0, "[CLS]": 1, "hello": 2, "wor": 3, "##ld": 4, "!": 5}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def _sentence_piece():
    """As Llama's: BPE with byte fallback, the space written as U+2581."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {
        piece: 256 + i for i, piece in enumerate(["▁", "h", "e", "l", "o", "he", "ll", "hell", "▁hell", "▁hello"])
    }
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("▁", "hell"), ("▁hell", "o")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return backend


@pytest.mark.parametrize("make", [_word_piece, _sentence_piece])
def test_we_read_what_transformers_writes(make, tmp_path):
    theirs = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="<end>", pad_token="<pad>")
    theirs.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    theirs.chat_template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}{{ eos_token }}"
    theirs(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves such settings in the file
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    for text in ("Hello hello world!", "hello 数<turn> hello<end>", ""):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        stream = StreamDecoder(ours, skip_special_tokens=False)
        assert "".join([*map(stream.add, ids), stream.flush()]) == theirs.decode(ids)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (None, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    messages = [{"role": "user", "content": "hello"}]
    assert ours.apply_chat_template(Conversation(messages)) == theirs.apply_chat_template(messages, tokenize=False)
