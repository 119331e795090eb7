"""One pass over a corpus: documents cleaned, exact duplicates dropped, each assigned to a split."""

import collections
import dataclasses
import hashlib
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from cpm_jax.data.errors import DataError
from cpm_jax.data.sources import ACCEPTED, Document, Format, Reject, estimate_bytes, read_documents

_NEWLINES = re.compile("\r\n|[\r\x85\u2028\u2029]")


def clean_text(text: str) -> str:
    """Writes all line ends as a line feed and leaves out NUL characters."""
    return _NEWLINES.sub("\n", text).replace("\0", "")


@dataclasses.dataclass(frozen=True, slots=True)
class CleanDocument:
    """A document that belongs to the corpus.

    Attributes:
        document: with its clean text.
        num_bytes: of the text in UTF-8.
        digest: of the text, 16 bytes.
        position: where the hash of its id lies in [0, 1); below the validation fraction it is held out.
    """

    document: Document
    num_bytes: int
    digest: bytes
    position: float


class _SeenTexts:
    """A set of digests that spills to disk: a corpus may have more documents than fit in memory."""

    def __init__(self, path: Path):
        path.unlink(missing_ok=True)
        self._path = path
        # Its users take turns, but not always in one thread: the trainer of tokenizers reads from its own.
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        # It is built anew by every pass, so it need not survive a kill.
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, digest: bytes) -> bool:
        """Adds a digest; whether it is new."""
        return self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest,)).rowcount == 1

    def close(self) -> None:
        self._database.close()
        self._path.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What is read, and how.

    Attributes:
        sources: source strings, read one after another.
        format: of the documents.
        text_field: as in `read_documents`.
        extensions: as in `read_documents`.
        tfds_data_dir: as in `read_documents`.
        seed: of the assignment to splits.
        work_dir: an existing folder for the set of the texts that were seen.
        max_bytes: reading ends before the text that would go beyond it; None reads all.
    """

    sources: tuple[str, ...]
    format: Format
    text_field: str
    extensions: tuple[str, ...] | None
    tfds_data_dir: str | None
    seed: int
    work_dir: Path
    max_bytes: int | None = None

    def read(self) -> "CorpusPass":
        """Begins a pass from the first document."""
        return CorpusPass(self)

    def validation_threshold(self, fraction: float) -> float:
        """The position below which documents are held out.

        This is `fraction`, unless the corpus is so small that nothing would be held out; then it is just above the
        smallest position, so that the validation split is one document.

        Raises:
            DataError: the corpus is empty, or is one document, which cannot be split.
        """
        smallest, count = 1.0, 0
        reading = self.read()
        for item in reading:
            if isinstance(item, CleanDocument):
                count += 1
                smallest = min(smallest, item.position)
                # Two documents are needed, so that one is left to train on.
                if count > 1 and (fraction == 0 or smallest < fraction):
                    return fraction
        if count == 0:
            raise DataError(
                f"no document found in {', '.join(self.sources)} (rejected: {dict(reading.rejects) or 'nothing'}); "
                f"accepted: {ACCEPTED}"
            )
        if fraction == 0:
            return fraction
        if count == 1:
            raise DataError(
                f"{', '.join(self.sources)} holds only one document, which cannot be split: give more documents or "
                "set validation_fraction = 0"
            )
        return max(fraction, smallest + 2.0**-53)

    def total_bytes(self) -> int | None:
        """About how many bytes of text a pass will read, or None where that is not known beforehand."""
        sizes = [estimate_bytes(source, self.extensions) for source in self.sources]
        if None in sizes:
            return self.max_bytes
        total = sum(size for size in sizes if size is not None)
        return total if self.max_bytes is None else min(total, self.max_bytes)


class CorpusPass:
    """An iterator over the corpus that counts what it drops.

    Attributes:
        duplicates: documents dropped so far because the text had been seen.
        rejects: rejects so far, by reason.
        documents: documents so far, by source.
        complete: whether nothing was left unread because of `Corpus.max_bytes`.
    """

    def __init__(self, corpus: Corpus):
        self._corpus = corpus
        self.duplicates = 0
        self.rejects: collections.Counter[str] = collections.Counter()
        self.complete = True
        self.documents: collections.Counter[str] = collections.Counter(dict.fromkeys(corpus.sources, 0))

    def __iter__(self) -> Iterator[CleanDocument | Reject]:
        corpus = self._corpus
        seen = _SeenTexts(corpus.work_dir / "seen.sqlite")
        num_bytes = 0
        try:
            for source in corpus.sources:
                for found in read_documents(
                    source,
                    format=corpus.format,
                    text_field=corpus.text_field,
                    extensions=corpus.extensions,
                    tfds_data_dir=corpus.tfds_data_dir,
                ):
                    item = self._clean(found) if isinstance(found, Document) else found
                    if isinstance(item, Reject):
                        self.rejects[item.reason] += 1
                    elif seen.add(item.digest):
                        num_bytes += item.num_bytes
                        if corpus.max_bytes is not None and num_bytes > corpus.max_bytes:
                            self.complete = False
                            return
                        self.documents[source] += 1
                    else:
                        self.duplicates += 1
                        continue
                    yield item
        finally:
            seen.close()

    def _clean(self, document: Document) -> CleanDocument | Reject:
        text = document.text if self._corpus.format == "chat" else clean_text(document.text)
        if not text.strip():
            return Reject("empty text", document.id, document.source)
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            return Reject("invalid unicode", document.id, document.source, f"character {error.start}: {error.reason}")
        key = hashlib.blake2b(f"{self._corpus.seed}:{document.id}".encode(errors="replace"), digest_size=8).digest()
        return CleanDocument(
            document=dataclasses.replace(document, text=text),
            num_bytes=len(data),
            digest=hashlib.blake2b(data, digest_size=16).digest(),
            position=(int.from_bytes(key) >> 11) * 2.0**-53,
        )
