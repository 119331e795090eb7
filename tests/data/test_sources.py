"""Every kind of source, whole and damaged: nothing vanishes, nothing crashes."""

import gzip
import json
import os
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from cpm_jax.data.errors import DataError
from cpm_jax.data.sources import Document, Reject, estimate_bytes, read_documents

TEXTS = ["plain", "naïve — 数据 🙂", "two\nlines", '"quoted"']


def texts(source, **options):
    return [item.text for item in read_documents(str(source), **options) if isinstance(item, Document)]


def rejects(source, **options):
    return [(item.reason, item.id) for item in read_documents(str(source), **options) if isinstance(item, Reject)]


def as_jsonl(values):
    return "".join(json.dumps({"text": value, "url": "x"}) + "\n" for value in values).encode()


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", lambda data: data),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_jsonl(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(as_jsonl(TEXTS)))
    items = list(read_documents(str(tmp_path / name)))
    assert [item.text for item in items] == TEXTS
    assert [item.id for item in items] == [f"{name}:{line}" for line in (1, 2, 3, 4)]
    # Members and frames may be chained, as parallel compressors write them.
    (tmp_path / name).write_bytes(pack(as_jsonl(TEXTS)) + pack(as_jsonl(TEXTS)))
    assert texts(tmp_path / name) == TEXTS * 2


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("c4-train.00000-of-01024.json", lambda data: data),
        ("c4-train.00000-of-01024.json.gz", gzip.compress),
        ("dolma.json.zst", zstandard.ZstdCompressor().compress),
        ("a.ndjson", lambda data: data),
        ("A.JSONL.GZ", gzip.compress),
        ("A.Json.Gz", gzip.compress),
    ],
)
def test_json_lines_under_other_names(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(b"\n" + as_jsonl(TEXTS) + b"{broken\n"))
    assert texts(tmp_path / name) == TEXTS
    assert rejects(tmp_path / name) == [("malformed JSON", f"{name}:6")]


def test_suffixes_of_tables_in_upper_case(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "A.PARQUET")
    write_array_record(tmp_path / "B.Array_Record", [text.encode() for text in TEXTS])
    assert texts(tmp_path) == TEXTS * 2


@pytest.mark.parametrize("text", ['{\n  "text": "a"\n}', '[{"text": "a"}]', "17", "{broken", '"text"'])
def test_a_json_document_is_one_reject_that_says_what_is_accepted(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    (reject,) = read_documents(str(tmp_path / "a.json"))
    assert (reject.reason, reject.id) == ("not JSON lines", "a.json")
    assert "accepted are .json files of one JSON object per line" in reject.detail


def test_a_home_folder_that_the_shell_left_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "my texts").mkdir()
    (tmp_path / "my texts" / "a.txt").write_text("plain")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/my texts") == texts("~/my*/*.txt") == ["plain"]
    assert [item.source for item in read_documents("~/my texts")] == ["~/my texts"]


def test_bad_lines_are_named(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b'{"txt": "other field"}',
        b'{"text": 5}',
        b'["text"]',
        b'{"text": "\xff"}',
        b"",
        b"[" * 100_000,
        b'{"text": "\\u0000 is legal JSON"}',
        b'{"text": "no line end"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert texts(path) == ["good", "\0 is legal JSON", "no line end"]
    assert rejects(path) == [
        ("malformed JSON", "a.jsonl:2"),
        ("missing field", "a.jsonl:3"),
        ("field is not text", "a.jsonl:4"),
        ("not a JSON object", "a.jsonl:5"),
        ("invalid UTF-8", "a.jsonl:6"),
        ("malformed JSON", "a.jsonl:8"),
    ]
    assert texts(path, text_field="txt") == ["other field"]


@pytest.mark.parametrize(
    ("suffix", "pack"), [("gz", gzip.compress), ("zst", zstandard.ZstdCompressor(write_checksum=True).compress)]
)
def test_truncated_stream_yields_what_is_before_the_cut(tmp_path, suffix, pack):
    rng = np.random.default_rng(0)
    values = [rng.bytes(60).hex() for _ in range(5000)]
    packed = pack(as_jsonl(values))
    path = tmp_path / f"a.jsonl.{suffix}"
    for size in (1, len(packed) // 3, len(packed) - 1):
        path.write_bytes(packed[:size])
        found = texts(path)
        assert found == values[: len(found)]
        assert rejects(path) == [("truncated", f"a.jsonl.{suffix}:{len(found) + 1}")]
    assert len(found) > 4000
    damaged = bytearray(packed)
    damaged[len(packed) // 2 : len(packed) // 2 + 30] = bytes(30)
    path.write_bytes(damaged)
    assert "truncated" in [reason for reason, _ in rejects(path)]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [*TEXTS, None], "other": list(range(5))})
    pyarrow.parquet.write_table(table, path)
    assert texts(path) == TEXTS
    assert rejects(path) == [("field is not text", "a.parquet:5")]
    assert rejects(path, text_field="content") == [("missing field", "a.parquet")]
    path.write_bytes(path.read_bytes()[:-20])
    assert rejects(path) == [("truncated", "a.parquet:1")]


def test_parquet_with_a_damaged_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    rng = np.random.default_rng(0)
    values = [rng.bytes(100).hex() for _ in range(2000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, row_group_size=500, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) * 5 // 8 : len(data) * 5 // 8 + 2000] = bytes(2000)
    path.write_bytes(data)
    found = texts(path)
    assert found == values[: len(found)]
    assert len(found) >= 500
    assert rejects(path) == [("truncated", f"a.parquet:{len(found) + 1}")]


def test_array_record(tmp_path):
    path = tmp_path / "a.array_record"
    write_array_record(path, [b"raw text", '{"text": "naïve"}'.encode(), b"{ not JSON }", b"\xff\xfe", b"a\0b"])
    assert texts(path) == ["raw text", "naïve", "{ not JSON }"]
    assert rejects(path) == [("invalid UTF-8", "a.array_record:4"), ("binary content", "a.array_record:5")]


def test_damaged_array_record(tmp_path):
    path = tmp_path / "a.array_record"
    rng = np.random.default_rng(0)
    values = [rng.bytes(500).hex() for _ in range(1000)]
    write_array_record(path, [value.encode() for value in values])
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        assert rejects(path) == [("truncated", "a.array_record:1")]
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 10] = b"0123456789"
    path.write_bytes(damaged)
    found = texts(path)
    assert set(found) < set(values)
    assert 0 < len(rejects(path)) == len(values) - len(found) < 5


def make_tree(root):
    for name, data in {
        "b/notes.md": b"# notes",
        "a.py": b"x = 1\n",
        "bom.txt": b"\xef\xbb\xbfwith a mark",
        "empty.txt": b"",
        "image.png": b"\x89PNG\0\0",
        "latin.txt": b"\xe9t\xe9",
        ".hidden": b"secret",
        ".git/config": b"secret",
        "z.jsonl": as_jsonl(["from jsonl"]),
        "notes.txt.gz": gzip.compress(b"packed notes"),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    os.symlink(root / "b", root / "link")
    os.symlink(root / "nowhere", root / "broken.txt")


def test_folder(tmp_path):
    make_tree(tmp_path)
    # Empty text is a document here; the corpus sets it aside after cleaning.
    assert texts(tmp_path) == ["x = 1\n", "with a mark", "", "packed notes", "from jsonl", "# notes"]
    assert sorted(rejects(tmp_path)) == [
        ("binary content", "image.png"),
        ("cannot be read", "broken.txt"),
        ("hidden", ".git"),
        ("hidden", ".hidden"),
        ("invalid UTF-8", "latin.txt"),
        ("link to a folder", "link"),
    ]
    assert texts(tmp_path, extensions=(".py", ".md")) == ["x = 1\n", "# notes"]
    assert ("other extension", "latin.txt") in rejects(tmp_path, extensions=(".py", ".md"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.array_record"])
def test_files_that_cannot_be_opened(tmp_path, name):
    os.symlink(tmp_path / "nowhere", tmp_path / name)
    assert rejects(tmp_path) == [("cannot be read", name)]


def test_file_names_that_are_not_utf8(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"\xe9t\xe9.txt"), "w") as file:
        file.write("text")
    (item,) = read_documents(str(tmp_path))
    assert isinstance(item, Document)
    item.id.encode()


def test_ids_do_not_depend_on_where_a_source_lies(tmp_path):
    make_tree(tmp_path / "one")
    make_tree(tmp_path / "elsewhere/two")
    ids = [[item.id for item in read_documents(str(tmp_path / place))] for place in ("one", "elsewhere/two")]
    assert ids[0] == ids[1]


def test_a_folder_by_a_relative_name(tmp_path, monkeypatch):
    (tmp_path / "text" / "more").mkdir(parents=True)
    for name in ("a.txt", "more/b.txt"):
        (tmp_path / "text" / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    found = list(read_documents("text"))
    assert [(document.id, document.text) for document in found] == [("a.txt", "a.txt"), ("more/b.txt", "more/b.txt")]


def test_glob(tmp_path):
    make_tree(tmp_path)
    assert texts(tmp_path / "**/*.py") == ["x = 1\n"]
    assert texts(tmp_path / "b/*") == ["# notes"]


def test_missing_sources_are_named(tmp_path):
    for source in (tmp_path / "nowhere", tmp_path / "*.nothing"):
        with pytest.raises(DataError, match=r"does not exist; accepted: a folder.*stdlib"):
            list(read_documents(str(source)))


def test_missing_package_is_named(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[data\]'"):
        list(read_documents(str(tmp_path / "a.parquet")))


def test_stdlib():
    documents = list(read_documents("stdlib"))
    by_id = {item.id: item for item in documents if isinstance(item, Document)}
    assert "argparse.py" in by_id
    assert "json/decoder.py" in by_id
    assert by_id["argparse.py"].text.startswith("# Author: Steven J. Bethard")
    assert not any(part in {"test", "tests", "site-packages"} for name in by_id for part in name.split("/"))
    assert len(by_id) > 300
    total = sum(len(item.text.encode()) for item in by_id.values())
    assert estimate_bytes("stdlib") == pytest.approx(total, rel=0.01)


def test_estimate_bytes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"12345")
    assert estimate_bytes(str(tmp_path)) == estimate_bytes(str(tmp_path / "a.txt")) == 5
    (tmp_path / "b.txt.gz").write_bytes(b"")
    assert estimate_bytes(str(tmp_path)) is None


def test_conversations(tmp_path):
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "hi"}]
    path.write_text(
        json.dumps({"messages": messages, "tools": None, "id": 7}) + "\n" + json.dumps({"text": "no chat"}) + "\n"
    )
    assert [json.loads(text) for text in texts(path, format="chat")] == [{"messages": messages}]
    assert rejects(path, format="chat") == [("missing field", "a.jsonl:2")]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [messages], "id": [7]}), tmp_path / "a.parquet")
    assert [json.loads(text) for text in texts(tmp_path / "a.parquet", format="chat")] == [{"messages": messages}]
