"""Groups documents into shards, writes each shard atomically, and finds those that an earlier call finished.

A shard is packed by itself from a run of consecutive documents of one split, which their text alone determines. So
shards do not depend on each other, nor on the number of workers, and a finished one need not be done again.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from array_record.python import array_record_module

from cpm_jax.common.files import sha256, write_json
from cpm_jax.data.corpus import CleanDocument
from cpm_jax.data.encoding import Encoded
from cpm_jax.data.manifest import Shard
from cpm_jax.data.packing import BestFitDecreasing, ConcatThenSplit
from cpm_jax.data.records import encode_record
from cpm_jax.data.sources import Reject

_CHUNK_BYTES = 1 << 19  # of text per task of a worker


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Documents that are tokenised together: the whole of a shard or a part of it.

    Attributes:
        split: "train" or "validation".
        shard: number of the shard within the split.
        documents: in their order.
        last: whether the shard ends with this chunk.
        input_digest: of the texts of the shard up to here.
    """

    split: str
    shard: int
    documents: list[CleanDocument]
    last: bool
    input_digest: str

    @property
    def name(self) -> str:
        """Name of the shard while the number of shards is not known."""
        return f"{self.split}-{self.shard:05d}"

    @property
    def texts(self) -> list[str]:
        """The texts of the documents."""
        return [document.document.text for document in self.documents]

    @property
    def num_bytes(self) -> int:
        """Size of the texts in UTF-8."""
        return sum(document.num_bytes for document in self.documents)


class _Grouping:
    """Groups the documents of one split."""

    def __init__(self, split: str, shard_bytes: int):
        self._split = split
        self._shard_bytes = shard_bytes
        self._next_shard = 0
        self._begin()

    def _begin(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self._documents: list[CleanDocument] = []
        self._bytes_in_shard = 0
        self._bytes_in_chunk = 0

    def add(self, document: CleanDocument) -> Iterator[Chunk]:
        self._documents.append(document)
        self._digest.update(document.digest)
        self._bytes_in_shard += document.num_bytes
        self._bytes_in_chunk += document.num_bytes
        if self._bytes_in_shard >= self._shard_bytes:
            yield from self.end_shard()
        elif self._bytes_in_chunk >= _CHUNK_BYTES:
            yield self._chunk(last=False)

    def end_shard(self) -> Iterator[Chunk]:
        if self._bytes_in_shard:
            yield self._chunk(last=True)
            self._next_shard += 1
            self._begin()

    def _chunk(self, last: bool) -> Chunk:
        chunk = Chunk(self._split, self._next_shard, self._documents, last, self._digest.hexdigest())
        self._documents, self._bytes_in_chunk = [], 0
        return chunk


def group_documents(
    items: Iterable[CleanDocument | Reject],
    validation_threshold: float,
    shard_bytes: int,
    on_reject: Callable[[Reject], None],
) -> Iterator[Chunk]:
    """Assigns documents to splits, shards and chunks; hands rejects to `on_reject`."""
    groupings = {split: _Grouping(split, shard_bytes) for split in ("train", "validation")}
    for item in items:
        if isinstance(item, Reject):
            on_reject(item)
        else:
            split = "validation" if item.position < validation_threshold else "train"
            yield from groupings[split].add(item)
    for grouping in groupings.values():
        yield from grouping.end_shard()


@dataclasses.dataclass(frozen=True)
class FinishedShard:
    """A shard that is complete on disk, and what was learned while it was written.

    Attributes:
        split: "train" or "validation".
        shard: the manifest's entry; its path is relative to the dataset folder.
        input_digest: of the texts it was made of.
        rejects: documents that could not be tokenised.
        truncated: number of conversations that were cut.
    """

    split: str
    shard: Shard
    input_digest: str
    rejects: tuple[Reject, ...]
    truncated: int


class ShardWriter:
    """Packs the chunks of one shard and writes them to a file that gets its name when it is complete."""

    def __init__(self, first: Chunk, packer: ConcatThenSplit | BestFitDecreasing, work_dir: Path):
        """Begins a shard.

        Args:
            first: its first chunk.
            packer: a fresh packer.
            work_dir: where the shard lies until the data set is complete.
        """
        self._path = work_dir / f"{first.name}.array_record"
        self._temporary = work_dir / f"{first.name}.tmp"
        self._packer = packer
        # One record per group: the loader reads records in random order.
        self._writer = array_record_module.ArrayRecordWriter(str(self._temporary), "group_size:1")
        self._records = self._tokens = self._documents = self._text_bytes = self._truncated = 0
        self._rejects: list[Reject] = []

    def add(self, chunk: Chunk, encoded: Encoded) -> None:
        """Appends the documents of a chunk."""
        rejected = set()
        for index, reason, detail in encoded.rejects:
            rejected_document = chunk.documents[index].document
            self._rejects.append(Reject(reason, rejected_document.id, rejected_document.source, detail))
            rejected.add(index)
        for index, document in enumerate(chunk.documents):
            if index not in rejected:
                self._documents += 1
                self._text_bytes += document.num_bytes
        self._tokens += len(encoded.documents.tokens)
        self._truncated += encoded.truncated
        self._write(self._packer.add(encoded.documents))

    def _write(self, records: Iterable[Any]) -> None:
        for record in records:
            self._writer.write(encode_record(record))
            self._records += 1

    def finish(self, last: Chunk) -> FinishedShard:
        """Completes the shard; returns once it is safe on disk."""
        self._write(self._packer.flush())
        self._writer.close()
        with open(self._temporary, "rb") as file:
            os.fsync(file.fileno())
        shard = Shard(
            path=f"{self._path.parent.name}/{self._path.name}",
            sha256=sha256(self._temporary),
            file_bytes=self._temporary.stat().st_size,
            records=self._records,
            tokens=self._tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
        )
        finished = FinishedShard(last.split, shard, last.input_digest, tuple(self._rejects), self._truncated)
        os.replace(self._temporary, self._path)
        # Only a shard with this note counts as finished, so it is written last.
        write_json(self._path.with_suffix(".json"), dataclasses.asdict(finished))
        return finished

    def abandon(self) -> None:
        """Closes the file of a shard that will not be finished."""
        self._writer.close()


def find_finished(output_dir: Path, work_dir: Path) -> dict[str, FinishedShard]:
    """The shards that an earlier call finished and whose content still has its hash, by `Chunk.name`."""
    finished = {}
    for note in sorted(work_dir.glob("*-[0-9]*.json")):
        content = json.loads(note.read_text("utf-8"))
        shard = Shard(**content["shard"])
        # An earlier call may have been killed while it gave the shards their final names.
        for path in [output_dir / shard.path, *output_dir.glob(f"{note.stem}-of-*.array_record")]:
            if path.is_file() and path.stat().st_size == shard.file_bytes and sha256(path) == shard.sha256:
                finished[note.stem] = FinishedShard(
                    split=content["split"],
                    shard=dataclasses.replace(shard, path=path.relative_to(output_dir).as_posix()),
                    input_digest=content["input_digest"],
                    rejects=tuple(Reject(**reject) for reject in content["rejects"]),
                    truncated=content["truncated"],
                )
                break
    return finished
