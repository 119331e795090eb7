"""What is written comes back: through our readers, through `datasets`, and not at all after an error."""

import json

import datasets
import pyarrow.parquet
import pytest

from cpm_jax.curation.document import Document
from cpm_jax.curation.readers import Reading, plan_shards, read_shard
from cpm_jax.curation.writers import _TEXT_COLUMNS, MAX_FIELDS, Columns, dump, load_dump, shard_writer, write_documents
from cpm_jax.data.errors import DataError

DOCUMENTS = [
    Document(
        "naïve\n\n数据 🙂",
        "1",
        "here",
        "http://e.org",
        "en",
        {"dump": "D", "token_count": 3, "tags": ["a", "b"], "odd": 1, "text": "taken"},
        {"language_score": 0.5, "quality_score": 2.0},
    ),
    Document("bare", "2", "there", metadata={"odd": "one"}),
]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_a_shard_is_read_back_by_our_readers_and_by_datasets(tmp_path, name):
    write_documents(tmp_path / name, DOCUMENTS)
    (shard,), _ = plan_shards([str(tmp_path / name)])
    first, second = read_shard(shard, Reading())
    assert (first.text, first.id, first.source, first.url, first.language) == (
        "naïve\n\n数据 🙂",
        "1",
        "here",
        "http://e.org",
        "en",
    )
    assert first.scores == {"language_score": 0.5, "quality_score": 2.0}
    assert first.metadata["dump"] == "D"
    assert first.metadata["metadata"] == '{"odd": 1, "tags": ["a", "b"], "text": "taken"}'
    assert (second.text, second.scores, second.metadata["metadata"]) == ("bare", {}, '{"odd": "one"}')
    kind = "parquet" if name.endswith("parquet") else "json"
    table = datasets.load_dataset(kind, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "c"))
    assert table["text"][:] == [document.text for document in DOCUMENTS]
    assert table["language_score"][:] == [0.5, None]


def test_columns_do_not_depend_on_the_order_of_documents_or_parts():
    whole, reverse, merged = Columns.of(DOCUMENTS), Columns.of(DOCUMENTS[::-1]), Columns.of(DOCUMENTS[1:])
    merged.merge(Columns.of(DOCUMENTS[:1]))
    assert whole.fields == {"dump": "text", "odd": "mixed", "tags": "mixed", "text": "mixed", "token_count": "integer"}
    for other in (reverse, merged):
        assert (other.scores, other.fields) == (whole.scores, whole.fields)


def test_more_fields_than_columns_may_be_all_go_into_one(tmp_path):
    documents = [Document("x", str(n), metadata={f"https://e.org/{n}": "seen", "dump": "D"}) for n in range(MAX_FIELDS)]
    whole, merged = Columns.of(documents), Columns.of(documents[50:])
    assert len(Columns.of(documents[1:]).fields) == MAX_FIELDS
    merged.merge(Columns.of(documents[:50]))
    assert whole.fields is merged.fields is None
    merged.merge(Columns.of(documents[:1]))
    assert Columns(merged.scores, merged.fields).fields is None
    write_documents(tmp_path / "a.parquet", documents)
    assert pyarrow.parquet.read_schema(tmp_path / "a.parquet").names == [*_TEXT_COLUMNS, "metadata"]
    (shard,), _ = plan_shards([str(tmp_path / "a.parquet")])
    rows = [json.loads(document.metadata["metadata"]) for document in read_shard(shard, Reading())]
    assert rows == [dict(document.metadata) for document in documents]


def test_long_documents_make_small_groups_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("cpm_jax.curation.writers._CHARACTERS_PER_GROUP", 100)
    write_documents(tmp_path / "a.parquet", [Document("x" * 60, str(number)) for number in range(5)])
    with pyarrow.parquet.ParquetFile(tmp_path / "a.parquet") as file:
        assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [2, 2, 1]


def test_a_shard_that_fails_leaves_nothing_behind(tmp_path):
    def fail():
        with shard_writer(tmp_path / "a.jsonl.zst") as writer:
            writer.write({"text": "half"})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_dumps_hold_all_of_a_document(tmp_path):
    documents = [*DOCUMENTS, DOCUMENTS[1].drop("too short")]
    with shard_writer(tmp_path / "a.jsonl.zst") as writer:
        for document in documents:
            writer.write(dump(document))
    assert list(load_dump(tmp_path / "a.jsonl.zst")) == documents


def test_a_row_that_is_longer_than_any_written_here_is_named(tmp_path, monkeypatch):
    with shard_writer(tmp_path / "a.jsonl.zst") as writer:
        for text in ("short", "x" * 500):
            writer.write(dump(Document(text, "1")))
    monkeypatch.setattr("cpm_jax.data.streams.MAX_LINE_BYTES", 300)
    with pytest.raises(DataError, match=r"a.jsonl.zst: row 2 has \d+ bytes; accepted are at most"):
        list(load_dump(tmp_path / "a.jsonl.zst"))


def test_long_metadata_makes_small_groups_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("cpm_jax.curation.writers._CHARACTERS_PER_GROUP", 100)
    documents = [Document("x", str(number), metadata={"page": "y" * 60}) for number in range(5)]
    write_documents(tmp_path / "a.parquet", documents)
    with pyarrow.parquet.ParquetFile(tmp_path / "a.parquet") as file:
        assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [2, 2, 1]
