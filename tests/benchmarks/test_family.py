"""The recorded family of small models gives its recorded prediction again."""

import json

import pytest

from benchmarks.family import NUM_PARAMS, TOKENS, add_rows
from benchmarks.results import RESULTS_DIR, Benchmark
from experiments import predict


@pytest.mark.slow
def test_the_recorded_runs_give_the_recorded_loss(tmp_path):
    """The fits are those of the record; with fewer samples the interval is only near it."""
    runs = RESULTS_DIR / "family_runs.jsonl"
    config = predict.PredictConfig(runs=str(runs), num_params=NUM_PARAMS, tokens=TOKENS, samples=10)
    found = predict.run(config, tmp_path)
    recorded = json.loads((RESULTS_DIR / "family.json").read_text("utf-8"))["rows"]
    bench = Benchmark("family")
    add_rows(bench, found, seconds=3600.0)
    by_metric = {row["metric"]: row["ours"] for row in recorded}
    for row in bench.rows:
        if "mean error" in row.metric or row.metric.endswith(": loss") or row.metric == "their compute":
            assert row.ours == pytest.approx(by_metric[row.metric], rel=1e-3), row.metric
    assert len(bench.rows) == len(recorded)
