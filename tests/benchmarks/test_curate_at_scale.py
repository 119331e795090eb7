"""What curating a trillion tokens would cost, from known rates."""

import dataclasses

import pytest

from benchmarks import curate_at_scale
from benchmarks.curate_at_scale import KINDS, Rates, add_kind, add_recorded, classifier_rate, plan
from benchmarks.results import Benchmark, load
from cpm_jax.curation.dedup import DedupConfig

RATES = Rates(filter_bytes=4.4e6, write_bytes=4.4e7, kept=0.5, staged=0.25, decide_seconds=1e-3, shuffled=500)
TOKENS = 690e6  # a million documents, 3.036 GB


def test_the_plan_follows_from_the_rates():
    costs = plan(RATES, TOKENS, DedupConfig())
    expected = {
        "filter, core hours": 690 / 3600,
        "find duplicates, core hours": 500 / 3600,
        "write, core hours": 34.5 / 3600,
        "core hours": 1224.5 / 3600,
        "documents and scores between the stages, TB": 759e-6,
        "keys, TB": 500_000 * 8 * 20 / 1e12,
        "shuffles, TB": 250e-6,
    }
    assert costs == pytest.approx(expected)
    # The classifier scores what the filters keep, 1.518 GB.
    costs = plan(dataclasses.replace(RATES, classify_bytes=0.759e6), TOKENS, DedupConfig())
    more = {"classifier, core hours": 2000 / 3600, "core hours with the classifier": 3224.5 / 3600}
    assert costs == pytest.approx(expected | more)


def record(directory, name, *rows):
    benchmark = Benchmark(name, "command")
    for metric, unit, value in rows:
        benchmark.add(metric, unit, value, larger_is_better=True)
    benchmark.write(directory, {"commit": "c", "date": "d", "machine": {}})


def test_the_rate_of_the_classifier_is_that_of_its_own_core_where_there_is_one(tmp_path):
    with pytest.raises(ValueError, match="has no rate of the classifier"):
        classifier_rate(tmp_path)
    speeds = [("A: scoring in one process", "MB/s", 1.0), ("B: scoring in one process", "MB/s", 0.25)]
    record(tmp_path, "classify", *speeds, ("A: scoring in one process", "documents/s", 300.0))
    rate, place = classifier_rate(tmp_path)
    assert (rate, place) == (pytest.approx(2e6 / (1 / 1.0 + 1 / 0.25)), "results/classify.json")
    beside = ("classifier, beside a filter without preprocessing", "MB/s/core", 9.0)
    record(tmp_path, "curate", ("classifier", "documents/s/core", 400.0), ("classifier", "MB/s/core", 0.8), beside)
    assert classifier_rate(tmp_path) == (pytest.approx(0.8e6), "results/curate.json")


def test_recorded_rates_give_the_rows_of_the_measurement_and_of_the_classifier(tmp_path):
    record(tmp_path, "curate", ("classifier", "MB/s/core", 0.759))
    before = Benchmark("curate_at_scale", "command")
    before.add("find duplicates", "documents/s/core", 1 / RATES.decide_seconds, larger_is_better=True)
    before.add("find duplicates, shuffles", "bytes/document", RATES.shuffled, larger_is_better=False)
    for kind in KINDS:
        add_kind(before, kind, RATES, 1e12)
    before.write(tmp_path, {"commit": "measured here", "date": "then", "machine": {"cores": 2}})
    again = Benchmark("curate_at_scale", "command")
    measured = add_recorded(again, tmp_path, 1e12)
    assert measured == {"commit": "measured here", "date": "then", "machine": {"cores": 2}}
    found = {row.metric: row.ours for row in again.rows}
    assert {name: found[name] for name in (row.metric for row in before.rows)} == pytest.approx(
        {row.metric: row.ours for row in before.rows}
    )
    assert found["classifier, recorded in results/curate.json"] == pytest.approx(0.759)
    hours = found["text, 1e+12 tokens: core hours"] + found["text, 1e+12 tokens: classifier, core hours"]
    assert found["text, 1e+12 tokens: core hours with the classifier"] == pytest.approx(hours)
    assert found["web pages, 1e+12 tokens on 100 cores with the classifier"] == pytest.approx(hours / 2400)
    # A second time nothing is lost, and nothing is there twice.
    again.write(tmp_path, measured)
    third = Benchmark("curate_at_scale", "command")
    add_recorded(third, tmp_path, 1e12)
    assert {row.metric: row.ours for row in third.rows} == pytest.approx(found)
    assert len(third.rows) == len(again.rows) == len(found)
    with pytest.raises(ValueError, match=r"no plan of 1e\+09 tokens from text is recorded"):
        add_recorded(Benchmark("curate_at_scale", "command"), tmp_path, 1e9)


def test_the_recorded_plan_has_the_classifier():
    rows = {row.metric for result in load() if result["name"] == "curate_at_scale" for row in result["rows"]}
    assert {f"{kind}, 1e+12 tokens: classifier, core hours" for kind in curate_at_scale.KINDS} <= rows
