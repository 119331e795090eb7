"""The dataset folder: what is in it, and that neither workers nor kills change a byte of it."""

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader

from cpm_jax.data.manifest import Manifest
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.data.records import decode_record
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
