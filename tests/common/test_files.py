import hashlib
import json
import stat

import pytest

from cpm_jax.common import files


def test_write_text_replaces_and_makes_folders(tmp_path):
    path = tmp_path / "a" / "b.txt"
    files.write_text(path, "one\r\n")
    files.write_text(path, "zwölf 模型\n")
    assert path.read_bytes() == "zwölf 模型\n".encode()
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "x" * 100_000 + "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_write_json(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": 1, "a": "模"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1, "a": "模"}


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_published_folder_takes_the_place_of_a_link(tmp_path):
    """What the link led to stays, and nothing is left over that stops the next one."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/old").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    for text in ("new", "newer"):
        (tmp_path / "partial").mkdir()
        (tmp_path / "partial/file").write_text(text)
        files.publish_folder(tmp_path / "partial", tmp_path / "out")
        assert (tmp_path / "out/file").read_text() == text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
    assert (tmp_path / "elsewhere/old").read_text() == "old"


def test_a_folder_that_cannot_be_published_leaves_the_old_one(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("old")
    partial = tmp_path / "partial"
    partial.mkdir()

    class Unwilling(type(partial)):
        def rename(self, target):
            raise OSError("no")

    with pytest.raises(OSError, match="no"):
        files.publish_folder(Unwilling(partial), tmp_path / "out")
    assert (tmp_path / "out/file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "partial"]
