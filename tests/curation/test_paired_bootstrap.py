"""The test of two candidates: beside scipy's in the cases that it knows, else by simulation."""

import numpy as np
import pytest
import scipy.stats

from cpm_jax.curation.paired_bootstrap import paired_difference, seed_spread, seeds_needed


def crossed(rng, items, seeds, *, effect=0.0, item=1.0, seed=0.1, rest=0.5):
    """A table of differences: an effect of the item, one of the seed, and a rest."""
    table = effect + item * rng.normal(size=(1, items)) + seed * rng.normal(size=(seeds, 1))
    return table + rest * rng.normal(size=(seeds, items))


def test_with_one_seed_it_is_the_paired_t_test_over_items():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.1, 1, (1, 300)), rng.normal(0, 1, (1, 300))
    found = paired_difference([a], [b], [np.ones(300)])
    theirs = scipy.stats.ttest_rel(a[0], b[0])
    assert found.value == pytest.approx((a - b).mean())
    assert found.p_value == pytest.approx(theirs.pvalue, rel=0.1)
    np.testing.assert_allclose(found.interval, theirs.confidence_interval(), rtol=0.05, atol=0.01)
    assert found.seed_variance == 0


def test_where_only_seeds_differ_it_is_the_paired_t_test_over_seeds():
    per_seed = np.random.default_rng(1).normal(0.5, 1, 5)
    a = np.repeat(per_seed[:, None], 50, axis=1)
    found = paired_difference([a], [np.zeros_like(a)], [np.ones(50)])
    theirs = scipy.stats.ttest_1samp(per_seed, 0)
    assert found.seed_freedom == 4
    assert found.p_value == pytest.approx(theirs.pvalue, rel=0.1)
    np.testing.assert_allclose(found.interval, theirs.confidence_interval(), rtol=0.05)


def test_a_figure_is_the_mean_over_tasks_of_ratios():
    rng = np.random.default_rng(2)
    bits, num_bytes = rng.gamma(2, 100, (3, 40)), rng.gamma(2, 50, 40)
    right = rng.integers(0, 2, (3, 10)).astype(float)
    found = paired_difference([bits, right], [bits * 0.9, 1 - right], [num_bytes, np.ones(10)])
    expected = 0.1 * bits.sum(1).mean() / num_bytes.sum() + (2 * right - 1).mean()
    assert found.value == pytest.approx(expected / 2)


def test_the_variance_of_ratios_is_the_linearised_one():
    rng = np.random.default_rng(3)
    num_bytes = rng.gamma(2, 50, 500)
    difference = 0.05 * num_bytes + rng.normal(0, 3, 500)
    found = paired_difference([difference[None]], [np.zeros((1, 500))], [num_bytes])
    rest = difference - found.value * num_bytes
    assert found.standard_error == pytest.approx(np.sqrt((rest**2).sum()) / num_bytes.sum(), rel=0.05)


@pytest.mark.parametrize(("seeds", "seed_effect"), [(2, 0.2), (3, 0.0), (3, 0.1), (5, 0.3)], ids=str)
def test_it_does_not_find_differences_that_are_not_there(seeds, seed_effect):
    rng = np.random.default_rng(4)
    trials = 300
    found = 0
    for _ in range(trials):
        table = crossed(rng, 60, seeds, seed=seed_effect)
        found += paired_difference([table], [np.zeros_like(table)], [np.ones(60)], draws=600).p_value < 0.05
    assert scipy.stats.binomtest(found, trials, 0.05, alternative="greater").pvalue > 0.001


def test_it_finds_those_that_are_and_as_often_as_it_promises():
    rng = np.random.default_rng(5)
    effect = 0.5
    first = crossed(rng, 150, 4, effect=effect, seed=0.4, rest=0.2)
    needed = seeds_needed(paired_difference([first], [np.zeros_like(first)], [np.ones(150)]), effect)
    tables = (crossed(rng, 150, needed, effect=effect, seed=0.4, rest=0.2) for _ in range(100))
    power = np.mean([paired_difference([t], [0 * t], [np.ones(150)], draws=600).p_value < 0.05 for t in tables])
    assert 0.6 < power < 1.0  # 0.8, but for the error of the estimated variance


def test_seeds_cannot_help_where_items_leave_it_open():
    rng = np.random.default_rng(6)
    table = crossed(rng, 20, 3, effect=0.05, item=1.0, seed=0.0)
    assert seeds_needed(paired_difference([table], [0 * table], [np.ones(20)])) is None


def test_equal_candidates_are_equal():
    table = np.random.default_rng(7).normal(size=(3, 30))
    found = paired_difference([table], [table], [np.ones(30)])
    assert (found.value, found.p_value, found.interval) == (0.0, 1.0, (0.0, 0.0))


def test_the_same_input_gives_the_same_result():
    table = np.random.default_rng(8).normal(size=(3, 30))
    assert paired_difference([table], [0 * table], [np.ones(30)]) == paired_difference(
        [table], [0 * table], [np.ones(30)]
    )


def test_the_spread_of_seeds_is_that_of_differences_and_common_effects_do_not_count():
    rng = np.random.default_rng(9)
    common = rng.normal(0, 10, 3000)
    figures = common + rng.normal(0, 0.5, (4, 3000))
    found = seed_spread(figures)
    assert found.variance == pytest.approx(2 * 0.5**2, rel=0.05)
    assert found.freedom == 3 * 2999
    pair = figures[0] - figures[1]
    assert seed_spread(figures[:2]).variance == pytest.approx(pair.var(ddof=1))  # of two it is that of the pair
    assert seed_spread(figures[:1]) is None
    assert seed_spread(figures[:, :1]) is None


def test_seeds_that_agree_by_chance_are_not_believed_where_others_do_not():
    rng = np.random.default_rng(10)
    table = 0.3 + rng.normal(size=(1, 60)) + np.zeros((3, 1))
    alone = paired_difference([table], [0 * table], [np.ones(60)])
    among = paired_difference([table], [0 * table], [np.ones(60)], spread=seed_spread(rng.normal(0, 0.5, (5, 3))))
    assert alone.seed_variance == 0
    assert among.p_value > alone.p_value
    assert among.standard_error > alone.standard_error


@pytest.mark.parametrize("seed_effect", [0.0, 0.2, 1.0])
def test_many_pairs_of_equals_are_told_apart_no_more_often_than_the_level(seed_effect):
    rng = np.random.default_rng(11)
    found = []
    for _ in range(40):
        tables = rng.normal(size=(1, 1, 60)) + seed_effect * rng.normal(size=(5, 3, 1)) + rng.normal(size=(5, 3, 60))
        spread = seed_spread(tables.mean(2))
        found += [
            paired_difference([tables[i]], [tables[j]], [np.ones(60)], spread=spread, draws=400).p_value < 0.05
            for i, j in ((0, 1), (2, 3), (3, 4))
        ]
    assert np.mean(found) < 0.08
