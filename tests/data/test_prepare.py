"""The dataset folder: what is in it, and that neither workers nor kills change a byte of it."""

import asyncio
import email
import importlib
import json
import os
import xml

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from cpm_jax.common.config import ConfigError
from cpm_jax.data.corpus import clean_text
from cpm_jax.data.errors import DataError
from cpm_jax.data.manifest import Manifest
from cpm_jax.data.prepare import PROGRESS_DIR, PrepareConfig, prepare
from cpm_jax.data.records import decode_record
from cpm_jax.data.sources import Document, read_documents
from cpm_jax.data.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path):
    """Forty small files, of which two are equal."""
    rng = np.random.default_rng(0)
    words = ["def", "return", "naïve", "数据", "for", "in", "range", "\n", "  ", "x", "=", "12"]
    root = tmp_path / "texts"
    for number in range(40):
        path = root / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {number} " + " ".join(rng.choice(words, 300)))
    (root / "copy.txt").write_bytes((root / "part0/0.txt").read_bytes())
    return root


def read_stream(output_dir, split):
    """The tokens of a split: records joined, less the token that each shares with the one before."""
    stream = []
    for path in Manifest.load(output_dir).shard_paths(output_dir, split):
        reader = ArrayRecordReader(path)
        for index in range(reader.num_records()):
            tokens = decode_record(reader.read([index])[0]).tokens
            stream += tokens.tolist() if index == 0 else tokens[1:].tolist()
    return stream


def test_all_text_is_in_the_shards(folder, tmp_path):
    config = PrepareConfig(
        sources=str(folder), seq_len=64, vocab_size=300, validation_fraction=0.2, num_workers=0, shard_bytes=20000
    )
    manifest = prepare(config, tmp_path / "out", progress=False)
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer")
    texts = {path.read_text() for path in folder.rglob("*.txt")}
    found = {}
    for split in ("train", "validation"):
        text = tokenizer.decode(read_stream(tmp_path / "out", split))
        documents = text.split("</s>")
        assert documents.pop() == ""
        found[split] = {document.removeprefix("<s>") for document in documents}
        assert len(found[split]) == manifest.splits[split].documents
    assert found["train"] | found["validation"] == texts
    assert not found["train"] & found["validation"]
    assert manifest.duplicates == 1
    manifest.verify(tmp_path / "out")


def settings(folder, **changes):
    options = {"sources": str(folder), "seq_len": 64, "vocab_size": 300, "validation_fraction": 0.2, "num_workers": 0}
    return PrepareConfig(**options | changes)


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def rejects_in(output_dir):
    lines = (output_dir / "rejects.jsonl").read_text().splitlines()
    return [(line["reason"], line["id"]) for line in map(json.loads, lines)]


def test_a_second_call_does_nothing(folder, tmp_path):
    out = tmp_path / "out"
    first = prepare(settings(folder), out, progress=False)
    before = snapshot(out)
    assert prepare(settings(folder, num_workers=2), out, progress=False) == first
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("seq_len", 65), ("vocab_size", 301), ("seed", 1), ("validation_fraction", 0.1), ("extensions", (".txt",))],
)
def test_other_arguments_are_named(folder, tmp_path, name, value):
    out = tmp_path / "out"
    prepare(settings(folder), out, progress=False)
    with pytest.raises(DataError, match=f"was made with {name} = .*, now {name} = "):
        prepare(settings(folder, **{name: value}), out, progress=False)
    (out / "manifest.json").unlink()
    (out / PROGRESS_DIR).mkdir()
    (out / PROGRESS_DIR / "arguments.json").write_text(json.dumps(settings(folder).arguments()))
    with pytest.raises(DataError, match=f"was made with {name} = .*, now {name} = "):
        prepare(settings(folder, **{name: value}), out, progress=False)


def test_a_tokenizer_is_given(folder, tmp_path):
    Tokenizer.train(["some text"], 280).save(tmp_path / "mine")
    config = settings(folder, tokenizer=str(tmp_path / "mine"), vocab_size=None)
    manifest = prepare(config, tmp_path / "out", progress=False)
    given = Tokenizer.load(tmp_path / "mine")
    assert (manifest.tokenizer_sha256, manifest.vocab_size) == (given.sha256, given.vocab_size)
    assert Tokenizer.load(tmp_path / "out/tokenizer").sha256 == given.sha256
    with pytest.raises(DataError, match=r"has \d+ tokens, more than vocab_size 100"):
        prepare(settings(folder, tokenizer=str(tmp_path / "mine"), vocab_size=100), tmp_path / "other", progress=False)
    Tokenizer.train(["other text"], 262).save(tmp_path / "mine")
    with pytest.raises(DataError, match="was made with tokenizer_sha256"):
        prepare(config, tmp_path / "out", progress=False)


def test_cleaning_and_rejects(tmp_path):
    lines = [
        {"text": "one\r\ntwo\rthree\u2028four\u0000five"},
        {"text": "one\ntwo\nthree\nfourfive"},  # the same after cleaning
        {"text": " \n\t "},
        {"text": "lone \ud800 surrogate"},
        {"text": "another"},
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + '\n{"text": "cut\n')
    out = tmp_path / "out"
    manifest = prepare(settings(source, validation_fraction=0.0), out, progress=False)
    text = Tokenizer.load(out / "tokenizer").decode(read_stream(out, "train"))
    assert text == "<s>one\ntwo\nthree\nfourfive</s><s>another</s>"
    assert manifest.duplicates == 1
    assert manifest.rejects == {"empty text": 1, "invalid unicode": 1, "malformed JSON": 1}
    assert rejects_in(out) == [
        ("empty text", "a.jsonl:3"),
        ("invalid unicode", "a.jsonl:4"),
        ("malformed JSON", "a.jsonl:6"),
    ]
    assert manifest.sources == {str(source): 2}
    assert list(manifest.splits) == ["train"]
    assert manifest.splits["train"].text_bytes == len("one\ntwo\nthree\nfourfive") + len("another")


def test_a_small_corpus_still_has_a_validation_split(tmp_path):
    for number in range(5):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text number {number}")
    config = settings(tmp_path / "texts", validation_fraction=0.0001)
    manifest = prepare(config, tmp_path / "out", progress=False)
    assert (manifest.splits["train"].documents, manifest.splits["validation"].documents) == (4, 1)


def test_reading_ends_at_the_limit_and_the_manifest_says_so(folder, tmp_path):
    whole = prepare(settings(folder), tmp_path / "whole", progress=False)
    total = sum(split.text_bytes for split in whole.splits.values())
    assert whole.complete
    cut = prepare(settings(folder, max_bytes=total // 2), tmp_path / "cut", progress=False)
    assert not cut.complete
    assert not Manifest.load(tmp_path / "cut").complete
    assert 0 < sum(split.text_bytes for split in cut.splits.values()) <= total // 2
    assert sum(cut.sources.values()) < sum(whole.sources.values())
    assert prepare(settings(folder, max_bytes=total), tmp_path / "all", progress=False).complete


def test_ranges_of_lengths_make_datasets_that_share_no_document(folder, tmp_path):
    tokenizer = Tokenizer.train([path.read_text() for path in folder.rglob("*.txt")], 300)
    tokenizer.save(tmp_path / "tokenizer")

    def dataset(name, **ends):
        config = settings(
            folder, tokenizer=str(tmp_path / "tokenizer"), vocab_size=None, validation_fraction=0.0, **ends
        )
        manifest = prepare(config, tmp_path / name, progress=False)
        ends_of = np.flatnonzero(np.array(read_stream(tmp_path / name, "train")) == tokenizer.eos_id)
        return manifest, np.diff(ends_of, prepend=-1).tolist()

    _, every = dataset("every")
    middle = int(np.median(every))
    short, long = dataset("short", max_tokens=middle), dataset("long", min_tokens=middle + 1)
    assert sorted(short[1] + long[1]) == sorted(every)
    assert max(short[1]) <= middle < min(long[1])
    assert short[0].rejects == {f"more than {middle} tokens": len(long[1])}
    with pytest.raises(ConfigError, match=r"PrepareConfig.max_tokens = 5: must be at least 6"):
        settings(folder, min_tokens=6, max_tokens=5)


def test_what_cannot_be_prepared_is_named(tmp_path):
    def refused(match, source, **changes):
        with pytest.raises(DataError, match=match):
            prepare(settings(source, **changes), tmp_path / "out", progress=False)

    (tmp_path / "empty").mkdir()
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary/a.bin").write_bytes(b"\0\1")
    (tmp_path / "one.txt").write_text("the only document")
    refused("nowhere' does not exist; accepted: a folder", tmp_path / "nowhere")
    refused("nowhere' does not exist", "", sources=("stdlib", str(tmp_path / "nowhere")))
    refused(r"no document found in .*empty \(rejected: nothing\); accepted: a folder", tmp_path / "empty")
    refused(r"no document found in .*binary \(rejected: {'binary content': 1}\)", tmp_path / "binary")
    refused("holds only one document, which cannot be split", tmp_path / "one.txt")
    refused("vocab_size 100 is too small", tmp_path / "one.txt", vocab_size=100, validation_fraction=0.0)
    refused("lies inside the source", tmp_path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sources": ()}, "sources"),
        ({"seq_len": 0}, "seq_len"),
        ({"vocab_size": None}, "tokenizer"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"num_workers": -1}, "num_workers"),
        ({"format": "chats"}, "format"),
    ],
)
def test_config_errors_name_the_field(changes, field):
    with pytest.raises(ConfigError) as caught:
        settings("stdlib", **changes)
    assert caught.value.field == f"PrepareConfig.{field}"
    assert f"PrepareConfig.{field}" in str(caught.value)


def test_conversations(tmp_path):
    rng = np.random.default_rng(0)
    records = []
    for number in range(60):
        question = {"role": "user", "content": f"question {number}"}
        answer = {"role": "assistant", "content": "word " * int(rng.integers(1, 40))}
        records.append({"messages": [question, answer]})
    records[5] = {"messages": [{"role": "user", "content": "no answer"}]}
    records[6] = {"messages": "malformed"}
    records[7]["messages"][1]["content"] = "long " * 500
    source = tmp_path / "chat.jsonl"
    source.write_text("\n".join(map(json.dumps, records)))
    config = settings(source, format="chat", seq_len=255, vocab_size=400)
    manifest = prepare(config, tmp_path / "out", progress=False)
    assert manifest.rejects == {"longer than a record": 1, "malformed conversation": 1, "no assistant turn": 1}
    assert sorted(rejects_in(tmp_path / "out")) == [
        ("longer than a record", "chat.jsonl:8"),
        ("malformed conversation", "chat.jsonl:7"),
        ("no assistant turn", "chat.jsonl:6"),
    ]
    tokenizer = Tokenizer.load(tmp_path / "out/tokenizer")
    found, learned = [], []
    for split in ("train", "validation"):
        for path in manifest.shard_paths(tmp_path / "out", split):
            reader = ArrayRecordReader(path)
            for index in range(reader.num_records()):
                record = decode_record(reader.read([index])[0])
                assert len(record.tokens) <= 256
                found += [tokenizer.decode(t) for t in np.split(record.tokens, record.document_starts[1:])]
                learned.append(tokenizer.decode(record.tokens[record.loss_mask]))
    template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    kept = [r["messages"] for i, r in enumerate(records) if i not in (5, 6, 7)]
    assert sorted(found) == sorted(template.format(q["content"], a["content"]) for q, a in kept)
    assert sorted("".join(learned).split("<|im_end|>")[:-1]) == sorted(a["content"] for _, a in kept)
    assert len(learned) < len(kept) / 2
    truncating = settings(source, format="chat", seq_len=255, vocab_size=400, long_conversations="truncate")
    manifest = prepare(truncating, tmp_path / "truncated", progress=False)
    assert manifest.truncated == 1
    assert "longer than a record" not in manifest.rejects


def test_no_file_of_real_text_is_on_both_sides(tmp_path):
    packages = tuple(os.path.dirname(module.__file__) for module in (asyncio, email, importlib, xml))
    config = settings("", sources=packages, seq_len=512, vocab_size=1000, validation_fraction=0.1, extensions=(".py",))
    manifest = prepare(config, tmp_path, progress=False)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    sides = {}
    for split in ("train", "validation"):
        parts = np.split(tokens := np.array(read_stream(tmp_path, split)), np.flatnonzero(tokens == 2) + 1)
        sides[split] = {part.tobytes() for part in parts if len(part)}
        assert len(sides[split]) == manifest.splits[split].documents
        assert len(tokens) == manifest.splits[split].tokens
    assert not sides["train"] & sides["validation"]
    share = manifest.splits["validation"].documents / len(sides["train"] | sides["validation"])
    assert 0.05 < share < 0.15
    items = [item for package in packages for item in read_documents(package, extensions=(".py",))]
    sources = {item.text for item in items if isinstance(item, Document)}
    decoded = {tokenizer.decode(np.frombuffer(part, np.int64)[1:-1]) for side in sides.values() for part in side}
    assert decoded == {clean_text(text) for text in sources if text.strip()}


def test_damage_to_a_dataset_is_noticed(folder, tmp_path):
    out = tmp_path / "out"
    manifest = prepare(settings(folder), out, progress=False)
    path = out / manifest.splits["train"].shards[0].path
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=f"shard {path}: sha256"):
        Manifest.load(out).verify(out)
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"shard {path} has {len(whole) - 1} bytes where the manifest says"):
        Manifest.load(out)
    path.unlink()
    with pytest.raises(DataError, match=f"shard {path} is missing"):
        Manifest.load(out)
    (out / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(DataError, match="version 99"):
        Manifest.load(out)
    (out / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match="is damaged"):
        Manifest.load(out)
    with pytest.raises(DataError, match="is not a prepared dataset"):
        Manifest.load(tmp_path)
    with pytest.raises(DataError, match="has no split 'test'"):
        manifest.shard_paths(out, "test")
