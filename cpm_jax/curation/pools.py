"""Pools of documents to train a classifier on: read, without duplicates or contradictions, split by content."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

from cpm_jax.common.config import InputError
from cpm_jax.curation.document import Document
from cpm_jax.curation.readers import Damage, InputShard, Reading, plan_shards, progress_sizes, read_shard
from cpm_jax.data.sources import Reject

# Of files whose texts are longer than they are.
_COMPRESSED = (".gz", ".zst", ".parquet", ".array_record")

MIN_DOCUMENTS = 20  # of a pool: with fewer there is nothing to hold out, and nothing to learn


class PoolError(InputError):
    """A pool that cannot be used; says which and why."""


@dataclasses.dataclass
class Pool:
    """Usable documents of one class.

    Attributes:
        name: "positive" or "negative".
        documents: with distinct texts.
        rejects: what was set aside, counted by reason.
    """

    name: str
    documents: list[Document]
    rejects: collections.Counter[str]


@dataclasses.dataclass
class Position:
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
    sources: Sequence[str], text_field: str, rejects: collections.Counter[str], position: Position | None = None
) -> Iterator[Document]:
    """The documents of sources that have text which can be encoded.

    Args:
        sources: source strings.
        text_field: field of the text in records.
        rejects: counts the others by reason.
        position: is told how far the reading is; its total before the first document is read.

    Raises:
        DataError: a source does not exist.
    """
    shards, skipped = plan_shards(sources)
    rejects.update(reject.reason for reject in skipped)
    position = position or Position()
    position.unit, sizes = progress_sizes(shards)
    position.total = sum(sizes.values())
    return _read_usable(shards, text_field, rejects, position, sizes)


def _read_usable(
    shards: Sequence[InputShard],
    text_field: str,
    rejects: collections.Counter[str],
    position: Position,
    sizes: Mapping[int, int],
) -> Iterator[Document]:
    before = 0
    for shard in shards:
        within, end = before, before + sizes[shard.index]
        grows = position.unit == "B" and not any(place.endswith(_COMPRESSED) for place, _ in shard.files)
        try:
            for found in read_shard(shard, Reading(text_field)):
                if isinstance(found, Reject):
                    rejects[found.reason] += 1
                elif not found.text.strip():
                    rejects["empty text"] += 1
                else:
                    if grows:
                        within += len(found.text.encode())
                        position.done = min(within, end)
                    yield found
        except Damage as damage:  # what came before the break is used
            rejects[damage.reject.reason] += 1
        position.done = before = end


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
        rejects: collections.Counter[str] = collections.Counter()
        by_digest: dict[bytes, Document] = {}
        for document in read_usable(sources, text_field, rejects):
            if by_digest.setdefault(digest(document.text), document) is not document:
                rejects["duplicate"] += 1
        pools.append((name, sources, rejects, by_digest))
    shared = pools[0][3].keys() & pools[1][3].keys()
    result = []
    for name, sources, rejects, by_digest in pools:
        for key in shared:
            del by_digest[key]
        if shared:
            rejects["in both pools"] += len(shared)
        chosen = sorted(by_digest)[:max_documents]
        if len(chosen) < MIN_DOCUMENTS:
            raise PoolError(
                f"the {name} pool ({', '.join(sources) or 'no source'}) has {len(chosen)} usable documents, needed are "
                f"at least {MIN_DOCUMENTS}; set aside: {dict(rejects) or 'none'}"
            )
        kept = set(chosen)
        result.append(Pool(name, [d for key, d in by_digest.items() if key in kept], rejects))
    return result[0], result[1]


def digest(text: str) -> bytes:
    """What stands for a text: equal for equal texts, and spread evenly."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def position(text: str, seed: int) -> float:
    """Where a text lies in [0, 1), by its content and a seed alone."""
    key = hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(key, "little") / 2**64
