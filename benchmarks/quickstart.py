"""How long `quickstart` takes on two cores, and how well its model predicts, beside zstd -19 and an n-gram model.

`python -m benchmarks.quickstart [--gin.NAME=VALUE ...]`: everything but `--cores` and `--workdir` goes to the verb.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Benchmark

LIMIT_MINUTES = 10.0


def run_quickstart(workdir: Path, flags: Sequence[str], cores: int) -> tuple[float, dict[str, Any]]:
    """Runs the verb in a process of its own.

    Args:
        workdir: a new folder.
        flags: for the verb.
        cores: how many cores the process may use.

    Returns:
        Wall seconds, and the results of the stages by name.

    Raises:
        subprocess.CalledProcessError: the run failed; it has said why.
        RuntimeError: the machine has too few cores, or cannot bind processes to some.
    """
    command = [sys.executable, "-m", "experiments.run", "quickstart", "--gin_file=runs/quickstart.gin"]
    before = os.sched_getaffinity(0)
    if len(before) < cores:
        raise RuntimeError(f"{cores} cores were asked for, this process may use {len(before)}")
    os.sched_setaffinity(0, sorted(before)[:cores])  # the child inherits it
    try:
        begin = time.perf_counter()
        subprocess.run([*command, f"--workdir={workdir}", *flags], check=True, cwd=Path(__file__).resolve().parents[1])
        seconds = time.perf_counter() - begin
    finally:
        os.sched_setaffinity(0, before)
    stages = json.loads((workdir / "stages.json").read_text("utf-8"))["stages"]
    return seconds, {name: stage["result"] for name, stage in stages.items()}


def add_rows(bench: Benchmark, seconds: float, results: dict[str, Any]) -> None:
    """Adds the figures of one run."""
    bench.add(
        "quickstart, start to report",
        "minutes",
        seconds / 60,
        larger_is_better=False,
        baseline_name=f"at most {LIMIT_MINUTES:.0f} minutes",
        baseline=LIMIT_MINUTES,
        goal=1.0,
    )
    scores = results["evaluate"]
    for key, name in (("zstd", "zstd -19"), ("zstd_primed", "zstd -19 + training text"), ("ngram", "5-gram model")):
        bench.add(
            "held-out text",
            "bits/byte",
            scores["model"]["value"],
            larger_is_better=False,
            baseline_name=name,
            baseline=scores[key]["value"],
        )
    if "max_error" in results["check"]:
        bench.add(
            "logits in transformers, largest difference",
            "of the largest",
            results["check"]["max_error"] / max(1.0, results["check"]["largest_logit"]),
            larger_is_better=False,
            baseline_name="at most 1e-4",
            baseline=1e-4,
            goal=1.0,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes `results/quickstart.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--workdir", type=Path, help="a new folder, kept; else a temporary one")
    args, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        workdir = args.workdir or Path(temporary) / "quickstart"
        if workdir.exists():
            parser.error(f"--workdir={workdir} exists: a run that goes on there would take no time")
        seconds, results = run_quickstart(workdir, flags, args.cores)
    bench = Benchmark("quickstart")
    add_rows(bench, seconds, results)
    bench.write()


if __name__ == "__main__":
    main()
