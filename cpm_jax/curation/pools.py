"""Pools of documents to train a classifier on: read, without duplicates or contradictions, split by content."""

import collections
import dataclasses
import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from cpm_jax.common.config import InputError
from cpm_jax.curation.document import Document
from cpm_jax.curation.readers import Damage, InputShard, Reading, plan_shards, progress_sizes, read_whole_shard
from cpm_jax.data.sources import Reject

# Of files whose texts are longer than they are.
_COMPRESSED = (".gz", ".zst", ".parquet", ".array_record")

MIN_DOCUMENTS = 20  # of a pool: with fewer there is nothing to hold out, and nothing to learn


class PoolError(InputError):
    """A pool that cannot be used; says which and why."""


@dataclasses.dataclass
class SetAside:
    """What of some sources is not used.

    Attributes:
        rejects: records and files that hold no usable document, counted by reason.
        quarantined: files of many documents that are cut off or damaged, of which nothing is used.
    """

    rejects: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    quarantined: list[Reject] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        """For messages: the counts, and the names of the files."""
        damaged = [f"{reject.id} ({reject.reason})" for reject in self.quarantined]
        return f"{dict(self.rejects) or 'none'}" + (f"; damaged: {', '.join(damaged)}" if damaged else "")

    def to_json(self) -> dict[str, Any]:
        """As results and reports hold it."""
        return {
            "set_aside": dict(self.rejects),
            "quarantined": [dataclasses.asdict(reject) for reject in self.quarantined],
        }


@dataclasses.dataclass
class LabelledPool:
    """Usable documents of one class.

    Attributes:
        name: "positive" or "negative".
        documents: with distinct texts; ids may repeat.
        set_aside: what is not used.
    """

    name: str
    documents: list[Document]
    set_aside: SetAside = dataclasses.field(default_factory=SetAside)


@dataclasses.dataclass
class SourceProgress:
    """How far the reading of sources is.

    Within a file it goes by the texts, which are about as long as the file; a compressed file counts when it is read.

    Attributes:
        unit: what is counted, "B" or "shard", as `progress_sizes` gives it.
        total: so much in all.
        done: so much is read.
    """

    unit: str = "B"
    total: int = 0
    done: int = 0


def read_usable(
    sources: Sequence[str],
    reading: Reading,
    set_aside: SetAside,
    progress: SourceProgress | None = None,
    extensions: Sequence[str] | None = None,
) -> Iterator[Document]:
    """The documents of sources that have text which can be encoded.

    As in `curate`, nothing is used of a file of many documents that breaks off.

    Args:
        sources: source strings.
        reading: how records become documents.
        set_aside: is told of the others.
        progress: is told how far the reading is; its total before the first document is read.
        extensions: endings of the file names to take from folders; all if None.

    Raises:
        DataError: a source does not exist.
    """
    shards, skipped = plan_shards(sources, extensions)
    set_aside.rejects.update(reject.reason for reject in skipped)
    progress = progress or SourceProgress()
    progress.unit, sizes = progress_sizes(shards)
    progress.total = sum(sizes.values())
    return _read_usable(shards, reading, set_aside, progress, sizes)


def _read_usable(
    shards: Sequence[InputShard],
    reading: Reading,
    set_aside: SetAside,
    progress: SourceProgress,
    sizes: Mapping[int, int],
) -> Iterator[Document]:
    before = 0
    for shard in shards:
        within, end = before, before + sizes[shard.index]
        grows = progress.unit == "B" and not any(place.lower().endswith(_COMPRESSED) for place, _ in shard.files)
        try:
            for found in read_whole_shard(shard, reading):
                if isinstance(found, Reject):
                    set_aside.rejects[found.reason] += 1
                elif not found.text.strip():
                    set_aside.rejects["empty text"] += 1
                else:
                    if grows:
                        within += len(found.text.encode())
                        progress.done = min(within, end)
                    yield found
        except Damage as damage:
            set_aside.quarantined.append(damage.reject)
        progress.done = before = end


def check_pool(name: str, source: str, text_field: str = "text") -> None:
    """Checks that a candidate has `MIN_DOCUMENTS` usable documents; reads no more of it than shows that.

    Args:
        name: what to call it.
        source: of its documents.
        text_field: field of the text in records.

    Raises:
        PoolError: it has fewer.
        DataError: the source does not exist.
    """
    set_aside, texts = SetAside(), set[bytes]()
    for document in read_usable([source], Reading(text_field), set_aside):
        size = len(texts)
        texts.add(digest(document.text))
        if len(texts) == size:
            set_aside.rejects["duplicate"] += 1
        if len(texts) == MIN_DOCUMENTS:
            return
    raise PoolError(
        f"the pool {name} ({source}) has {len(texts)} usable documents, needed are at least {MIN_DOCUMENTS}; set "
        f"aside: {set_aside}"
    )


def read_pools(
    positive: Sequence[str], negative: Sequence[str], text_field: str = "text", max_documents: int | None = None
) -> tuple[LabelledPool, LabelledPool]:
    """Reads both pools.

    Args:
        positive: sources of the positive pool.
        negative: sources of the negative pool.
        text_field: field of the text in records.
        max_documents: most documents of a pool, chosen by the hash of their text; None takes all.

    Returns:
        The positive and the negative pool. A text that is in both is in neither: its label is not known.

    Raises:
        PoolError: a pool has less than `MIN_DOCUMENTS` usable documents.
        DataError: a source does not exist.
    """
    # What is in both must be known before some are chosen. So the positive pool, as a rule the smaller, is read twice.
    in_positive = {_key(document) for document in read_usable(positive, Reading(text_field), SetAside())}
    negative_pool, in_negative = _read_pool("negative", negative, text_field, max_documents, in_positive)
    positive_pool, _ = _read_pool("positive", positive, text_field, max_documents, in_negative)
    for pool, sources in ((positive_pool, positive), (negative_pool, negative)):
        if len(pool.documents) < MIN_DOCUMENTS:
            raise PoolError(
                f"the {pool.name} pool ({', '.join(sources) or 'no source'}) has {len(pool.documents)} usable "
                f"documents, needed are at least {MIN_DOCUMENTS}; set aside: {pool.set_aside}"
            )
    return positive_pool, negative_pool


def _read_pool(
    name: str, sources: Sequence[str], text_field: str, max_documents: int | None, in_other: Set[int]
) -> tuple[LabelledPool, set[int]]:
    """Reads a pool; in memory are the documents chosen, and of the others the hash.

    Returns:
        The pool, and the hashes of all its texts.
    """
    set_aside, seen, chosen = SetAside(), set[int](), dict[int, Document]()
    largest: list[int] = []  # hashes of those chosen, negative, as a heap
    for document in read_usable(sources, Reading(text_field), set_aside):
        key = _key(document)
        if key in seen:
            set_aside.rejects["duplicate"] += 1
            continue
        seen.add(key)
        if key in in_other:
            set_aside.rejects["in both pools"] += 1
            continue
        chosen[key] = document
        if max_documents is not None:
            heapq.heappush(largest, -key)
            if len(chosen) > max_documents:
                del chosen[-heapq.heappop(largest)]
    return LabelledPool(name, list(chosen.values()), set_aside), seen


def _key(document: Document) -> int:
    return int.from_bytes(digest(document.text))


def digest(text: str) -> bytes:
    """What stands for a text: equal for equal texts, and spread evenly."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def hash_fraction(text: str, seed: int) -> float:
    """Where a text lies in [0, 1), by its content and a seed alone."""
    key = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(key, "little") / 2**64
