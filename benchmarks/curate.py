"""How fast `curate` and `classify` are beside datatrove, on two workers, and in how much memory.

    pip install datatrove spacy fasteners psutil   # in an environment of its own: it does not run with xxhash 4
    python -m benchmarks.curate SOURCE SOURCE [...] [--limit 600] [--sizes 0.1 0.5 2] [--workdir DIR]

A source is what `curate` reads; the classifier learns to tell the first from the others. Every cell runs alone in a
process of its own, bound to as many cores as it has workers. A call that was interrupted goes on with the cells that
its workdir lacks. Large sizes that would take the cells beyond `--minutes`, at the speed measured before, are left out,
and said so. `--table` prints the recorded figures as docs/curate.md has them.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import curate_cells as cells
from benchmarks.results import RESULTS_DIR, Benchmark, load
from cpm_jax.common.files import write_json

FASTER = 1.5  # times datatrove
SCALING = 1.8  # two workers, of one process
MEMORY = 2.0  # GB, of all processes
FLAT = 0.8  # the peak of the smallest input, of that of the largest
_POOL_GIGABYTES = 0.1  # that are scored by one process and by two workers
_SCALED = 0.5  # GB that `curate` reads in one process too: with less, the workers' start and the last shard would count
_INTERVAL = 0.2  # seconds between looks at the memory

Cells = dict[str, dict[str, Any]]


def _start(function: Callable[..., Any], arguments: Sequence[Any], cores: int, path: Path) -> None:
    """In the process of a cell."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    write_json(path, function(*arguments))


def resident(process: Any) -> int:
    """Bytes that a process and all it has started hold, shared pages counted in each."""
    import psutil

    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def run_cell(name: str, workdir: Path, function: Callable[..., Any], *arguments: Any, cores: int = 1) -> dict[str, Any]:
    """Runs a cell, or reads what an earlier call found.

    Raises:
        RuntimeError: its process failed; it has said why.
    """
    import psutil

    path = workdir / "cells" / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))
    print(f"{name} …", flush=True)
    found = workdir / "found.json"
    found.unlink(missing_ok=True)
    # Threads within a process would make two cores of one.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = multiprocessing.get_context("spawn").Process(target=_start, args=(function, arguments, cores, found))
    begin, peak = time.perf_counter(), 0
    process.start()
    try:
        watched = psutil.Process(process.pid)
        while process.is_alive():
            peak = max(peak, resident(watched))
            process.join(_INTERVAL)
    except psutil.NoSuchProcess:
        process.join()
    if process.exitcode:
        raise RuntimeError(f"the cell {name} ended with exit code {process.exitcode}")
    result = json.loads(found.read_text("utf-8")) | {
        "wall_seconds": time.perf_counter() - begin,
        "peak_bytes": peak,
        "cores": cores,
    }
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    return result


def run_all(sources: Sequence[str], limit: int, sizes: Sequence[float], minutes: float, workdir: Path) -> Cells:
    """All cells in order, those of the pipeline as long as the time allows."""
    done: Cells = {}
    scaled = min(sizes, key=lambda size: abs(size - _SCALED))

    def run(name: str, function: Callable[..., Any], *arguments: Any, cores: int = 1) -> None:
        done[name] = run_cell(name, workdir, function, workdir, *arguments, cores=cores)

    done["documents"] = run_cell("documents", workdir, cells.collect, sources, limit, workdir)
    run("chain", cells.chain)
    run("dedup", cells.near_duplicates)
    run("train", cells.train)
    run("score", cells.score)
    for workers in (0, 2):
        run(f"scoring, {workers} workers", cells.score_in_pool, _POOL_GIGABYTES, workers, cores=workers or 1)
    for size in sizes:
        name = f"pipeline, {size:g} GB, 2 workers"
        spent = sum(cell["wall_seconds"] for cell in done.values())
        known = [cell for key, cell in done.items() if key.startswith("pipeline") and cell["cores"] == 2]
        expected = 1e9 * size * known[-1]["wall_seconds"] / known[-1]["bytes"] if known else 0.0
        measured = (workdir / "cells" / f"{name}.json").exists()
        if size > scaled and not measured and spent + expected > 60 * minutes:
            print(f"{name}: left out, it would take {expected / 60:.0f} minutes more; --minutes allows {minutes:g}")
            continue
        run(name, cells.pipeline, size, 2, cores=2)
        if size == scaled:
            run(f"pipeline, {size:g} GB, 0 workers", cells.pipeline, size, 0)
    return done


def add_speed(benchmark: Benchmark, metric: str, cell: Mapping[str, Any], against: str, name: str) -> None:
    """Documents and bytes per second and core, beside one of datatrove's."""
    for unit, amount in (("documents/s/core", cell["about"]["documents"]), ("MB/s/core", cell["about"]["bytes"] / 1e6)):
        benchmark.add(
            metric,
            unit,
            amount / cell["ours"]["seconds"],
            larger_is_better=True,
            baseline_name=name,
            baseline=amount / cell[against]["seconds"],
            goal=FASTER,
        )


def report(found: Cells) -> Benchmark:
    """The rows of all cells."""
    benchmark = Benchmark("curate", "python -m benchmarks.curate SOURCES, see docs/curate.md")
    about = found["documents"]
    benchmark.add("English documents", "", about["documents"], larger_is_better=True)
    benchmark.add("bytes of a document", "", about["bytes"] / about["documents"], larger_is_better=True)
    add_speed(benchmark, "all filters", found["chain"], "datatrove", "datatrove's filters and formatters")
    add_speed(
        benchmark,
        "classifier",
        found["score"],
        "datatrove, preprocessed",
        "datatrove's fastText filter after the published preprocessing",
    )
    add_speed(
        benchmark,
        "classifier, beside a filter without preprocessing",
        found["score"],
        "datatrove",
        "datatrove's fastText filter alone",
    )
    add_speed(benchmark, "near duplicates", found["dedup"], "datatrove", "datatrove's MinHash, four stages")
    for metric, stage, name in (
        ("all filters, kept", "chain", "datatrove"),
        ("classifier, kept", "score", "datatrove, preprocessed"),
        ("near duplicates, kept", "dedup", "datatrove"),
    ):
        kept = {key: found[stage][key]["kept"] for key in ("ours", name)}
        benchmark.add(
            f"{metric} of {found[stage]['about']['documents']}",
            "documents",
            kept["ours"],
            larger_is_better=True,
            baseline_name=name,
            baseline=kept[name],
        )
    runs = {name: cell for name, cell in found.items() if name.startswith("pipeline")}
    alone = next(cell for cell in runs.values() if cell["cores"] == 1)
    pooled = [cell for cell in runs.values() if cell["cores"] == 2]
    beside = next(cell for cell in pooled if cell["bytes"] == alone["bytes"])
    scored, scored_by_two = (found[f"scoring, {workers} workers"] for workers in (0, 2))
    for metric, one, two in (("curate", alone, beside), ("classify, scoring", scored, scored_by_two)):
        benchmark.add(
            f"{metric}, 2 workers on 2 cores, {two['bytes'] / 1e9:.2g} GB",
            "MB/s",
            two["bytes"] / two["seconds"] / 1e6,
            larger_is_better=True,
            baseline_name="one process on one core",
            baseline=one["bytes"] / one["seconds"] / 1e6,
            goal=SCALING,
        )
    for cell in pooled:
        size = f"{cell['bytes'] / 1e9:.2g} GB"
        benchmark.add(
            f"curate, {size}, 2 workers, {cell['kept']} of {cell['documents']} documents kept",
            "documents/s",
            cell["documents"] / cell["seconds"],
            larger_is_better=True,
        )
        benchmark.add(
            f"curate, {size}: most memory of all processes together",
            "GB",
            cell["peak_bytes"] / 1e9,
            larger_is_better=False,
            baseline_name=f"at most {MEMORY:g} GB",
            baseline=MEMORY,
            goal=1.0,
        )
    if len(pooled) > 1:
        benchmark.add(
            f"curate, most memory: {pooled[-1]['bytes'] / 1e9:.2g} GB beside {pooled[0]['bytes'] / 1e9:.2g} GB",
            "GB",
            pooled[-1]["peak_bytes"] / 1e9,
            larger_is_better=False,
            baseline_name="the smallest input",
            baseline=pooled[0]["peak_bytes"] / 1e9,
            goal=FLAT,
        )
    return benchmark


def markdown(directory: Path = RESULTS_DIR) -> str:
    """The recorded figures as a table for docs/curate.md; a line that says so where there are none."""
    recorded = next((result for result in load(directory) if result["name"] == "curate"), None)
    if recorded is None:
        return "Not recorded yet."
    lines = ["| what | unit | ours | beside | ratio | goal |", "|---|---|---|---|---|---|"]
    for row in recorded["rows"]:
        ours, baseline, ratio, goal = (
            "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
            for value in (row.ours, row.baseline, row.ratio, row.goal)
        )
        beside = f"{row.baseline_name}: {baseline}" if baseline else ""
        missed = ", missed" if row.met is False else ""
        lines.append(f"| {row.metric} | {row.unit} | {ours} | {beside} | {ratio} | {goal}{missed} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what the workdir lacks, and writes results/curate.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="what curate reads, two at least")
    parser.add_argument("--limit", type=int, default=600, help="documents, an equal share of each source")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 0.5, 2.0], help="of the inputs, in GB")
    parser.add_argument("--minutes", type=float, default=20.0, help="of all cells together; above 0.5 GB")
    parser.add_argument("--workdir", type=Path, default=Path("runs/curate_speed"))
    parser.add_argument("--fresh", action="store_true", help="measure all cells again")
    parser.add_argument("--trial", action="store_true", help="write the results into the workdir instead")
    parser.add_argument("--table", action="store_true", help="print the recorded figures and measure nothing")
    args = parser.parse_args(argv)
    if args.table:
        print(markdown())
        return
    if len(args.sources) < 2:
        parser.error("give two sources at least: the classifier is trained to tell the first from the others")
    if args.fresh:
        shutil.rmtree(args.workdir, ignore_errors=True)
    args.workdir.mkdir(parents=True, exist_ok=True)
    found = run_all(args.sources, args.limit, sorted(args.sizes), args.minutes, args.workdir)
    report(found).write(args.workdir if args.trial else RESULTS_DIR)


if __name__ == "__main__":
    main()
