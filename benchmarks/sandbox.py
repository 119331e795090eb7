"""What a sandbox costs beside a plain process, and how exactly it stops a program that takes too much.

    python -m benchmarks.sandbox

Times are medians of runs in turn; many at once are as many threads, each with one program after the other.
"""

import concurrent.futures
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from benchmarks.results import Benchmark
from cpm_jax.tools.bubblewrap import find_walls, run_behind_walls
from cpm_jax.tools.limits import Limits
from cpm_jax.tools.sandbox import run_python, run_sandboxed

REPEATS = 60
THREADS = 8
MIB = 1 << 20
BALLOONS = """
import os
for _ in range(7):
    if os.fork() == 0:
        break
held = []
while True:
    held.append(b"x" * (1 << 20))
"""


def plain(argv: list[str]) -> None:
    """A program without a sandbox, its output read."""
    subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, check=True)


def seconds(action: Callable[[], object]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def per_second(action: Callable[[], object]) -> float:
    """How many a second `THREADS` threads get done."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        start = time.perf_counter()
        list(pool.map(lambda _: action(), range(REPEATS)))
        return REPEATS / (time.perf_counter() - start)


def main() -> None:
    """Measures, and writes results/sandbox.json."""
    walls, reason = find_walls()
    if walls is None:
        raise SystemExit(f"error: this host cannot build a sandbox: {reason}")
    benchmark = Benchmark("sandbox")
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "true": (lambda: run_sandboxed(["true"]), lambda: plain(["true"])),
        "Python, empty program": (lambda: run_python(""), lambda: plain([sys.executable, "-c", ""])),
    }
    for name, (ours, theirs) in pairs.items():
        times = [(seconds(ours), seconds(theirs)) for _ in range(REPEATS)]
        mine, its = (1000 * statistics.median(column) for column in zip(*times, strict=True))
        benchmark.add(
            f"{name}, one call", "ms", mine, larger_is_better=False, baseline_name="plain process", baseline=its
        )
    for name, (ours, theirs) in pairs.items():
        rates = [(per_second(ours), per_second(theirs)) for _ in range(3)]
        mine, its = (statistics.median(column) for column in zip(*rates, strict=True))
        benchmark.add(
            f"{name}, {THREADS} at once",
            "calls/s",
            mine,
            larger_is_better=True,
            baseline_name="plain process",
            baseline=its,
        )
    limits = Limits(wall_seconds=60.0, cpu_seconds=60.0, memory_bytes=256 * MIB)
    taken = []
    for _ in range(5):
        outcome, _ = run_behind_walls(walls, [sys.executable, "-c", BALLOONS], stdin=b"", files={}, limits=limits)
        assert outcome.stopped == "memory", outcome
        taken.append(outcome.usage.memory_bytes / MIB)
    benchmark.add(
        "8 processes that grow, most memory seen when stopped",
        "MiB",
        max(taken),
        larger_is_better=False,
        baseline_name="limit",
        baseline=limits.memory_bytes / MIB,
    )
    benchmark.write()


if __name__ == "__main__":
    main()
