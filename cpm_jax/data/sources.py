"""Reads documents from anything a source string can name, and sets aside what cannot be read."""

import dataclasses
import functools
import glob
import json
import os
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from cpm_jax.common.extras import how_to_install
from cpm_jax.common.files import as_path
from cpm_jax.data.errors import DataError
from cpm_jax.data.streams import MAX_LINE_BYTES, Truncated, file_kind, read_chunks, split_lines

Format = Literal["text", "chat"]

ACCEPTED = (
    "a folder, a text file, .jsonl, .ndjson, .json of one object per line, .parquet or .array_record (.gz and .zst "
    "too, but for the last two), a glob pattern, a URL of one of these, tfds:NAME[/CONFIG][:SPLIT], or stdlib"
)
_CHAT_FIELDS = ("messages", "conversations", "tools")
_COMPRESSED = {".gz", ".zst", ".parquet", ".array_record"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
TFDS = "tfds:"  # begins the source strings of TFDS
_STDLIB_LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document of a corpus.

    Attributes:
        text: its text; for chat, the conversation as a JSON object.
        id: what names it within its source and does not depend on where the source lies: "package/module.py" in a
            folder, "shard.jsonl:17" for line 17 of a file.
        source: the source string it came from.
    """

    text: str
    id: str
    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class Reject:
    """Something that was found but not used.

    Attributes:
        reason: a short class of reasons, by which rejects are counted: "malformed JSON".
        id: as in `Document`.
        source: the source string it came from.
        detail: what exactly was wrong, and where.
    """

    reason: str
    id: str
    source: str
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One record as it was found, before anything is taken out of it.

    Attributes:
        value: a JSON object, a row of a table or an example as a dict; `RawText` where a record is nothing but text.
        id: as in `Document`.
        source: as in `Document`.
    """

    value: Any
    id: str
    source: str


class _Unusable(Exception):
    """Raised while a record is parsed or its text extracted; becomes a `Reject`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class RawText(str):
    """Text that is a whole record, not a field of one."""


def _text_of(record: Any, field: str) -> str:
    if isinstance(record, RawText):
        return str(record)
    if not isinstance(record, dict):
        raise _Unusable("not a JSON object", f"found {type(record).__name__}")
    if field not in record:
        raise _Unusable("missing field", f"no field {field!r} among {sorted(map(str, record))[:20]}")
    text = record[field]
    if isinstance(text, bytes):
        return _decode(text)
    if not isinstance(text, str):
        raise _Unusable("field is not text", f"field {field!r} is {type(text).__name__}")
    return text


def _conversation_of(record: Any) -> str:
    if not isinstance(record, dict):
        raise _Unusable("not a JSON object", f"found {type(record).__name__}")
    if not ("messages" in record or "conversations" in record):
        raise _Unusable("missing field", f"no 'messages' or 'conversations' among {sorted(map(str, record))[:20]}")
    kept = {key: record[key] for key in _CHAT_FIELDS if record.get(key) is not None}
    try:
        return json.dumps(kept, ensure_ascii=False)
    except TypeError as error:
        raise _Unusable("not a JSON object", str(error)) from None


def _decode(data: bytes) -> str:
    if b"\0" in data:
        raise _Unusable("binary content", f"NUL at byte {data.index(0)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Unusable("invalid UTF-8", f"at byte {error.start}: {error.reason}") from None


def _parse_json(line: bytes | int) -> Any:
    if isinstance(line, int):
        raise _Unusable("line too long", f"{line} bytes, more than {MAX_LINE_BYTES}")
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _Unusable("invalid UTF-8", f"at byte {error.start}: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise _Unusable("malformed JSON", str(error)) from None


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Opens files of every kind for one source.

    Attributes:
        source: the source string.
        columns: those of a table to read, of which it must have one; None for all.
    """

    source: str
    columns: tuple[str, ...] | None = None

    def reject(self, reason: str, id: str, detail: str = "") -> Reject:
        return Reject(reason, id, self.source, _printable(detail))

    def one(self, data: Any, id: str, parse: Callable[[Any], Any]) -> Record | Reject:
        """What `parse` makes of data that was read."""
        try:
            return Record(parse(data), id, self.source)
        except _Unusable as error:
            return self.reject(error.reason, id, error.detail)

    def text_file(self, path: Path, name: str) -> Iterator[Record | Reject]:
        try:
            yield self.one(b"".join(read_chunks(path)), name, lambda data: RawText(_decode(data)))
        except Truncated as error:
            yield self.reject("truncated", name, str(error))

    def jsonl(self, path: Path, name: str, *, sure: bool = True) -> Iterator[Record | Reject]:
        """The lines; if it is not `sure` that they are JSON lines, the first one that is not blank decides."""
        number = 0
        try:
            for number, line in enumerate(split_lines(read_chunks(path)), start=1):
                if not isinstance(line, int) and not line.strip():
                    continue
                found = self.one(line, f"{name}:{number}", _parse_json)
                if not sure and not (isinstance(found, Record) and isinstance(found.value, dict)):
                    detail = f"line {number} is no JSON object; accepted are .json files of one JSON object per line"
                    yield self.reject("not JSON lines", name, detail)
                    return
                sure = True
                yield found
        except Truncated as error:
            yield self.reject("truncated", f"{name}:{number + 1}", str(error))

    def parquet(self, path: Path, name: str) -> Iterator[Record | Reject]:
        parquet = _import_extra("pyarrow.parquet")
        number = 0
        try:
            place = path if isinstance(path, Path) else path.open("rb")
            with parquet.ParquetFile(place, page_checksum_verification=True) as file:
                columns = file.schema_arrow.names
                if self.columns is not None:
                    columns = [column for column in self.columns if column in columns]
                if not columns:
                    found = f"no column {' or '.join(self.columns or ())} among {file.schema_arrow.names[:20]}"
                    yield self.reject("missing field", name, f"{found}; {file.metadata.num_rows} rows")
                    return
                for batch in file.iter_batches(batch_size=256, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield Record(row, f"{name}:{number}", self.source)
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            yield self.reject("truncated", f"{name}:{number + 1}", f"parquet: {error}")

    def array_record(self, path: Path, name: str) -> Iterator[Record | Reject]:
        if not isinstance(path, Path):
            with tempfile.TemporaryDirectory() as folder:  # its reader knows local files only
                path.fs.get_file(path.path, f"{folder}/{path.name}")
                yield from self.array_record(Path(folder, path.name), name)
            return
        from array_record.python import array_record_module

        reader = array_record_module.ArrayRecordReader(str(path))
        if not reader.ok():
            # The index of an ArrayRecord file is at its end, so without it no record can be found.
            yield self.reject("truncated", f"{name}:1", "the ArrayRecord footer is missing or damaged")
            return
        for number in range(1, reader.num_records() + 1):
            try:
                (data,) = reader.read([number - 1])
            except (RuntimeError, ValueError) as error:
                yield self.reject("damaged record", f"{name}:{number}", str(error))
            else:
                yield self.one(data, f"{name}:{number}", _array_record_value)
        reader.close()

    def file(self, path: Path, name: str) -> Iterator[Record | Reject]:
        """Any file, by its suffix; an error of the operating system becomes a reject."""
        kind, ending = file_kind(path.name), path.suffix.lower()
        try:
            with path.open("rb"):
                pass  # what the system says of a file that cannot be opened is better than a guess at damage
            if kind in JSON_LINES:
                yield from self.jsonl(path, name, sure=kind != ".json")
            elif ending == ".parquet":
                yield from self.parquet(path, name)
            elif ending == ".array_record":
                yield from self.array_record(path, name)
            else:
                yield from self.text_file(path, name)
        except OSError as error:
            yield self.reject("cannot be read", name, str(error))


def _printable(text: str) -> str:
    """Names of files need not be UTF-8; Python has lone surrogates for such bytes, which no text file can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _raise(error: OSError) -> None:
    raise DataError(f"cannot list a folder: {error}") from error


def _array_record_value(data: bytes) -> Any:
    """Records of ArrayRecord are JSON objects or raw text."""
    if data.lstrip()[:1] == b"{":
        try:
            return _parse_json(data)
        except _Unusable:
            pass
    return RawText(_decode(data))


def _import_extra(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{module} is needed for this source: {how_to_install('data')} ({error})") from error


def _read_tfds(reader: _Reader, name: str, data_dir: str | None) -> Iterator[Record | Reject]:
    tfds = _import_extra("tensorflow_datasets")
    dataset, _, split = name.partition(":")
    split = split or "train"
    try:
        records = tfds.data_source(dataset, split=split, data_dir=data_dir, download=False)
    except Exception as error:  # TFDS raises many kinds, down to bare AssertionErrors
        place = f"data_dir {data_dir!r}" if data_dir else "its default data_dir"
        raise DataError(
            f"tfds:{name}: cannot open split {split!r} of {dataset!r} in {place}; the data set must have been "
            f"prepared with file_format='array_record' ({error})"
        ) from error

    def read(number: int) -> Any:
        try:
            return records[number]
        except Exception as error:  # as above
            raise _Unusable("damaged record", str(error)) from None

    for number in range(len(records)):
        yield reader.one(number, f"{dataset}:{split}:{number + 1}", read)


@dataclasses.dataclass(frozen=True)
class _Files:
    """Finds the files of one source.

    Attributes:
        source: the source string.
        extensions: endings of the names to take from folders; None for all.
    """

    source: str
    extensions: tuple[str, ...] | None

    def find(self) -> Iterator[tuple[Path, str] | Reject]:
        source = os.path.expanduser(self.source)  # not every shell does it within an argument
        if source == "stdlib":
            # It is by definition its .py files outside of tests: the rest of its folder is no reject.
            files = dataclasses.replace(self, extensions=(".py",))
            stdlib = Path(sysconfig.get_path("stdlib"))
            walked = files.walk(stdlib, os.walk(stdlib, onerror=_raise), _STDLIB_LEFT_OUT)
            yield from (found for found in walked if not isinstance(found, Reject))
        elif "://" in source:
            yield from self.remote(as_path(source))
        elif os.path.isdir(source):
            yield from self.walk(Path(source), os.walk(source, onerror=_raise))
        elif os.path.isfile(source):
            yield Path(source), Path(source).name
        elif matches := sorted(glob.glob(source, recursive=True)):
            base = Path(os.path.commonpath([os.path.dirname(match) for match in matches]))
            for match in matches:
                if os.path.isfile(match):
                    yield Path(match), Path(match).relative_to(base).as_posix()
        else:
            raise DataError(f"source {source!r} does not exist; accepted: {ACCEPTED}")

    def remote(self, place: Any) -> Iterator[tuple[Path, str] | Reject]:
        """What a URL names: a folder, a file or a pattern of names."""
        try:
            if place.is_dir():
                walked = place.fs.walk(place.path, on_error="raise")
                folders = ((place / folder.removeprefix(place.path).strip("/"), *names) for folder, *names in walked)
                yield from self.walk(place, folders)
            elif place.is_file():
                yield place, place.name
            elif matches := sorted(match for match in place.fs.glob(place.path) if place.fs.isfile(match)):
                base = os.path.commonpath([os.path.dirname(match) for match in matches])
                for match in matches:
                    yield as_path(place.fs.unstrip_protocol(match)), os.path.relpath(match, base)
            else:
                raise DataError(f"source {self.source!r} does not exist; accepted: {ACCEPTED}")
        except OSError as error:
            raise DataError(f"source {self.source!r}: {error}") from error

    def walk(
        self,
        root: Path,
        folders: Iterable[tuple[str | Path, list[str], list[str]]],
        left_out: frozenset[str] = frozenset(),
    ) -> Iterator[tuple[Path, str] | Reject]:
        """All files below `root` with their names, ordered, but for folders of a name in `left_out`.

        Args:
            root: the folder.
            folders: as `os.walk` gives them for it.
            left_out: names of folders.
        """
        for folder, subfolders, files in folders:
            subfolders.sort()
            inside = Path(folder) if isinstance(folder, str) else folder
            for subfolder in list(subfolders):
                name = _printable((inside / subfolder).relative_to(root).as_posix())
                reason = ""
                if subfolder.startswith("."):
                    reason = "hidden"
                elif isinstance(root, Path) and (inside / subfolder).is_symlink():
                    reason = "link to a folder"
                if reason:
                    yield Reject(reason, name, self.source)
                if reason or subfolder in left_out:
                    subfolders.remove(subfolder)
            for file in sorted(files):
                path = inside / file
                name = _printable(path.relative_to(root).as_posix())
                if file.startswith("."):
                    yield Reject("hidden", name, self.source)
                elif self.extensions is not None and not file.endswith(self.extensions):
                    yield Reject("other extension", name, self.source)
                else:
                    yield path, name


def read_documents(
    source: str,
    *,
    format: Format = "text",
    text_field: str = "text",
    extensions: Sequence[str] | None = None,
    tfds_data_dir: str | None = None,
) -> Iterator[Document | Reject]:
    """Reads a source from its beginning to its end, always in the same order, in bounded memory.

    Args:
        source: a folder (read recursively, each file by its suffix, files of no known suffix as one text document
            each), a file, a glob pattern, "tfds:NAME[/CONFIG][:SPLIT]" or "stdlib", which stands for the sources of
            the running Python's standard library without its tests.
        format: "text", or "chat" for records that hold a conversation under `messages` or `conversations`.
        text_field: the field or column that holds the text of a record.
        extensions: the endings of the file names to take from folders; all files if None.
        tfds_data_dir: where TFDS keeps its data sets; its own default if None.

    Yields:
        A `Document`, or a `Reject` for each thing that was found but could not be used. A file that is cut off yields
        the records before the cut, then a reject that says where it broke.

    Raises:
        DataError: the source does not exist, or needs a package that is not installed.
    """
    fields: tuple[str, ...]
    extract: Callable[[Any], str]
    if format == "chat":
        fields, extract = _CHAT_FIELDS, _conversation_of
    else:
        fields, extract = (text_field,), functools.partial(_text_of, field=text_field)
    for found in _read_records(source, fields, extensions, tfds_data_dir):
        yield _document(found, extract) if isinstance(found, Record) else found


def _read_records(
    source: str, fields: tuple[str, ...], extensions: Sequence[str] | None, tfds_data_dir: str | None
) -> Iterator[Record | Reject]:
    if source.startswith(TFDS):
        yield from read_tfds(source, tfds_data_dir)
        return
    for found in find_files(source, extensions):
        if isinstance(found, Reject):
            yield found
        else:
            yield from read_file(*found, source, fields)


def _document(record: Record, extract: Callable[[Any], str]) -> Document | Reject:
    try:
        return Document(extract(record.value), record.id, record.source)
    except _Unusable as error:
        return Reject(error.reason, record.id, record.source, _printable(error.detail))


def text_document(record: Record, text_field: str) -> Document | Reject:
    """The text of a record as a document; a reject if there is none."""
    return _document(record, functools.partial(_text_of, field=text_field))


def find_files(source: str, extensions: Sequence[str] | None = None) -> Iterator[tuple[Path, str] | Reject]:
    """The files of any source but one of TFDS, ordered, each with its name within the source.

    Args:
        source: as in `read_documents`.
        extensions: as in `read_documents`.

    Raises:
        DataError: the source does not exist.
    """
    return _Files(source, None if extensions is None else tuple(extensions)).find()


def read_file(path: Path, name: str, source: str, columns: tuple[str, ...] | None = None) -> Iterator[Record | Reject]:
    """The records of one file, by its suffix.

    Args:
        path: the file.
        name: its name within the source, with which ids begin.
        source: the source string.
        columns: those of a table to read; None for all.
    """
    return _Reader(source, columns).file(path, name)


def read_tfds(source: str, data_dir: str | None = None) -> Iterator[Record | Reject]:
    """The examples of a data set that TFDS has prepared as ArrayRecord.

    Args:
        source: "tfds:NAME[/CONFIG][:SPLIT]".
        data_dir: where TFDS keeps its data sets; its own default if None.

    Raises:
        DataError: it cannot be opened, or TFDS is not installed.
    """
    return _read_tfds(_Reader(source), source.removeprefix(TFDS), data_dir)


def estimate_bytes(source: str, extensions: Sequence[str] | None = None) -> int | None:
    """About how many bytes of text `read_documents` will yield; None where only reading can tell."""
    if source.startswith(TFDS):
        return None
    total = 0
    for found in find_files(source, extensions):
        if isinstance(found, Reject):
            continue
        file = found[0]
        if file.suffix.lower() in _COMPRESSED or not file.is_file():
            return None
        total += file.stat().st_size
    return total or None
