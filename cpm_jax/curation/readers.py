"""Sources as shards of documents: everything that `prepare` reads, and web archives and pages besides.

A shard is what one worker reads from its beginning to its end: one file that holds many documents, or a run of small
files that are a document each. A file of many documents that breaks off is damaged as a whole: which documents it lost
cannot be known, so none of it is used, and it is named (`Damage`). A small file that cannot be read is one reject.
"""

import dataclasses
import functools
import json
import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from cpm_jax.common.files import absolute, as_path
from cpm_jax.curation.document import Document
from cpm_jax.curation.extra import import_extra
from cpm_jax.curation.html import Extractor, extract_text
from cpm_jax.data.errors import DataError
from cpm_jax.data.sources import TFDS, RawText, Record, Reject, find_files, read_file, read_tfds, text_document
from cpm_jax.data.streams import Truncated, read_chunks

GROUP_BYTES = 1 << 24  # of small files per shard
MAX_TEXT_BYTES = 1 << 24  # of one document; a longer one is no document, and workers hold it in memory several times
_SPOOLED_BYTES = 1 << 26  # of a shard that waits in memory until it is known to be whole
_ARCHIVES = (".warc", ".wet")
_PAGES = (".html", ".htm", ".xhtml")
_MANY_DOCUMENTS = (*_ARCHIVES, ".jsonl", ".parquet", ".array_record")
_DAMAGE = frozenset({"truncated", "damaged record", "cannot be read"})  # of what `data.sources` rejects
# What Common Crawl calls a page. Other records (images, style sheets) are counted and left.
_PAGE_TYPES = frozenset({"text/html", "application/xhtml+xml"})


class Damage(Exception):
    """A file of many documents is cut off or damaged.

    Attributes:
        reject: which file, and where it breaks.
    """

    def __init__(self, reject: Reject):
        super().__init__(f"{reject.id}: {reject.reason}: {reject.detail}")
        self.reject = reject


@dataclasses.dataclass(frozen=True)
class InputShard:
    """What one worker reads at a time.

    Attributes:
        index: its place among all shards.
        source: the source string it belongs to.
        files: absolute paths or URLs, and their names within the source; none for TFDS.
        num_bytes: of the files; 0 where that is not known.
    """

    index: int
    source: str
    files: tuple[tuple[str, str], ...]
    num_bytes: int

    @property
    def name(self) -> str:
        """What to call it in reports."""
        if not self.files:
            return self.source
        first, last = self.files[0][1], self.files[-1][1]
        return first if len(self.files) == 1 else f"{first} … {last} ({len(self.files)} files)"


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records become documents.

    Attributes:
        text_field: the field or column of the text.
        extractor: of the text of web pages.
        tfds_data_dir: where TFDS keeps its data sets; its own default if None.
    """

    text_field: str = "text"
    extractor: Extractor = "keep_code_and_math"
    tfds_data_dir: str | None = None


def _kind(name: str) -> str:
    path = PurePath(name)
    return (path.with_suffix("") if path.suffix in (".gz", ".zst") else path).suffix.lower()


def plan_shards(
    sources: Sequence[str], extensions: Sequence[str] | None = None
) -> tuple[list[InputShard], list[Reject]]:
    """Divides sources into shards, always in the same way.

    Args:
        sources: source strings, as `cpm_jax.data.sources.read_documents` takes them.
        extensions: endings of the file names to take from folders; all if None.

    Returns:
        The shards, and what of the folders is not read at all.

    Raises:
        DataError: a source does not exist.
    """
    shards: list[InputShard] = []
    rejects: list[Reject] = []
    for source in sources:
        group: list[tuple[str, str]] = []
        group_bytes = 0

        def end_group(source: str = source) -> None:
            nonlocal group, group_bytes
            if group:
                shards.append(InputShard(len(shards), source, tuple(group), group_bytes))
            group, group_bytes = [], 0

        if source.startswith(TFDS):
            shards.append(InputShard(len(shards), source, (), 0))
            continue
        for found in find_files(source, extensions):
            if isinstance(found, Reject):
                rejects.append(found)
                continue
            path, name = found
            num_bytes = path.stat().st_size if path.is_file() else 0
            if _kind(path.name) in _MANY_DOCUMENTS:
                end_group()
                shards.append(InputShard(len(shards), source, ((absolute(path), name),), num_bytes))
                continue
            if group_bytes + num_bytes > GROUP_BYTES:
                end_group()
            group.append((absolute(path), name))
            group_bytes += num_bytes
        end_group()
    return shards, rejects


def progress_sizes(shards: Sequence[InputShard]) -> tuple[str, dict[int, int]]:
    """In what to count how far the reading is, and how much of it each shard is, by its index.

    Returns:
        "B", bytes of the files; or "shard" where a source has files that only TFDS knows, or all are empty.
    """
    if all(shard.files for shard in shards) and any(shard.num_bytes for shard in shards):
        return "B", {shard.index: shard.num_bytes for shard in shards}
    return "shard", {shard.index: 1 for shard in shards}


def read_shard(shard: InputShard, reading: Reading) -> Iterator[Document | Reject]:
    """Reads a shard in order, in bounded memory.

    Yields:
        A document, or a reject for each thing that was found but holds none.

    Raises:
        Damage: a file of many documents breaks off; what came before it from this shard is not to be used.
        DataError: a library is missing, or TFDS cannot open its data set.
    """
    if not shard.files:
        yield from _documents(read_tfds(shard.source, reading.tfds_data_dir), reading, damage=True)
    for place, name in shard.files:
        kind, path = _kind(place), as_path(place)
        if kind not in _MANY_DOCUMENTS and path.is_file() and path.stat().st_size > MAX_TEXT_BYTES:
            detail = f"{path.stat().st_size} bytes, more than {MAX_TEXT_BYTES}"
            yield Reject("text too long", name, shard.source, detail)
        elif kind in _ARCHIVES:
            yield from _archive(path, name, shard.source, reading)
        elif kind in _PAGES:
            yield from _page(path, name, shard.source, reading)
        else:
            records = read_file(path, name, shard.source)
            yield from _documents(records, reading, damage=kind in _MANY_DOCUMENTS)


def read_whole_shard(shard: InputShard, reading: Reading) -> Iterator[Document | Reject]:
    """As `read_shard`, but yields nothing of a shard before it was read to its end without damage.

    What was read waits in memory, or on disk where it is much.

    Raises:
        Damage: as `read_shard`, before anything is yielded.
        DataError: the same.
    """
    with tempfile.SpooledTemporaryFile(max_size=_SPOOLED_BYTES) as file:
        count = 0
        for found in read_shard(shard, reading):
            pickle.dump(found, file, pickle.HIGHEST_PROTOCOL)
            count += 1
        file.seek(0)
        for _ in range(count):
            yield pickle.load(file)


def _documents(records: Iterator[Record | Reject], reading: Reading, damage: bool) -> Iterator[Document | Reject]:
    for record in records:
        if isinstance(record, Record):
            yield _document(record, reading.text_field)
        elif damage and record.reason in _DAMAGE:
            raise Damage(record)
        else:
            yield record


def _document(record: Record, text_field: str) -> Document | Reject:
    """A record with what else it says: known fields by name, scores, and the rest as metadata."""
    found = text_document(record, text_field)
    if isinstance(found, Reject):
        return found
    if reason := _unusable(found.text):
        return Reject(reason[0], found.id, found.source, reason[1])
    if isinstance(record.value, RawText):
        return Document(found.text, found.id, found.source)
    fields = {name: value for name, value in record.value.items() if name != text_field and value is not None}
    scores = {
        name: float(fields.pop(name))
        for name in list(fields)
        if (name == "score" or name.endswith("_score")) and type(fields[name]) in (int, float)
    }
    return Document(
        text=found.text,
        id=_text(fields, "id") or found.id,
        source=_text(fields, "source") or found.source,
        url=_text(fields, "url"),
        language=_text(fields, "language"),
        metadata=_json_values(fields),
        scores=scores,
    )


def _unusable(text: str) -> tuple[str, str] | None:
    """Why a text cannot be a document: the reason and a detail."""
    if not text.strip():
        return "empty text", ""
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        return "invalid unicode", f"character {error.start}: {error.reason}"
    if num_bytes > MAX_TEXT_BYTES:
        return "text too long", f"{num_bytes} bytes, more than {MAX_TEXT_BYTES}"
    return None


def _text(fields: dict[str, Any], name: str) -> str:
    """Takes a field out that is to be text; a number is written as such, and anything else stays metadata."""
    value = fields.get(name)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str) or type(value) is int:
        del fields[name]
        return str(value)
    return ""


def _json_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON can hold them: numbers and arrays of NumPy as numbers and lists, dates and the like as text."""

    def other(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        return value.tolist() if hasattr(value, "tolist") else str(value)

    return json.loads(json.dumps(dict(fields), default=other))


def _page(path: Path, name: str, source: str, reading: Reading) -> Iterator[Document | Reject]:
    try:
        data = b"".join(read_chunks(path))
    except Truncated as error:
        yield Reject("truncated", name, source, str(error))
    except OSError as error:
        yield Reject("cannot be read", name, source, str(error))
    else:
        yield _extracted(data, Document("", name, source), reading)


def _extracted(page: bytes | str, document: Document, reading: Reading) -> Document | Reject:
    reject = functools.partial(Reject, id=document.id, source=document.source)
    try:
        text = extract_text(page, reading.extractor)
    except DataError:
        raise
    except Exception as error:  # parsers of what people call HTML fail in many ways
        return reject("cannot be extracted", detail=f"{type(error).__name__}: {error}")
    if reason := _unusable(text):
        return reject(reason[0], detail=reason[1])
    return dataclasses.replace(document, text=text)


def _archive(path: Path, name: str, source: str, reading: Reading) -> Iterator[Document | Reject]:
    """The pages of a WARC file, or the texts of a WET file."""
    warc = import_extra("fastwarc.warc")
    try:
        # FastWARC takes the end of a damaged stream for the end of the archive.
        if path.suffix in (".gz", ".zst"):
            for _ in read_chunks(path):
                pass
        types = warc.WarcRecordType.response | warc.WarcRecordType.conversion
        with path.open("rb") as file:
            for number, record in enumerate(warc.ArchiveIterator(file, record_types=types, auto_decode="all"), 1):
                yield _archived(record, f"{name}:{number}", source, reading)
    except Truncated as error:
        raise Damage(Reject("truncated", name, source, str(error))) from error
    except (OSError, ValueError) as error:
        raise Damage(Reject("cannot be read", name, source, str(error))) from error


def _archived(record: Any, place: str, source: str, reading: Reading) -> Document | Reject:
    body = record.reader.read()
    http = record.http_headers
    encoded = http is not None and ("Content-Encoding" in http or "Transfer-Encoding" in http)
    if not encoded and len(body) < record.content_length:
        detail = f"a record of {record.content_length} bytes ends after {len(body)}"
        raise Damage(Reject("truncated", place, source, detail))
    document = Document(
        text="",
        id=(record.record_id or place).removeprefix("<urn:uuid:").removesuffix(">"),
        source=source,
        url=record.headers.get("WARC-Target-URI", ""),
        metadata={"date": record.headers.get("WARC-Date", ""), "file_path": place.rpartition(":")[0]},
    )
    if http is None:
        text = body.decode("utf-8", "replace").strip()
        reason = _unusable(text)
        return Reject(reason[0], document.id, source, reason[1]) if reason else dataclasses.replace(document, text=text)
    if http.status_code != 200:
        return Reject("not a page", document.id, source, f"HTTP status {http.status_code}")
    if record.http_content_type not in _PAGE_TYPES:
        return Reject("not a page", document.id, source, f"type {record.http_content_type}")
    page: bytes | str = body
    if record.http_charset:
        page = body.decode(record.http_charset, "replace")
    return _extracted(page, document, reading)
