"""Reads documents from anything a source string can name, and sets aside what cannot be read."""

import dataclasses
import functools
import glob
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import zstandard

from cpm_jax.data.errors import DataError

Format = Literal["text", "chat"]

ACCEPTED = (
    "a folder, a text file, .jsonl, .parquet or .array_record (.gz and .zst too, but for the last two), "
    "a glob pattern, tfds:NAME[/CONFIG][:SPLIT], or stdlib"
)
_CHAT_FIELDS = ("messages", "conversations", "tools")
_COMPRESSED = {".gz", ".zst", ".parquet", ".array_record"}
_READ_SIZE = 1 << 16
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


class _Unusable(Exception):
    """Raised by the extractors below; becomes a `Reject`."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


class _RawText(str):
    """Text that is a whole record, not a field of one."""


def _text_of(record: Any, field: str) -> str:
    if isinstance(record, _RawText):
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


def _parse_json(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _Unusable("invalid UTF-8", f"at byte {error.start}: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise _Unusable("malformed JSON", str(error)) from None


class _Truncated(Exception):
    """The compressed stream ends, or is damaged, before its end."""


def _decompressed(path: Path, new_decoder: Callable[[], Any]) -> Iterator[bytes]:
    """Yields the decompressed bytes of a file of one or more gzip members or zstd frames.

    The streams' own file objects are not used: zstandard's does not notice a truncated frame.
    """
    decoder = None
    with open(path, "rb") as file:
        while data := file.read(_READ_SIZE):
            while data:
                if decoder is None:
                    decoder = new_decoder()
                try:
                    yield decoder.decompress(data)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise _Truncated(f"damaged before byte {file.tell()} of the file: {error}") from None
                data = b""
                if decoder.eof:
                    data = decoder.unused_data.lstrip(b"\0")
                    decoder = None
        if decoder is not None:
            raise _Truncated(f"the compressed stream is cut off at byte {file.tell()}, the end of the file")


def _chunks(path: Path) -> Iterator[bytes]:
    if path.suffix == ".gz":
        yield from _decompressed(path, lambda: zlib.decompressobj(wbits=31))
    elif path.suffix == ".zst":
        yield from _decompressed(path, lambda: zstandard.ZstdDecompressor().decompressobj())
    else:
        with open(path, "rb") as file:
            while data := file.read(_READ_SIZE):
                yield data


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    try:
        for chunk in chunks:
            first, *rest = chunk.split(b"\n")
            pending.append(first)
            if rest:
                yield b"".join(pending)
                yield from rest[:-1]
                pending = [rest[-1]]
    except _Truncated as error:
        cut = sum(map(len, pending))
        raise _Truncated(f"{error}; {cut} bytes of an unfinished line are lost") from None
    if any(pending):
        yield b"".join(pending)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Opens files of every kind for one source.

    Attributes:
        source: the source string.
        extract: turns a record into a document's text.
        fields: the fields of a record that `extract` uses.
        extensions: endings of the file names to take from folders.
    """

    source: str
    extract: Callable[[Any], str]
    fields: tuple[str, ...]
    extensions: tuple[str, ...] | None = None

    def reject(self, reason: str, id: str, detail: str = "") -> Reject:
        return Reject(reason, id, self.source, _printable(detail))

    def one(self, record: Any, id: str, parse: Callable[[Any], Any] = lambda record: record) -> Document | Reject:
        """One record, as `parse` makes it of what was read, as a document or a reject."""
        try:
            return Document(self.extract(parse(record)), id, self.source)
        except _Unusable as error:
            return self.reject(error.reason, id, error.detail)

    def text_file(self, path: Path, name: str) -> Iterator[Document | Reject]:
        try:
            yield Document(_decode(b"".join(_chunks(path))), name, self.source)
        except _Unusable as error:
            yield self.reject(error.reason, name, error.detail)
        except _Truncated as error:
            yield self.reject("truncated", name, str(error))

    def jsonl(self, path: Path, name: str) -> Iterator[Document | Reject]:
        number = 0
        try:
            for number, line in enumerate(_lines(_chunks(path)), start=1):
                if line.strip():
                    yield self.one(line, f"{name}:{number}", _parse_json)
        except _Truncated as error:
            yield self.reject("truncated", f"{name}:{number + 1}", str(error))

    def parquet(self, path: Path, name: str) -> Iterator[Document | Reject]:
        parquet = _import_extra("pyarrow.parquet")
        number = 0
        try:
            with parquet.ParquetFile(path, page_checksum_verification=True) as file:
                columns = [column for column in self.fields if column in file.schema_arrow.names]
                if not columns:
                    found = f"no column {' or '.join(self.fields)} among {file.schema_arrow.names[:20]}"
                    yield self.reject("missing field", name, f"{found}; {file.metadata.num_rows} rows")
                    return
                for batch in file.iter_batches(batch_size=256, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield self.one(row, f"{name}:{number}")
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these
            yield self.reject("truncated", f"{name}:{number + 1}", f"parquet: {error}")

    def array_record(self, path: Path, name: str) -> Iterator[Document | Reject]:
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

    def file(self, path: Path, name: str) -> Iterator[Document | Reject]:
        """Any file, by its suffix; an error of the operating system becomes a reject."""
        kind = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
        try:
            with open(path, "rb"):
                pass  # what the system says of a file that cannot be opened is better than a guess at damage
            if kind.suffix == ".jsonl":
                yield from self.jsonl(path, name)
            elif path.suffix == ".parquet":
                yield from self.parquet(path, name)
            elif path.suffix == ".array_record":
                yield from self.array_record(path, name)
            else:
                yield from self.text_file(path, name)
        except OSError as error:
            yield self.reject("cannot be read", name, str(error))

    def folder(self, root: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Document | Reject]:
        """The documents of all files that `walk` finds."""
        for found in self.walk(root, left_out):
            if isinstance(found, Reject):
                yield found
            else:
                yield from self.file(*found)

    def walk(self, root: Path, left_out: frozenset[str]) -> Iterator[tuple[Path, str] | Reject]:
        """All files below `root` with their names, ordered, but for folders of a name in `left_out`."""
        for folder, subfolders, files in os.walk(root, onerror=_raise):
            subfolders.sort()
            inside = Path(folder)
            for subfolder in list(subfolders):
                name = _printable((inside / subfolder).relative_to(root).as_posix())
                reason = ""
                if subfolder.startswith("."):
                    reason = "hidden"
                elif (inside / subfolder).is_symlink():
                    reason = "link to a folder"
                if reason:
                    yield self.reject(reason, name)
                if reason or subfolder in left_out:
                    subfolders.remove(subfolder)
            for file in sorted(files):
                path = inside / file
                name = _printable(path.relative_to(root).as_posix())
                if file.startswith("."):
                    yield self.reject("hidden", name)
                elif self.extensions is not None and not file.endswith(self.extensions):
                    yield self.reject("other extension", name)
                else:
                    yield path, name


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
    return _RawText(_decode(data))


def _import_extra(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{module} is needed for this source: pip install 'cpm_jax[data]' ({error})") from error


def _read_tfds(reader: _Reader, name: str, data_dir: str | None) -> Iterator[Document | Reject]:
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


def _make_reader(source: str, format: Format, text_field: str, extensions: Sequence[str] | None) -> _Reader:
    if source == "stdlib":
        extensions = (".py",)
    endings = None if extensions is None else tuple(extensions)
    if format == "chat":
        return _Reader(source, _conversation_of, _CHAT_FIELDS, endings)
    return _Reader(source, functools.partial(_text_of, field=text_field), (text_field,), endings)


def _stdlib(reader: _Reader) -> Iterator[tuple[Path, str]]:
    """The standard library is by definition its .py files outside of tests: the rest of its folder is no reject."""
    for found in reader.walk(Path(sysconfig.get_path("stdlib")), _STDLIB_LEFT_OUT):
        if not isinstance(found, Reject):
            yield found


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
    reader = _make_reader(source, format, text_field, extensions)
    if source == "stdlib":
        for path, name in _stdlib(reader):
            yield from reader.file(path, name)
    elif source.startswith("tfds:"):
        yield from _read_tfds(reader, source.removeprefix("tfds:"), tfds_data_dir)
    elif os.path.isdir(source):
        yield from reader.folder(Path(source))
    elif os.path.isfile(source):
        yield from reader.file(Path(source), Path(source).name)
    elif matches := sorted(glob.glob(source, recursive=True)):
        base = Path(os.path.commonpath([os.path.dirname(match) for match in matches]))
        for match in matches:
            if os.path.isfile(match):
                yield from reader.file(Path(match), Path(match).relative_to(base).as_posix())
    else:
        raise DataError(f"source {source!r} does not exist; accepted: {ACCEPTED}")


def estimate_bytes(source: str, extensions: Sequence[str] | None = None) -> int | None:
    """About how many bytes of text `read_documents` will yield; None where only reading can tell."""
    reader = _make_reader(source, "text", "", extensions)
    files: Iterable[Path]
    if source == "stdlib":
        files = [path for path, _ in _stdlib(reader)]
    elif os.path.isdir(source):
        files = [found[0] for found in reader.walk(Path(source), frozenset()) if not isinstance(found, Reject)]
    else:
        files = [Path(match) for match in glob.glob(source, recursive=True) if os.path.isfile(match)]
    total = 0
    for file in files:
        if file.suffix in _COMPRESSED or not file.is_file():
            return None
        total += file.stat().st_size
    return total or None
