"""Every kind of source, whole and damaged: each record becomes a document or a counted reject."""

import datetime
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from cpm_jax.curation import readers
from cpm_jax.curation.document import Document
from cpm_jax.curation.readers import Damage, Reading, plan_shards, read_shard
from cpm_jax.data.sources import Reject
from tests.curation.web_pages import MATH_PAGE, PROSE, gzipped, page, warc_record, wet_record
from tests.data.test_sources_tfds import TEXTS, TinyTexts


def read(source, **reading):
    shards, rejects = plan_shards([str(source)])
    return [*rejects, *(item for shard in shards for item in read_shard(shard, Reading(**reading)))]


def documents(source, **reading):
    return [item for item in read(source, **reading) if isinstance(item, Document)]


def rejects(source, **reading):
    return [(item.reason, item.id) for item in read(source, **reading) if isinstance(item, Reject)]


def test_jsonl_keeps_every_field_under_its_name(tmp_path):
    row = {
        "text": "some text",
        "id": "a-1",
        "url": "http://e.org",
        "language": "en",
        "language_score": 0.75,
        "dump": "CC-MAIN-2024-10",
        "token_count": 7,
        "meta": {"license": "CC0"},
        "nothing": None,
    }
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(row) + "\n" + '{"text": "bare"}\n').encode()))
    full, bare = documents(path)
    assert full == Document(
        text="some text",
        id="a-1",
        source=str(path),
        url="http://e.org",
        language="en",
        metadata={"dump": "CC-MAIN-2024-10", "token_count": 7, "meta": {"license": "CC0"}},
        scores={"language_score": 0.75},
    )
    assert bare == Document("bare", "a.jsonl.gz:2", str(path))


def test_parquet_with_the_columns_of_fineweb(tmp_path):
    table = pyarrow.table(
        {
            "text": ["one", "two"],
            "id": ["<urn:1>", "<urn:2>"],
            "dump": ["D", "D"],
            "url": ["u1", "u2"],
            "date": [datetime.datetime(2024, 1, 2), None],
            "file_path": ["f", "f"],
            "language": ["en", "en"],
            "language_score": [0.9, 0.8],
            "token_count": [3, 4],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "000.parquet")
    one, two = documents(tmp_path)
    assert (one.id, one.url, one.language, one.scores) == ("<urn:1>", "u1", "en", {"language_score": 0.9})
    assert one.metadata == {"dump": "D", "date": "2024-01-02 00:00:00", "file_path": "f", "token_count": 3}
    assert two.metadata == {"dump": "D", "file_path": "f", "token_count": 4}


def test_bad_records_are_counted_with_their_place(tmp_path):
    lines = [
        b'{"text": "good"}',
        b"{broken",
        b'{"content": "another field"}',
        b'{"text": ""}',
        b'{"text": null}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"[1]",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    assert rejects(tmp_path / "a.jsonl") == [
        ("malformed JSON", "a.jsonl:2"),
        ("missing field", "a.jsonl:3"),
        ("empty text", "a.jsonl:4"),
        ("field is not text", "a.jsonl:5"),
        ("invalid UTF-8", "a.jsonl:6"),
        ("invalid unicode", "a.jsonl:7"),
        ("not a JSON object", "a.jsonl:8"),
    ]
    assert [document.text for document in documents(tmp_path / "a.jsonl", text_field="content")] == ["another field"]


def test_a_text_that_is_too_long_is_a_reject(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_TEXT_BYTES", 100)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 101}) + "\n" + json.dumps({"text": "x" * 100}))
    (tmp_path / "b.txt").write_text("x" * 101)
    (tmp_path / "c.txt").write_text("x" * 100)
    assert rejects(tmp_path) == [("text too long", "a.jsonl:1"), ("text too long", "b.txt")]
    assert [document.id for document in documents(tmp_path)] == ["a.jsonl:2", "c.txt"]


def test_warc_pages_with_their_address_and_date(tmp_path):
    records = [
        warc_record("http://e.org/1", MATH_PAGE.encode()),
        warc_record(
            "http://e.org/2",
            page("灯塔的看守人每天晚上都记下天气。" * 9).encode("gb18030"),
            content_type="text/html; charset=gb18030",
        ),
        warc_record("http://e.org/3", b"\x89PNG", content_type="image/png"),
        warc_record("http://e.org/4", page(PROSE).encode(), status=404),
        warc_record("http://e.org/5", b"<html></html>"),
    ]
    (tmp_path / "a.warc.gz").write_bytes(gzipped(records))
    one, two = documents(tmp_path)
    assert (one.id, one.url) == ("00000001", "http://e.org/1")
    assert one.metadata == {"date": "2024-01-02T03:04:05Z", "file_path": "a.warc.gz"}
    assert "    return x\n\nprint" in one.text
    assert "灯塔的看守人每天晚上都记下天气。" in two.text
    assert rejects(tmp_path) == [("not a page", "00000003"), ("not a page", "00000004"), ("empty text", "00000005")]


def test_wet_texts(tmp_path):
    (tmp_path / "a.warc.wet").write_bytes(wet_record("http://e.org/1", PROSE) + wet_record("http://e.org/2", " \n"))
    assert [(document.id, document.text) for document in documents(tmp_path)] == [("00000001", PROSE)]
    assert rejects(tmp_path) == [("empty text", "00000002")]


def streamed(data: bytes) -> bytes:
    """zstd as programs write it that do not know the size beforehand, a frame for each half and one to be skipped."""
    halves = data[: len(data) // 2], data[len(data) // 2 :]
    written = io.BytesIO()
    for half in halves:
        with zstandard.ZstdCompressor(write_checksum=True).stream_writer(written, closefd=False) as writer:
            writer.write(half)
    skipped = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"meta"
    return written.getvalue() + skipped


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.warc", b"".join(warc_record(f"http://e.org/{n}", page(PROSE).encode()) for n in range(2))),
        ("a.warc.gz", gzipped([warc_record(f"http://e.org/{n}", page(PROSE).encode()) for n in range(2)])),
        (
            "a.warc.zst",
            b"".join(zstandard.compress(warc_record(f"http://e.org/{n}", page(PROSE).encode())) for n in range(2)),
        ),
        ("a.warc.wet.gz", gzipped([wet_record(f"http://e.org/{n}", PROSE) for n in range(2)])),
        ("a.wet.gz", gzipped([wet_record(f"http://e.org/{n}", PROSE) for n in range(2)])),
        ("a.wet.zst", b"".join(zstandard.compress(wet_record(f"http://e.org/{n}", PROSE)) for n in range(2))),
        ("a.jsonl", 2 * (json.dumps({"text": PROSE}) + "\n").encode()),
        ("a.jsonl.zst", streamed(2 * (json.dumps({"text": PROSE}) + "\n").encode())),
        ("a.xhtml", f'<?xml version="1.0" encoding="utf-8"?>\n{page(PROSE)}'.encode()),
        ("a.xhtml.gz", gzip.compress(page(PROSE).encode())),
        ("a.html.zst", zstandard.compress(page(PROSE).encode())),
        ("a.htm.zst", streamed(page(PROSE).encode())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_format_that_is_named_is_read(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    texts = [document.text for document in documents(tmp_path)]
    assert texts == [PROSE] * (1 if "htm" in name else 2)
    assert rejects(tmp_path) == []


def test_a_folder_of_pages_and_texts(tmp_path):
    (tmp_path / "a.html").write_text(page(PROSE))
    (tmp_path / "b.htm.gz").write_bytes(gzip.compress(page(PROSE).encode()))
    (tmp_path / "c.txt").write_text("plain")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "e.html.gz").write_bytes(gzip.compress(page(PROSE).encode())[:-20])
    assert [(document.id, document.text) for document in documents(tmp_path)] == [
        ("a.html", PROSE),
        ("b.htm.gz", PROSE),
        ("c.txt", "plain"),
    ]
    # A damaged page is one document that is not there, so the shard goes on.
    assert rejects(tmp_path) == [("invalid UTF-8", "d.txt"), ("truncated", "e.html.gz")]


def test_tfds_examples_keep_their_features(tmp_path):
    TinyTexts(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    found = documents("tfds:tiny_texts:test", tfds_data_dir=str(tmp_path))
    # TFDS shuffles what it prepares.
    assert {document.text: document.metadata for document in found} == {
        text: {"label": label} for label, text in enumerate(TEXTS[4:])
    }
    assert found[0].id == "tiny_texts:test:1"
    (shard,), _ = plan_shards(["tfds:tiny_texts:test"])
    assert shard.name == "tfds:tiny_texts:test"


ROWS = "".join(json.dumps({"text": f"text number {number} " * 20}) + "\n" for number in range(50)).encode()
ARCHIVE = [warc_record(f"http://e.org/{number}", page(PROSE * 3).encode()) for number in range(3)]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(ROWS)[:-30]),
        ("a.jsonl.zst", zstandard.compress(ROWS)[:-3]),
        ("a.warc.gz", gzipped(ARCHIVE)[:-30]),
        ("a.warc", b"".join(ARCHIVE)[:-300]),
        ("b.warc", b"no archive at all " * 100),
        ("a.parquet", b"PAR1 no footer"),
        ("a.array_record", b"no index"),
    ],
)
def test_a_damaged_file_of_many_documents_is_named_and_not_used_in_part(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Damage) as caught:
        read(tmp_path)
    assert caught.value.reject.id.startswith(name)
    assert caught.value.reject.source == str(tmp_path)


def test_shards_are_single_files_or_groups_of_small_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "GROUP_BYTES", 10)
    for name in ("a.txt", "b.txt", "c.txt", "e.txt"):
        (tmp_path / name).write_text("12345")
    (tmp_path / "d.jsonl").write_text('{"text": "x"}')
    (tmp_path / ".hidden").write_text("x")
    shards, found = plan_shards([str(tmp_path), str(tmp_path / "a.txt")])
    assert [[name for _, name in shard.files] for shard in shards] == [
        ["a.txt", "b.txt"],
        ["c.txt"],
        ["d.jsonl"],
        ["e.txt"],
        ["a.txt"],
    ]
    assert [shard.index for shard in shards] == [0, 1, 2, 3, 4]
    assert [reject.reason for reject in found] == ["hidden"]
