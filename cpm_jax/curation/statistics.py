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


class Statistics:
    """Counts and samples of documents.

    Attributes:
        documents: how many were kept.
        characters: in them.
        text_bytes: in them, as UTF-8.
        drops: dropped documents by reason.
        rejects: what could not be read, by reason.
        languages: kept documents by language.
        licences: kept documents by the licence that their metadata names.
        sources: kept documents by source.
        scores: a sample of each score of kept documents.
        lengths: a sample of their lengths in characters.
        excerpts: beginnings of texts, "" for kept ones, others by reason.
    """

    def __init__(self) -> None:
        self.documents = self.characters = self.text_bytes = 0
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
        self.languages[document.language] += 1
        self.sources[document.source] += 1
        if licence := document.metadata.get("license") or document.metadata.get("licence"):
            self.licences[str(licence)] += 1
        self.lengths.add(name, len(document.text))
        for score, value in document.scores.items():
            self.scores.setdefault(score, Sample(_SAMPLE)).add(name, value)

    def merge(self, other: "Statistics") -> None:
        """Takes in what another one counted."""
        self.documents += other.documents
        self.characters += other.characters
        self.text_bytes += other.text_bytes
        for name in ("drops", "rejects", "languages", "licences", "sources"):
            getattr(self, name).update(getattr(other, name))
        self.lengths.merge(other.lengths)
        for name, size in (("scores", _SAMPLE), ("excerpts", _EXCERPTS)):
            for key, sample in getattr(other, name).items():
                getattr(self, name).setdefault(key, Sample(size)).merge(sample)

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        plain = {name: getattr(self, name) for name in ("documents", "characters", "text_bytes")}
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
        for name in ("documents", "characters", "text_bytes"):
            setattr(self, name, value[name])
        for name in ("drops", "rejects", "languages", "licences", "sources"):
            getattr(self, name).update(value[name])
        self.lengths = Sample(_SAMPLE, value["lengths"])
        self.scores = {key: Sample(_SAMPLE, items) for key, items in value["scores"].items()}
        self.excerpts = {key: Sample(_EXCERPTS, items) for key, items in value["excerpts"].items()}
        return self
