"""Shards of documents as parquet or jsonl.zst, one flat row each, that appear whole or not at all."""

import contextlib
import dataclasses
import json
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import zstandard

from cpm_jax.common.files import whole_file
from cpm_jax.curation.document import Document
from cpm_jax.curation.extra import import_extra
from cpm_jax.data.errors import DataError
from cpm_jax.data.streams import MAX_LINE_BYTES, read_chunks, split_lines

OutputFormat: TypeAlias = Literal["parquet", "jsonl.zst"]

_TEXT_COLUMNS = ("text", "id", "source", "url", "language")
_KINDS = {str: "text", int: "integer", float: "number", bool: "boolean"}
_INT64 = 1 << 63
_ROWS_PER_GROUP = 1000
_CHARACTERS_PER_GROUP = 1 << 25  # a group of rows is held in memory until it is written
_ZSTD_LEVEL = 3
MAX_FIELDS = 100  # metadata fields that are columns; records whose keys are urls, say, would have one each
MAX_ROW_BYTES = MAX_LINE_BYTES - (1 << 12)  # of a dump; what deduplication adds is a reason


class Columns:
    """Which columns documents need besides `text`, `id`, `source`, `url` and `language`.

    A score is a column. So is a metadata field whose values are all text, or all numbers of one kind; the others, and
    integers of more than 64 bits with their sign, go together into the column `metadata`, as JSON. With more than
    `MAX_FIELDS` fields in all, every field goes there.

    Attributes:
        scores: names of scores, ordered.
        fields: metadata fields and the kind of their values: "text", "integer", "number", "boolean" or "mixed"; None
            for too many.
    """

    def __init__(self, scores: Iterable[str] = (), fields: Mapping[str, str] | None = types.MappingProxyType({})):
        self.scores = sorted(scores)
        self.fields = None if fields is None else dict(sorted(fields.items()))

    @classmethod
    def of(cls, documents: Iterable[Document]) -> "Columns":
        """The columns that these documents need."""
        columns = cls()
        for document in documents:
            columns.add(document)
        return columns

    def add(self, document: Document) -> None:
        """Makes room for a document."""
        if not document.scores.keys() <= set(self.scores):
            self.scores = sorted({*self.scores, *document.scores})
        for name, value in document.metadata.items():
            fits = type(value) is not int or -_INT64 <= value < _INT64
            self._note(name, _KINDS.get(type(value), "mixed") if fits else "mixed")

    def merge(self, other: "Columns") -> None:
        """Makes room for the documents that another one is for."""
        self.scores = sorted({*self.scores, *other.scores})
        if other.fields is None:
            self.fields = None
        for name, kind in (other.fields or {}).items():
            self._note(name, kind)

    def _note(self, name: str, kind: str) -> None:
        if self.fields is None:
            return
        known = self.fields.get(name, kind)
        taken = name in _TEXT_COLUMNS or name in ("metadata", "dropped")
        self.fields[name] = "mixed" if known != kind or taken else known
        if len(self.fields) > MAX_FIELDS:
            self.fields = None

    def row(self, document: Document) -> dict[str, Any]:
        """A document as one flat row, with None for what it lacks."""
        row: dict[str, Any] = {name: getattr(document, name) for name in _TEXT_COLUMNS}
        row |= {name: document.scores.get(name) for name in self.scores}
        own = self._own_fields()
        row |= {name: document.metadata.get(name) for name in own}
        rest = {name: value for name, value in document.metadata.items() if name not in own}
        if self._has_rest():
            row["metadata"] = json.dumps(rest, ensure_ascii=False, sort_keys=True)
        return row

    def _own_fields(self) -> dict[str, str]:
        fields = (self.fields or {}).items()
        return {name: kind for name, kind in fields if kind != "mixed" and name not in self.scores}

    def _has_rest(self) -> bool:
        """Whether there are fields that are no columns."""
        return self.fields is None or len(self._own_fields()) < len(self.fields)

    def arrow_schema(self) -> Any:
        """The same as a schema of Arrow."""
        arrow = import_extra("pyarrow")
        kinds = {"text": arrow.string(), "integer": arrow.int64(), "number": arrow.float64(), "boolean": arrow.bool_()}
        schema = [(name, arrow.string()) for name in _TEXT_COLUMNS]
        schema += [(name, arrow.float64()) for name in self.scores]
        schema += [(name, kinds[kind]) for name, kind in self._own_fields().items()]
        if self._has_rest():
            schema.append(("metadata", arrow.string()))
        return arrow.schema(schema)


def line_of(row: Mapping[str, Any]) -> bytes:
    """A row as a line of JSON; lone surrogates, which metadata may have, become question marks."""
    return json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n"


class _Lines:
    """Rows as lines of JSON into a zstd stream."""

    def __init__(self, file: BinaryIO):
        self.number = 0
        self._stream = zstandard.ZstdCompressor(_ZSTD_LEVEL).stream_writer(file, closefd=False)

    def write(self, row: dict[str, Any]) -> None:
        self.write_line(line_of(row))

    def write_line(self, line: bytes) -> None:
        self.number += 1
        self._stream.write(line)

    def close(self) -> None:
        self._stream.close()


class _Table:
    """Rows into a parquet file."""

    def __init__(self, file: BinaryIO, schema: Any):
        self._arrow = import_extra("pyarrow")
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._characters = self.number = 0
        self._writer = import_extra("pyarrow.parquet").ParquetWriter(
            file, schema, compression="zstd", write_page_checksum=True
        )

    def write(self, row: dict[str, Any]) -> None:
        self.number += 1
        self._rows.append(row)
        self._characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(self._rows) >= _ROWS_PER_GROUP or self._characters >= _CHARACTERS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(self._arrow.Table.from_pylist(self._rows, self._schema))
        self._rows, self._characters = [], 0

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


class _Empty(Exception):
    """There was nothing to write."""


@contextlib.contextmanager
def shard_writer(
    path: Path, columns: Columns | None = None, temporary_dir: Path | None = None, *, allow_empty: bool = True
) -> Iterator[_Table | _Lines]:
    """What writes rows to a file that gets its name when the block ends well.

    Args:
        path: ends with .parquet or .jsonl.zst.
        columns: of parquet.
        temporary_dir: where the file lies until then; in the folder of the path if None.
        allow_empty: whether a file without rows is one.
    """
    with contextlib.suppress(_Empty), whole_file(path, temporary_dir) as file:
        is_table = path.suffix == ".parquet"
        rows = _Table(file, (columns or Columns()).arrow_schema()) if is_table else _Lines(file)
        try:
            yield rows
        finally:
            rows.close()
        if not rows.number and not allow_empty:
            raise _Empty


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Writes documents of any source to one file.

    Args:
        path: ends with .parquet or .jsonl.zst.
        documents: those of a parquet file are held in memory, since all of them decide its columns.
    """
    documents = list(documents)
    columns = Columns.of(documents)
    with shard_writer(path, columns) as writer:
        for document in documents:
            writer.write(columns.row(document))


def dump(document: Document) -> dict[str, Any]:
    """A document with all it has, as JSON holds it; `load_dump` reads it."""
    return dataclasses.asdict(document)


def load_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl.zst file that was written here.

    Raises:
        Truncated: the file is damaged.
        DataError: a row is longer than any that is written here.
    """
    for number, line in enumerate(split_lines(read_chunks(path)), 1):
        if isinstance(line, int):
            raise DataError(f"{path}: row {number} has {line} bytes; accepted are at most {MAX_LINE_BYTES}")
        yield json.loads(line)


def load_dump(path: Path) -> Iterator[Document]:
    """The documents of a .jsonl.zst file of dumps.

    Raises:
        Truncated: the file is damaged.
        DataError: a row is longer than any that is written here.
    """
    return (Document(**row) for row in load_rows(path))
