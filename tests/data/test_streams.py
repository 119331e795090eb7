"""Lines of byte streams: whole, too long, and cut off."""

import pytest

from cpm_jax.data import streams
from cpm_jax.data.sources import Document, Reject, read_documents


def test_lines_do_not_depend_on_where_chunks_end():
    data = b"one\n\ntwo two\nlast"
    for size in range(1, len(data) + 1):
        chunks = [data[start : start + size] for start in range(0, len(data), size)]
        assert list(streams.split_lines(chunks)) == [b"one", b"", b"two two", b"last"]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_line_that_is_too_long_is_counted_and_not_held(monkeypatch, size):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 10)
    data = b"ok\n" + b"x" * 35 + b"\nfine\n" + b"y" * 11
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    assert list(streams.split_lines(chunks)) == [b"ok", 35, b"fine", 11]


def test_such_a_line_is_one_reject_of_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 1 << 20)
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + b'{"text": "' + b"x" * (3 << 20) + b'"}\n' + good)
    found = list(read_documents(str(tmp_path / "a.jsonl")))
    assert [item.id for item in found if isinstance(item, Document)] == ["a.jsonl:1", "a.jsonl:3"]
    (reject,) = [item for item in found if isinstance(item, Reject)]
    assert (reject.reason, reject.id) == ("line too long", "a.jsonl:2")
    assert f"{(3 << 20) + 12} bytes" in reject.detail
