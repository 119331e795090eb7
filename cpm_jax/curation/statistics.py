"""What is known of many documents, in little memory, and the same however they are divided among workers."""

import collections
import hashlib
import heapq
from collections.abc import Mapping
from typing import Any

from cpm_jax.curation.document import Document

_SAMPLE = 500  # documents whose scores and lengths stand for all
_EXCERPTS = 5  # texts to show, of those kept and of each reason
_EXCERPT = 300  # characters of each
_MOST_NAMES = 1000  # of sources, languages, licences that are counted apart; records may each have another
_SHOWN_NAMES = 100  # of these
_NAME = 200  # characters of each
_TOTALS = ("documents", "characters", "text_bytes", "repeated_ids")


class Sample:
    """The `size` values whose names have the smallest hashes: a fixed sample, whatever the order of adding."""

    def __init__(self, size: int, items: list[tuple[int, Any]] | None = None):
        self.size = size
        self.items = items or []

    def add(self, name: str, value: Any) -> None:
        """Offers a value."""
        digest = hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest()
        self._push((int.from_bytes(digest), value))

    def _push(self, item: tuple[int, Any]) -> None:
        if len(self.items) < self.size or item[0] < self.items[-1][0]:
            self.items = heapq.nsmallest(self.size, [*self.items, item], key=lambda item: item[0])

    def merge(self, other: "Sample") -> None:
        """Takes in another sample."""
        self.items = heapq.nsmallest(self.size, [*self.items, *other.items], key=lambda item: item[0])

    @property
    def values(self) -> list[Any]:
        """The values chosen."""
        return [value for _, value in self.items]


OTHER = "other"


def _merge_rare(counts: collections.Counter[str]) -> None:
    """Of too many names leaves the commonest; the others, some of which may come again, count as "other".

    What a shard gives so depends on its documents alone, and the sum on the order of the shards alone.
    """
    if len(counts) > 2 * _MOST_NAMES:
        few = common(counts, _MOST_NAMES)
        counts.clear()
        counts.update(few)


def common(counts: Mapping[str, int], most: int = _SHOWN_NAMES) -> dict[str, int]:
    """The commonest names, ordered, and "other" for the rest if there is one."""
    ranked = sorted(counts.items(), key=lambda item: (item[0] == OTHER, -item[1], item[0]))
    rest = sum(count for _, count in ranked[most:])
    return dict(ranked[:most]) | ({OTHER: rest} if rest else {})


class Statistics:
    """Counts and samples of documents.

    Attributes:
        documents: how many were kept.
        characters: in them.
        text_bytes: in them, as UTF-8.
        repeated_ids: kept documents whose id was that of an earlier one with another text.
        drops: dropped documents by reason.
        rejects: what could not be read, by reason.
        languages: kept documents by language.
        licences: kept documents by the licence that their metadata names.
        sources: kept documents by source. Of this and the two before: of very many names the rare ones as "other", and
            of a long one the beginning.
        scores: a sample of each score of kept documents.
        lengths: a sample of their lengths in characters.
        excerpts: beginnings of texts, "" for kept ones, others by reason.
    """

    def __init__(self) -> None:
        self.documents = self.characters = self.text_bytes = self.repeated_ids = 0
        self.drops: collections.Counter[str] = collections.Counter()
        self.rejects: collections.Counter[str] = collections.Counter()
        self.languages: collections.Counter[str] = collections.Counter()
        self.licences: collections.Counter[str] = collections.Counter()
        self.sources: collections.Counter[str] = collections.Counter()
        self.scores: dict[str, Sample] = {}
        self.lengths = Sample(_SAMPLE)
        self.excerpts: dict[str, Sample] = {}

    def add(self, document: Document) -> None:
        """Counts a document, kept or dropped."""
        name = f"{document.source}\0{document.id}"
        shown = self.excerpts.setdefault(document.dropped, Sample(_EXCERPTS))
        shown.add(name, [document.id, document.text[:_EXCERPT]])
        if document.dropped:
            self.drops[document.dropped] += 1
            return
        self.documents += 1
        self.characters += len(document.text)
        self.text_bytes += len(document.text.encode())
        self.languages[document.language[:_NAME]] += 1
        self.sources[document.source[:_NAME]] += 1
        if licence := document.metadata.get("license") or document.metadata.get("licence"):
            self.licences[str(licence)[:_NAME]] += 1
        self._bound()
        self.lengths.add(name, len(document.text))
        for score, value in document.scores.items():
            self.scores.setdefault(score, Sample(_SAMPLE)).add(name, value)

    def _bound(self) -> None:
        for counts in (self.languages, self.licences, self.sources):
            _merge_rare(counts)

    def merge(self, other: "Statistics") -> None:
        """Takes in what another one counted."""
        for name in _TOTALS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("drops", "rejects", "languages", "licences", "sources"):
            getattr(self, name).update(getattr(other, name))
        self._bound()
        self.lengths.merge(other.lengths)
        for name, size in (("scores", _SAMPLE), ("excerpts", _EXCERPTS)):
            for key, sample in getattr(other, name).items():
                getattr(self, name).setdefault(key, Sample(size)).merge(sample)

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        plain = {name: getattr(self, name) for name in _TOTALS}
        for name in ("drops", "rejects", "languages", "licences", "sources"):
            plain[name] = dict(sorted(getattr(self, name).items()))
        plain["lengths"] = self.lengths.items
        for name in ("scores", "excerpts"):
            plain[name] = {key: sample.items for key, sample in sorted(getattr(self, name).items())}
        return plain

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Statistics":
        """The inverse of `to_json`."""
        self = cls()
        for name in _TOTALS:
            setattr(self, name, value[name])
        for name in ("drops", "rejects", "languages", "licences", "sources"):
            getattr(self, name).update(value[name])
        self.lengths = Sample(_SAMPLE, value["lengths"])
        self.scores = {key: Sample(_SAMPLE, items) for key, items in value["scores"].items()}
        self.excerpts = {key: Sample(_EXCERPTS, items) for key, items in value["excerpts"].items()}
        return self
