"""What the family of small models says: how well its laws predict their own largest runs, and what they say of an 8B.

`python -m benchmarks.family [--runs FILE]`: the `runs.jsonl` of a finished sweep of `papers/minicpm4/family.gin`, or
without it the recorded one, `results/family_runs.jsonl`. Writes `results/family.json`, and keeps the runs beside it.
"""

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS_DIR, Benchmark
from cpm_jax.scaling.runs import read_runs
from experiments import predict

RECORDED = RESULTS_DIR / "family_runs.jsonl"
NUM_PARAMS, TOKENS = 8e9, 8e12


def add_rows(bench: Benchmark, found: Mapping[str, Any], seconds: float) -> None:
    """Adds the figures of a prediction and of the runs behind it, which took so long one after another."""
    bench.add(f"{found['runs']['given']} trainings", "hours", seconds / 3600, larger_is_better=False)
    bench.add("their compute", "FLOPs", found["spent_flops"], larger_is_better=False)
    for form in found["forms"]:
        held_out = form["held_out"]
        used = " (used)" if form["form"] == found["form"] else ""
        bench.add(
            f"{form['form']}{used}: mean error of the {len(held_out)} largest runs, predicted from the others",
            "of the loss",
            form["held_out_error"],
            larger_is_better=False,
        )
        bench.add(
            f"{form['form']}{used}: of these within their intervals",
            "runs",
            int(sum(held["covered"] for held in held_out)),
            larger_is_better=True,
            baseline_name="runs",
            baseline=len(held_out),
        )
    loss = found["loss"]
    for name in ("value", "low", "high"):
        said = "loss" if name == "value" else f"its interval, {name}"
        bench.add(f"8B on 8T tokens: {said}", "nats/token", loss[name], larger_is_better=False)
    rate = found["settings"]["learning_rate"]
    if rate["value"] is not None:
        bench.add(f"8B on 8T tokens: learning rate ({rate['note']})", "", rate["value"]["value"], larger_is_better=True)
    following = found["next"][0]
    bench.add(
        f"next experiment, {following['num_params']:.3g} parameters on {following['tokens']:.3g} tokens: narrower by",
        "of the interval",
        following["narrower"],
        larger_is_better=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Predicts, and writes the figures down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RECORDED, help="runs.jsonl of the finished sweep")
    runs = parser.parse_args(argv).runs
    config = predict.PredictConfig(runs=str(runs), num_params=NUM_PARAMS, tokens=TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        found = predict.run(config, Path(folder))
    bench = Benchmark("family", "python -m benchmarks.family")
    add_rows(bench, found, sum(run.seconds for run in read_runs(runs)))
    bench.write()
    if runs.resolve() != RECORDED:
        shutil.copyfile(runs, RECORDED)


if __name__ == "__main__":
    main()
