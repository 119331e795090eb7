"""A document on its way through curation, and what a filter is.

A filter is any callable `Document -> Document`. It returns the document, perhaps with another text or with new scores;
to drop it, it returns `document.drop(reason)`. A dropped document is still a document and not `None`, so that the
reason, the scores and the text stay together for the report and for whoever asks why. The filters of this package are
frozen dataclasses whose fields are their thresholds, so that they compare, pickle and print. `apply_filters` runs
several in order; `as_predicate` is the same for frameworks that know only text and a yes or no
(`datasets.Dataset.filter`, `pandas`, Spark).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from cpm_jax.common.config import InputError


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        text: its text.
        id: what names it within its source and does not depend on where the source lies.
        source: where it came from, as the reader was told.
        url: its address on the web, "" if it has none.
        language: its language as ISO 639-1 ("en", "zh"), "" while nobody has looked.
        metadata: whatever else the source said of it; JSON values.
        scores: numbers that filters and classifiers gave it, by name; between filters they decide nothing.
        dropped: why it was dropped, as a short class of reasons by which drops are counted; "" for a kept one.
    """

    text: str
    id: str
    source: str = ""
    url: str = ""
    language: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dropped: str = ""

    def with_score(self, name: str, value: float) -> "Document":
        """The document with one more score, or a new value of it."""
        return dataclasses.replace(self, scores={**self.scores, name: float(value)})

    def drop(self, reason: str) -> "Document":
        """The document, dropped for `reason`; it keeps the first reason if it was dropped before.

        Raises:
            ValueError: the reason is empty.
        """
        if not reason:
            raise ValueError("reason = '': a drop needs a reason")
        return self if self.dropped else dataclasses.replace(self, dropped=reason)


Filter: TypeAlias = Callable[[Document], Document]


class FilterError(InputError):
    """A filter failed at a document; names both."""


def apply_filters(document: Document, filters: Sequence[Filter]) -> Document:
    """Applies filters in order, up to the first that drops the document.

    Raises:
        FilterError: one raised something, or did not return a document.
        InputError: one raised it, as where a library is missing.
    """
    for apply in filters:
        if document.dropped:
            break
        try:
            found = apply(document)
        except InputError:
            raise
        except Exception as error:
            raise _filter_error(apply, document, f"raised {type(error).__name__}: {error}") from error
        if not isinstance(found, Document):
            raise _filter_error(apply, document, f"returned {found!r:.100}, accepted is a Document")
        document = found
    return document


def _filter_error(apply: Filter, document: Document, what: str) -> FilterError:
    name = getattr(apply, "__qualname__", type(apply).__qualname__)
    return FilterError(f"filter {name}, document {document.id[:1000]!r} of {document.source[:1000]!r}: {what}")


def as_predicate(apply: Filter) -> Callable[[str], bool]:
    """A function of a text alone: whether the filter keeps it. Changes that it makes to the text are lost."""

    def keeps(text: str) -> bool:
        return not apply(Document(text, id="")).dropped

    return keeps
