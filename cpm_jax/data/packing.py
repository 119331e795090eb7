"""Packs tokenised documents into records of at most seq_len + 1 tokens."""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, UInt32

from cpm_jax.data.records import PackedRecord


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDocuments:
    """Documents one after another, as they travel from the process that tokenised them.

    Attributes:
        tokens: the tokens of all documents.
        lengths: how many tokens each document has.
        loss_mask: per token, or None when all are learned.
    """

    tokens: UInt32[np.ndarray, " n"]
    lengths: UInt32[np.ndarray, " k"]
    loss_mask: Bool[np.ndarray, " n"] | None = None


class ConcatThenSplit:
    """Pre-training: documents are joined to one stream, which is cut every seq_len tokens.

    Record i holds the tokens i·seq_len … (i+1)·seq_len of the stream, both ends included, so that each token but the
    first is a target exactly once. A document that is cut goes on in the next record.
    """

    def __init__(self, seq_len: int):
        self._seq_len = seq_len
        self._tokens = np.zeros(0, np.uint32)
        self._starts = np.zeros(0, np.uint32)  # of documents within _tokens

    def add(self, documents: TokenizedDocuments) -> Iterator[PackedRecord]:
        """Appends documents to the stream and yields the records that they complete."""
        starts = len(self._tokens) + np.concatenate([[0], np.cumsum(documents.lengths)[:-1]])
        self._starts = np.concatenate([self._starts, starts[documents.lengths > 0].astype(np.uint32)])
        self._tokens = np.concatenate([self._tokens, documents.tokens])
        begin = 0
        while begin + self._seq_len < len(self._tokens):
            yield self._record(begin, begin + self._seq_len + 1)
            begin += self._seq_len
        self._tokens = self._tokens[begin:]
        self._starts = self._starts[np.searchsorted(self._starts, begin) :] - np.uint32(begin)

    def flush(self) -> Iterator[PackedRecord]:
        """Yields the last, shorter record, unless its tokens were all targets already."""
        if len(self._tokens) > 1:
            yield self._record(0, len(self._tokens))
        self._tokens, self._starts = self._tokens[:0], self._starts[:0]

    def _record(self, begin: int, end: int) -> PackedRecord:
        low, high = np.searchsorted(self._starts, [begin + 1, end])
        starts = np.concatenate([np.zeros(1, np.uint32), self._starts[low:high] - np.uint32(begin)])
        return PackedRecord(self._tokens[begin:end], starts, np.ones(end - begin, np.bool_))


class BestFitDecreasing:
    """Fine-tuning: each document lies whole in one record.

    Documents are taken from the longest to the shortest; each goes to the fullest record that still has room for it
    (best-fit decreasing, at most 11/9 of the fewest possible records and a constant: Johnson 1973). Documents are
    held in memory until `flush`.
    """

    def __init__(self, seq_len: int):
        self._capacity = seq_len + 1
        self._documents: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, documents: TokenizedDocuments) -> Iterator[PackedRecord]:
        """Takes documents in; yields nothing yet.

        Raises:
            ValueError: a document is longer than a record.
        """
        mask = documents.loss_mask if documents.loss_mask is not None else np.ones(len(documents.tokens), np.bool_)
        ends = np.cumsum(documents.lengths)[:-1]
        for tokens, learned in zip(np.split(documents.tokens, ends), np.split(mask, ends), strict=True):
            if len(tokens) > self._capacity:
                raise ValueError(f"a document of {len(tokens)} tokens does not fit a record of {self._capacity}")
            if len(tokens):
                self._documents.append((tokens, learned))
        yield from ()

    def flush(self) -> Iterator[PackedRecord]:
        """Yields all records, in the order of the first document that each holds."""
        for members in best_fit_decreasing([len(tokens) for tokens, _ in self._documents], self._capacity):
            tokens = [self._documents[i][0] for i in members]
            starts = np.cumsum([0, *map(len, tokens[:-1])]).astype(np.uint32)
            mask = np.concatenate([self._documents[i][1] for i in members])
            yield PackedRecord(np.concatenate(tokens), starts, mask)
        self._documents = []


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distributes items of `lengths` over bins of `capacity`.

    Returns:
        The indices of the items in each bin, ascending; bins in the order of their first item.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # free room -> bins that have it
    rooms: list[int] = []  # the keys of by_room, ascending
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            bins.append([item])
            chosen, room = len(bins) - 1, capacity
        else:
            room = rooms[at]
            chosen = by_room[room].pop()
            bins[chosen].append(item)
            if not by_room[room]:
                del by_room[room], rooms[at]
        left = room - length
        if left not in by_room:
            by_room[left] = []
            bisect.insort(rooms, left)
        by_room[left].append(chosen)
    return sorted(sorted(members) for members in bins)
