"""How long `make quickstart-sweep` takes on two cores, what it recommends, and its bill.

`python -m benchmarks.quickstart_sweep [VARIABLE=VALUE ...]`: everything but `--workdir` goes to make.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Benchmark

CORES = 2
LIMIT_MINUTES = 15.0


def run_quickstart_sweep(workdir: Path, flags: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """Runs the target on two cores.

    Args:
        workdir: a new folder.
        flags: for make.

    Returns:
        Wall seconds, and the sweep's summary.

    Raises:
        subprocess.CalledProcessError: the run failed; it has said why.
        RuntimeError: the machine has too few cores.
    """
    before = os.sched_getaffinity(0)
    if len(before) < CORES:
        raise RuntimeError(f"{CORES} cores are needed, this process may use {len(before)}")
    os.sched_setaffinity(0, sorted(before)[:CORES])  # the child inherits it
    try:
        begin = time.perf_counter()
        command = ["make", "quickstart-sweep", f"SWEEP={workdir}", *flags]
        subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])
        seconds = time.perf_counter() - begin
    finally:
        os.sched_setaffinity(0, before)
    return seconds, json.loads((workdir / "summary.json").read_text("utf-8"))


def add_rows(bench: Benchmark, seconds: float, summary: dict[str, Any]) -> None:
    """Adds the figures of one run."""
    bench.add(
        "data prepared, swept, reported",
        "minutes",
        seconds / 60,
        larger_is_better=False,
        baseline_name=f"at most {LIMIT_MINUTES:.0f} minutes",
        baseline=LIMIT_MINUTES,
        goal=1.0,
    )
    for best in summary["best"]:
        for step in best["one_step_wrong"]:
            bench.add(
                f"width {best['group']}: held-out loss at the best learning rate, {step['best']}",
                "nats/token",
                best["loss"],
                larger_is_better=False,
                baseline_name=f"at {step['other']}",
                baseline=best["loss"] + step["cost"],
            )
    shared = summary["for_all_groups"]
    bench.add(
        f"learning rate {shared['choices']['PEAK_LR']} at every width: loss above the best of the width, at most",
        "nats/token",
        shared["regret"],
        larger_is_better=False,
    )
    bill = summary["bill"]
    bench.add(
        f"the sweep of {sum(summary['trials'].values())} trials",
        "FLOPs",
        bill["flops"],
        larger_is_better=False,
        baseline_name=f"the same at full size ({bill['full_size']})",
        baseline=bill["naive_flops"],
    )
    bench.add("the sweep", "core-hours", bill["core_hours"], larger_is_better=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes `results/quickstart_sweep.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, help="a new folder, kept; else a temporary one")
    args, flags = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        workdir = (args.workdir or Path(temporary) / "sweep").absolute()
        if workdir.exists():
            parser.error(f"--workdir={workdir} exists: a run that goes on there would take no time")
        seconds, summary = run_quickstart_sweep(workdir, flags)
    bench = Benchmark("quickstart_sweep", "python -m benchmarks.quickstart_sweep")
    add_rows(bench, seconds, summary)
    bench.write()


if __name__ == "__main__":
    main()
