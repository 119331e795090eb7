import numpy as np
import pytest
import scipy.stats

from cpm_jax.curation.paired_bootstrap import Difference
from cpm_jax.curation.verification import (
    BITS_PER_BYTE,
    DEFAULT,
    POINTS,
    Pair,
    Scores,
    anneal_mixture,
    compare_pairs,
    more_tokens,
    sentence,
    verdict,
)


def scores(unit=BITS_PER_BYTE, *, seeds=3, **offsets):
    """Tables of 200 items whose values are those of one candidate, shifted by each candidate's offset."""
    rng = np.random.default_rng(0)
    weights = rng.gamma(3, 100, 200)
    table = weights * (2 + 0.1 * rng.normal(size=200))
    values = {
        name: {"news": (table + weights * offset) + 0.02 * weights * rng.normal(size=(seeds, 200))}
        for name, offset in offsets.items()
    }
    return Scores(unit, {"news": weights}, values)


def test_mixture_is_the_default_mix_with_a_share_of_the_candidate():
    mixture = anneal_mixture(["/a", "/b"], [300, 100], "/edu", 0.3)
    assert [(c.name, c.path) for c in mixture.components] == [
        ("default0", "/a"),
        ("default1", "/b"),
        ("candidate", "/edu"),
    ]
    assert mixture.stages[0].weights == pytest.approx((0.525, 0.175, 0.3))
    alone = anneal_mixture(["/a", "/b"], [300, 100], "", 0.3)
    assert alone.stages[0].weights == pytest.approx((0.75, 0.25))
    assert len(alone.components) == 2


def test_fewer_bits_rank_first_and_more_points_do():
    bits = scores(default=0.0, good=-0.1, bad=0.1)
    assert bits.ranking() == ["good", DEFAULT, "bad"]
    points = scores(POINTS, default=0.0, good=0.1, bad=-0.1)
    assert points.ranking() == ["good", DEFAULT, "bad"]
    assert points.figure("good") == pytest.approx(210, abs=3)


@pytest.mark.parametrize("unit", [BITS_PER_BYTE, POINTS])
def test_pairs_are_oriented_so_that_the_first_is_better(unit):
    sign = 1 if unit.higher_is_better else -1
    pairs = compare_pairs(scores(unit, default=0.0, good=0.1 * sign, bad=-0.1 * sign))
    assert [(p.first, p.second) for p in pairs] == [("good", DEFAULT), ("good", "bad"), (DEFAULT, "bad")]
    assert all(p.significant and p.difference.value > 0 for p in pairs)
    assert pairs[1].difference.value == pytest.approx(0.2 * unit.scale, rel=0.05)
    assert all(p.adjusted_p_value >= p.difference.p_value for p in pairs)


def test_verdict_says_which_is_better_and_by_how_much():
    measured = scores(default=0.0, good=-0.1, bad=0.1)
    text = verdict(measured, compare_pairs(measured), 1_000_000, {"good": 0.3, "bad": 7.0})
    assert text.startswith("good is better than bad: +0.")
    assert "better than the default mix alone: good; worse than the default mix alone: bad" in text
    assert "after 3 annealings of 1,000,000 tokens" in text
    assert "bad (7.0 times)" in text
    assert "good (" not in text


def test_verdict_is_about_the_documents_where_the_seeds_share_them():
    """Three seeds that read a third of a candidate each may have read others; with more of it they did not."""
    measured = scores(default=0.0, good=-0.1, bad=0.1)
    text = verdict(measured, compare_pairs(measured), 1000, {"good": 1 / 3, "bad": 0.34})
    assert "read more than there is of bad: the verdict is about these documents" in text


def unclear(*, item_error, seed_error):
    """A difference of 0.01 that was not found with three seeds, its error of the items and of the seeds."""
    error = np.hypot(item_error, seed_error)
    found = Difference(
        value=0.01,
        standard_error=error,
        interval=(0.01 - 3 * error, 0.01 + 3 * error),
        p_value=0.3,
        seed_freedom=2,
        item_variance=item_error**2,
        seed_variance=seed_error**2,
        items=200,
        seeds=3,
    )
    return Pair("a", "b", found, 0.3)


def test_seeds_that_would_tell_are_counted_in_tokens():
    pair = unclear(item_error=0.0, seed_error=0.01)
    # The fewest seeds with which the t-test of one sample has a power of about 80%, found one after the other.
    one_seed = 0.01 * np.sqrt(3)
    needed = next(
        n
        for n in range(4, 1000)
        if (scipy.stats.t.ppf(0.975, n - 1) + scipy.stats.t.ppf(0.8, n - 1)) * one_seed / np.sqrt(n) < 0.01
    )
    assert more_tokens(pair, 1000) == 2 * 1000 * (needed - 3)
    said = sentence(pair, BITS_PER_BYTE, 1000)
    assert said.startswith("a and b are not distinguishable at this budget: +0.0100 ± 0.0300")
    assert f"about {2 * 1000 * (needed - 3):,} more tokens of training would tell them apart" in said


def test_items_that_leave_it_open_are_said():
    pair = unclear(item_error=0.01, seed_error=0.001)
    assert more_tokens(pair, 1000) is None
    assert "no number of seeds would tell them apart on these held-out items" in sentence(pair, BITS_PER_BYTE, 1000)


def test_one_candidate_is_compared_with_the_default_mix_and_one_seed_is_warned_of():
    measured = scores(seeds=1, default=0.0, good=-0.1)
    text = verdict(measured, compare_pairs(measured), 1000, {"good": 1.0})
    assert text.startswith("good is better than default")
    assert "add seeds before deciding" in text


def test_told_apart_needs_no_more_tokens():
    pairs = compare_pairs(scores(default=0.0, good=-0.1))
    assert more_tokens(pairs[0], 1000) == 0
