"""Files that are either as they were or wholly rewritten, and their hashes; on any filesystem that has a URL."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from cpm_jax.common.config import InputError
from cpm_jax.common.extras import how_to_install


def as_path(place: str | os.PathLike[str]) -> Path:
    """The file or folder that a path or a URL names: "runs/out", "s3://bucket/out", "hdfs://host/out".

    Returns:
        A `Path`; for a URL an object with the same methods, which `upath` makes for each filesystem of `fsspec`. It is
        no instance of `Path`: that is how the two are told apart.

    Raises:
        InputError: `upath` is not installed, or there is no such filesystem.
    """
    if "://" not in str(place):
        return Path(place)
    try:
        import upath
    except ImportError as error:
        raise InputError(f"upath is needed for {place}: {how_to_install('data')} ({error})") from error
    try:
        path = upath.UPath(place)
        path.fs  # noqa: B018  # looks for the library of this filesystem
    except (ImportError, ValueError) as error:
        raise InputError(f"{place}: {error}") from error
    return cast(Path, path)


def absolute(place: str | os.PathLike[str]) -> str:
    """The same place for processes that work in other folders; a URL is that already."""
    return str(place) if "://" in str(place) else os.path.abspath(place)


@contextlib.contextmanager
def whole_file(path: Path, temporary_dir: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write that gets its name, and so appears, when the block ends well.

    Each call has a temporary file of its own, so several writers may be at the same file at once.

    Args:
        path: the name.
        temporary_dir: where the file lies until then, on the same filesystem; that of the name if None.
    """
    temporary = (temporary_dir or path.parent) / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if isinstance(path, Path):
                os.fsync(file.fileno())
        _rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _rename(temporary: Path, path: Path) -> None:
    if isinstance(path, Path):
        temporary.replace(path)
        return
    # Object stores copy, which overwrites, and is seen whole or not at all; HDFS renames, but to a free name only.
    try:
        temporary.rename(path)
    except OSError:
        path.unlink(missing_ok=True)
        temporary.rename(path)


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it, if it exists."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)


def publish_folder(partial: Path, folder: Path) -> None:
    """Gives a finished folder its name, in place of an earlier one: a reader sees the old one or the new one, whole.

    What is in it is on the disk before it gets the name. Between the two renames a kill leaves neither name;
    `restore_folder` then gives the old one back. A name that is a link no longer is one then; what it led to stays.

    Args:
        partial: the finished folder, on the same filesystem.
        folder: the name.

    Raises:
        OSError: a file cannot be written to the disk, or the name cannot be given; the old folder then has it.
    """
    for path in (*partial.rglob("*"), partial):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    restore_folder(folder)
    _remove(_old(folder))
    if os.path.lexists(folder):
        folder.rename(_old(folder))
    try:
        partial.rename(folder)
    except BaseException:
        restore_folder(folder)
        raise
    _remove(_old(folder))


def restore_folder(folder: Path) -> None:
    """Gives a folder its name back that a kill came upon between the two renames of `publish_folder`."""
    if os.path.lexists(_old(folder)) and not os.path.lexists(folder):
        _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _remove(folder: Path) -> None:
    """Removes a folder, or a link to one, which it leaves."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text atomically: a reader, or a restart after a kill, sees the old file or the new one.

    Missing parent folders are made.

    Raises:
        OSError: if the folder cannot be written or the disk is full; the old file is then untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes private files; others may want to read a run's folder
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes indented JSON atomically, with the keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: str | os.PathLike[str]) -> str:
    """The hex SHA-256 of a file's content.

    Raises:
        OSError: if the file cannot be read.
    """
    with as_path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
