"""Paired comparison against SciPy's tests and against its own promise: the share of false alarms."""

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats

from cpm_jax.evaluation.comparison import Paired, _adjusted, compare, compare_values
from cpm_jax.evaluation.errors import ComparisonError
from cpm_jax.evaluation.results import Item, ItemWriter, Measured, items_path


def test_items_that_are_right_or_wrong_get_mcnemars_exact_test():
    a = np.array([1.0] * 40 + [1] * 9 + [0] * 2 + [0] * 30)
    b = np.array([1.0] * 40 + [0] * 9 + [1] * 2 + [0] * 30)
    found = compare_values(a, b, np.ones(81))
    tail = sum(math.comb(11, k) for k in range(0, 3)) / 2**11
    assert found["test"] == "McNemar, exact"
    assert found["p_value"] == pytest.approx(2 * tail)
    assert found["difference"] == pytest.approx(7 / 81)
    assert found["standard_error"] == pytest.approx(np.std(a - b, ddof=1) / 9)


def test_other_metrics_get_scipys_paired_t_test():
    rng = np.random.default_rng(0)
    a, noise = rng.normal(0, 1, 25), rng.normal(0.2, 0.5, 25)
    found = compare_values(a, a - noise, np.ones(25))
    assert found["test"] == "paired t"
    assert found["p_value"] == pytest.approx(scipy.stats.ttest_rel(a, a - noise).pvalue)


def test_the_interval_is_that_of_scipys_bootstrap():
    rng = np.random.default_rng(1)
    differences, weights = rng.normal(0.3, 1, 60), rng.integers(5, 50, 60).astype(float)
    found = compare_values(differences * weights, np.zeros(60), weights)
    known = scipy.stats.bootstrap(
        (differences * weights, weights),
        lambda d, w, axis=-1: d.sum(axis) / w.sum(axis),
        paired=True,
        method="percentile",
        rng=2,
    ).confidence_interval
    assert found["interval"] == pytest.approx((known.low, known.high), abs=0.02)


def test_one_in_twenty_comparisons_of_equals_is_a_false_alarm():
    rng = np.random.default_rng(3)
    alarms = {"McNemar, exact": [], "paired t": []}
    for _ in range(400):
        skill = rng.random(80)
        for name, a, b in (
            ("McNemar, exact", *(rng.random((2, 80)) < skill).astype(float)),
            ("paired t", *(skill + rng.normal(0, 1, (2, 80)))),
        ):
            found = compare_values(a, b, np.ones(80))
            assert found["test"] == name
            alarms[name].append(found["p_value"] < 0.05)
    assert 0.02 < np.mean(alarms["paired t"]) < 0.09
    assert np.mean(alarms["McNemar, exact"]) < 0.07  # the exact test errs on the safe side


def test_nothing_differs():
    same = np.array([0.0, 1.0, 1.0])
    found = compare_values(same, same, np.ones(3))
    assert (found["difference"], found["p_value"], found["interval"]) == (0, 1, (0, 0))
    assert compare_values(same[:1] + 0.5, same[:1], np.ones(1))["standard_error"] is None


def paired(task, p_value, metric="acc", difference=0.1, higher=True):
    return Paired(
        task, metric, higher, 100, 0.6, 0.5, difference, 0.04, (0.02, 0.18), "paired t", p_value, p_value, (12, 2), 0
    )


def test_holms_correction_over_the_main_metrics():
    found = _adjusted([paired("a", 0.01), paired("a", 0.5, "other"), paired("b", 0.04), paired("c", 0.03)])
    # By hand: sorted 0.01 · 3, 0.03 · 2, 0.04 · 1, never falling.
    assert [p.adjusted_p_value for p in found] == pytest.approx([0.03, 0.5, 0.06, 0.06])


def test_verdicts():
    assert paired("a", 0.01).verdict.startswith("This model is better on a: acc +0.1000, 95% interval +0.0200 to ")
    assert paired("a", 0.01, difference=-0.1).verdict.startswith("This model is worse on a")
    assert paired("a", 0.01, difference=-0.1, higher=False).verdict.startswith("This model is better on a")
    assert paired("a", 0.06).verdict.startswith("No difference in acc of a is shown by 100 items")


def write(folder, values, *, hashes="h", task="t", prompt="p"):
    folder.mkdir(exist_ok=True)
    items = [
        Item(i, f"{hashes}{i}", prompt, (), "", (), {"n": Measured(0.5), "acc": Measured(float(value))})
        for i, value in values.items()
    ]
    with ItemWriter(items_path(folder, task), ()) as writer:
        writer.write(items)
    (folder / "results.json").write_text(
        json.dumps({"tasks": {task: {"main_metric": "acc", "higher_is_better": {"acc": True, "n": True}}}})
    )
    return folder


def test_over_the_items_that_both_have(tmp_path):
    a = write(tmp_path / "a", {0: 1, 1: 1, 2: 0, 3: 1})
    b = write(tmp_path / "b", {3: 0, 1: 1, 2: 1, 7: 0}, prompt="q")
    found, other = compare(a, b)  # the main metric first
    assert (found.metric, other.metric) == ("acc", "n")
    assert (found.n, found.ours, found.theirs) == (3, 2 / 3, 2 / 3)
    assert found.changed == (1, 1)
    assert found.prompts_differ == 3
    turned, _ = compare(b, a)
    assert dataclasses.replace(turned, interval=found.interval) == found


def test_folders_that_cannot_be_compared(tmp_path):
    a = write(tmp_path / "a", {0: 1})
    with pytest.raises(ComparisonError, match="item 0 of t is not the same in"):
        compare(a, write(tmp_path / "b", {0: 1}, hashes="other"))
    with pytest.raises(ComparisonError, match="no item in common in t"):
        compare(a, write(tmp_path / "c", {1: 1}))
    with pytest.raises(ComparisonError, match=r"has no task in common with .*: it has u, and this evaluation t"):
        compare(a, write(tmp_path / "d", {0: 1}, task="u"))
    with pytest.raises(ComparisonError, match="not the folder of an evaluation that has ended"):
        compare(a, tmp_path)
    with pytest.raises(ComparisonError, match="acc of t is not finite for some items"):
        compare(a, write(tmp_path / "e", {0: math.nan}))
    (tmp_path / "results.json").write_text('{"tasks": 3}')
    with pytest.raises(ComparisonError, match="is not the results of an evaluation"):
        compare(a, tmp_path)
