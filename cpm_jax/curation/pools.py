"""Pools of documents to train a classifier on: read, without duplicates or contradictions, split by content."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
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
class Pool:
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
    sources: Sequence[str], text_field: str, set_aside: SetAside, position: SourceProgress | None = None
) -> Iterator[Document]:
    """The documents of sources that have text which can be encoded.

    As in `curate`, nothing is used of a file of many documents that breaks off.

    Args:
        sources: source strings.
        text_field: field of the text in records.
        set_aside: is told of the others.
        position: is told how far the reading is; its total before the first document is read.

    Raises:
        DataError: a source does not exist.
    """
    shards, skipped = plan_shards(sources)
    set_aside.rejects.update(reject.reason for reject in skipped)
    position = position or SourceProgress()
    position.unit, sizes = progress_sizes(shards)
    position.total = sum(sizes.values())
    return _read_usable(shards, text_field, set_aside, position, sizes)


def _read_usable(
    shards: Sequence[InputShard],
    text_field: str,
    set_aside: SetAside,
    position: SourceProgress,
    sizes: Mapping[int, int],
) -> Iterator[Document]:
    before = 0
    for shard in shards:
        within, end = before, before + sizes[shard.index]
        grows = position.unit == "B" and not any(place.endswith(_COMPRESSED) for place, _ in shard.files)
        try:
            for found in read_whole_shard(shard, Reading(text_field)):
                if isinstance(found, Reject):
                    set_aside.rejects[found.reason] += 1
                elif not found.text.strip():
                    set_aside.rejects["empty text"] += 1
                else:
                    if grows:
                        within += len(found.text.encode())
                        position.done = min(within, end)
                    yield found
        except Damage as damage:
            set_aside.quarantined.append(damage.reject)
        position.done = before = end


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
    for document in read_usable([source], text_field, set_aside):
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
) -> tuple[Pool, Pool]:
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
    pools = []
    for name, sources in (("positive", positive), ("negative", negative)):
        set_aside = SetAside()
        by_digest: dict[bytes, Document] = {}
        for document in read_usable(sources, text_field, set_aside):
            if by_digest.setdefault(digest(document.text), document) is not document:
                set_aside.rejects["duplicate"] += 1
        pools.append((name, sources, set_aside, by_digest))
    shared = pools[0][3].keys() & pools[1][3].keys()
    result = []
    for name, sources, set_aside, by_digest in pools:
        for key in shared:
            del by_digest[key]
        if shared:
            set_aside.rejects["in both pools"] += len(shared)
        chosen = sorted(by_digest)[:max_documents]
        if len(chosen) < MIN_DOCUMENTS:
            raise PoolError(
                f"the {name} pool ({', '.join(sources) or 'no source'}) has {len(chosen)} usable documents, needed are "
                f"at least {MIN_DOCUMENTS}; set aside: {set_aside}"
            )
        kept = set(chosen)
        result.append(Pool(name, [d for key, d in by_digest.items() if key in kept], set_aside))
    return result[0], result[1]


def digest(text: str) -> bytes:
    """What stands for a text: equal for equal texts, and spread evenly."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def position(text: str, seed: int) -> float:
    """Where a text lies in [0, 1), by its content and a seed alone."""
    key = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(key, "little") / 2**64
