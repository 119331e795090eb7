"""Stop strings are found wherever the text is cut, and trimmed exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm_jax.inference.stop_strings import StopStringFilter


def run(stop: list[str], pieces: list[str]) -> tuple[str, bool]:
    stop_filter = StopStringFilter(stop)
    shown = "".join(stop_filter.push(piece) for piece in pieces)
    return shown + stop_filter.flush(), stop_filter.stopped


@pytest.mark.parametrize(
    ("stop", "pieces", "text", "stopped"),
    [
        (["END"], ["abEN", "Dcd"], "ab", True),
        (["END"], ["abE", "N", "D"], "ab", True),
        (["END"], ["abEN", "cd"], "abENcd", False),
        (["END"], ["abEN"], "abEN", False),
        (["END"], ["EEND"], "E", True),
        (["aab"], ["aaaa", "b"], "aa", True),
        (["xyz", "y"], ["xyz"], "x", True),
        (["bc", "abc"], ["abc"], "", True),
        (["\n\n"], ["a\n", "\nb"], "a", True),
        ([], ["a", "b"], "ab", False),
        (["日本"], ["今日", "本"], "今", True),
    ],
)
def test_examples(stop, pieces, text, stopped):
    assert run(stop, pieces) == (text, stopped)


def test_nothing_comes_after_a_stop_string():
    stop_filter = StopStringFilter(["."])
    assert stop_filter.push("one. two") == "one"
    assert stop_filter.push(" three.") == ""
    assert stop_filter.flush() == ""


def test_text_that_cannot_begin_a_stop_string_is_passed_on_at_once():
    stop_filter = StopStringFilter(["END"])
    assert stop_filter.push("some E") == "some "
    assert stop_filter.push("N") == ""
    assert stop_filter.push("d") == "ENd"


def first_complete(stop: list[str], text: str) -> tuple[str, bool]:
    """The rule, character by character."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("ab", max_size=4), max_size=8),
)
def test_the_cut_into_pieces_does_not_matter(stop, pieces):
    assert run(stop, pieces) == first_complete(stop, "".join(pieces))
