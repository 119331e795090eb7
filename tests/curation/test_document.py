"""The document and how filters compose."""

import dataclasses
import pickle

import pytest

from cpm_jax.curation.document import Document, FilterError, apply_filters, as_predicate
from cpm_jax.curation.filters import ExceptSourceFiles
from cpm_jax.data.errors import DataError


def upper(document: Document) -> Document:
    return dataclasses.replace(document, text=document.text.upper())


def no_spam(document: Document) -> Document:
    scored = document.with_score("spam", document.text.count("SPAM"))
    return scored.drop("spam") if scored.scores["spam"] else scored


def must_not_run(document: Document) -> Document:
    raise AssertionError("a dropped document went on")


def test_filters_run_in_order_and_stop_at_the_first_drop():
    kept = apply_filters(Document("ham", "1"), [upper, no_spam])
    assert (kept.text, kept.dropped, kept.scores) == ("HAM", "", {"spam": 0.0})
    dropped = apply_filters(Document("spam", "2"), [upper, no_spam, must_not_run])
    assert (dropped.text, dropped.dropped, dropped.scores) == ("SPAM", "spam", {"spam": 1.0})


class Picky:
    def __call__(self, document):
        return {}["key"]


def test_a_filter_that_fails_is_named_with_the_document():
    document = Document("ham", "file:3", "source")
    with pytest.raises(FilterError) as raised:
        apply_filters(document, [upper, Picky()])
    message = "filter Picky, document 'file:3' of 'source': raised KeyError: 'key'"
    assert str(raised.value) == message
    assert str(pickle.loads(pickle.dumps(raised.value))) == message  # from a worker to its parent
    with pytest.raises(FilterError, match=r"filter Picky.*raised KeyError"):
        apply_filters(document, [ExceptSourceFiles((Picky(),))])
    with pytest.raises(FilterError, match="returned None, accepted is a Document"):
        apply_filters(document, [lambda document: None])


def test_an_error_that_says_what_to_do_stays_what_it_is():
    def needs_library(document):
        raise DataError("pip install it")

    with pytest.raises(DataError, match=r"^pip install it$"):
        apply_filters(Document("ham", "1"), [needs_library])


def test_a_document_keeps_its_first_reason_and_is_not_changed_in_place():
    document = Document("a", "1", scores={"x": 1.0})
    assert document.drop("first").drop("second").dropped == "first"
    assert document.with_score("y", 2).scores == {"x": 1.0, "y": 2.0}
    assert (document.dropped, document.scores) == ("", {"x": 1.0})
    with pytest.raises(ValueError, match="needs a reason"):
        document.drop("")


def test_as_predicate_serves_frameworks_that_know_only_text():
    assert list(filter(as_predicate(no_spam), ["ham", "SPAM", "SPAM ham"])) == ["ham"]
