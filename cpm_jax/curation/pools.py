"""Pools of documents to train a classifier on: read, without duplicates or contradictions, split by content."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

from cpm_jax.common.config import InputError
from cpm_jax.curation.document import Document
from cpm_jax.curation.readers import Damage, Reading, plan_shards, read_shard
from cpm_jax.data.sources import Reject

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


def read_usable(sources: Sequence[str], text_field: str, rejects: collections.Counter[str]) -> Iterator[Document]:
    """The documents of sources that have text which can be encoded; the others are counted in `rejects`.

    Raises:
        DataError: a source does not exist.
    """
    shards, skipped = plan_shards(sources)
    rejects.update(reject.reason for reject in skipped)
    for shard in shards:
        try:
            for found in read_shard(shard, Reading(text_field)):
                if isinstance(found, Reject):
                    rejects[found.reason] += 1
                elif not found.text.strip():
                    rejects["empty text"] += 1
                else:
                    yield found
        except Damage as damage:  # what came before the break is used
            rejects[damage.reject.reason] += 1


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
    rejects: collections.Counter[str] = collections.Counter()
    texts = set[bytes]()
    for document in read_usable([source], text_field, rejects):
        size = len(texts)
        texts.add(digest(document.text))
        if len(texts) == size:
            rejects["duplicate"] += 1
        if len(texts) == MIN_DOCUMENTS:
            return
    raise PoolError(
        f"the pool {name} ({source}) has {len(texts)} usable documents, needed are at least {MIN_DOCUMENTS}; set "
        f"aside: {dict(rejects) or 'none'}"
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
