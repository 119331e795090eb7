"""What `sparse_recall` trained and tested, as figures: accuracies with their spread over seeds, curves, a table.

    python -m benchmarks.sparse_recall_report --work DIR

Accuracies are of the seeds whose dense twin solves recall, of all if none does, and it says how many do. It goes by the
files `training.json` and `accuracy.json` in the folders of cells, wherever they were computed.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS_DIR, Benchmark
from benchmarks.sparse_recall import FULL, INFLLM, TASKS, VARIANTS
from cpm_jax.common.figures import Series, bar_figure, line_figure

Accuracies = dict[tuple[int, str, str], list[float]]  # of each seed in percent, by length, task and variant
# What the dense twin must reach in recall: a seed that never learned the task dense says nothing of what came after.
SOLVED = 95.0


def gather(work: Path) -> tuple[Accuracies, dict[tuple[int, str], dict[str, Any]]]:
    """Reads what there is: accuracies, and the trainings by length and variant."""
    accuracies: Accuracies = {}
    trainings = {}
    lengths = sorted(int(path.name) for path in work.iterdir() if path.name.isdecimal())
    for length, variant in ((length, variant) for length in lengths for variant in VARIANTS):
        folder = work / str(length) / variant
        if (folder / "accuracy.json").exists():
            trainings[length, variant] = json.loads((folder / "training.json").read_text("utf-8"))
            for task, shares in json.loads((folder / "accuracy.json").read_text("utf-8")).items():
                accuracies[length, task, variant] = [100 * share for share in shares]
    return accuracies, trainings


def solved_seeds(accuracies: Accuracies, length: int) -> tuple[int, ...]:
    """The seeds whose dense twin, trained on with full attention, solves the task."""
    return tuple(i for i, value in enumerate(accuracies[length, "recall", FULL]) if value >= SOLVED)


def of_solved_seeds(accuracies: Accuracies) -> Accuracies:
    """Leaves the other seeds out, at lengths at which any is solved; lengths without a dense twin are left out."""
    seeds = {}
    for length, task, name in accuracies:
        if (task, name) == ("recall", FULL):
            values = accuracies[length, task, name]
            seeds[length] = solved_seeds(accuracies, length) or tuple(range(len(values)))
    return {key: [values[i] for i in seeds[key[0]]] for key, values in accuracies.items() if key[0] in seeds}


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; 0 of a single one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _mean_and_spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {spread(values):.1f}" if len(values) > 1 else "")


def markdown(accuracies: Accuracies) -> str:
    """The table of the page: mean ± standard deviation over seeds, by variant, length and task."""
    columns = sorted({(length, task) for length, task, _ in accuracies}, key=lambda c: (c[0], list(TASKS).index(c[1])))
    lines = ["| | " + " | ".join(f"{length}, {task}" for length, task in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for variant in VARIANTS:
        cells = [accuracies.get((length, task, variant)) for length, task in columns]
        shown = ["" if x is None else _mean_and_spread(x) for x in cells]
        if any(shown):
            lines.append(f"| {variant} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def add_rows(bench: Benchmark, accuracies: Accuracies) -> None:
    """The rows of `sparse_recall.json`; a variant without its dense twin is left out."""
    for (length, task, variant), values in accuracies.items():
        if (length, task, FULL) not in accuracies:
            continue
        name = f"{length} tokens, {task}, {variant}: right answers, mean of {len(values)} seeds"
        mean, full = statistics.mean(values), statistics.mean(accuracies[length, task, FULL])
        goal = {"baseline_name": "at least", "baseline": 95.0, "goal": 1.0} if variant == FULL else {}
        against = {"baseline_name": FULL, "baseline": full} if variant != FULL else {}
        bench.add(name, "%", mean, larger_is_better=True, **goal, **against)  # type: ignore[arg-type]
        if len(values) > 1:
            bench.add(f"{name}: their standard deviation", "points", spread(values), larger_is_better=False)
        if variant == INFLLM:
            bench.add(
                f"{length} tokens, {task}: {INFLLM} below {FULL}",
                "points",
                max(full - mean, 0.0),
                larger_is_better=False,
                baseline_name="at most",
                baseline=2.0,
                goal=1.0,
            )


def draw(accuracies: Accuracies, trainings: dict[tuple[int, str], dict[str, Any]], directory: Path) -> None:
    """For each length a figure of the accuracies and one of how they came about."""
    for length in sorted({length for length, _ in trainings}):
        values = {
            name: accuracies[length, "recall", name] for name in VARIANTS if (length, "recall", name) in accuracies
        }
        figure = bar_figure(
            {name: statistics.mean(x) for name, x in values.items()},
            ylabel=f"right answers, 16 pairs in {length} tokens, %",
            strong=[FULL, INFLLM],
            errors={name: spread(x) for name, x in values.items()},
            format_value=lambda value: f"{value:.1f}",
        )
        (directory / f"sparse_recall_{length}.svg").write_text(figure.svg, "utf-8")
        lines = {}
        for name in values:
            steps, shares = zip(*trainings[length, name]["curve"], strict=True)
            lines[name] = Series(list(map(float, steps)), [100 * statistics.mean(x) for x in shares])
        figure = line_figure(lines, xlabel="steps from the dense model", ylabel="right answers while training, %")
        (directory / f"sparse_recall_{length}_training.svg").write_text(figure.svg, "utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Writes `results/sparse_recall.json` and its drawings, and prints the table of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of cells")
    parser.add_argument("--directory", type=Path, default=RESULTS_DIR, help="where the results go")
    args = parser.parse_args(argv)
    accuracies, trainings = gather(args.work)
    if not trainings:
        parser.error(f"{args.work} holds no cell that is done")
    lengths, steps = sorted({length for length, _ in trainings}), {training["steps"] for training in trainings.values()}
    seeds = {len(values) for values in accuracies.values()}
    whole = [length for length in lengths if all((length, variant) in trainings for variant in VARIANTS)]
    options = (
        f"--seeds {max(seeds)} --steps {max(steps)} --lengths {' '.join(map(str, lengths))} "
        f"--ablated {' '.join(map(str, whole))}".rstrip()
    )
    bench = Benchmark("sparse_recall", f"python -m benchmarks.sparse_recall --work DIR {options}")
    for length, task, variant in accuracies:
        if (task, variant) == ("recall", FULL):
            bench.add(
                *(f"{length} tokens: seeds whose dense twin solves recall", "", len(solved_seeds(accuracies, length))),
                larger_is_better=True,
                baseline_name="of",
                baseline=len(accuracies[length, task, variant]),
            )
    accuracies = of_solved_seeds(accuracies)
    add_rows(bench, accuracies)
    last = max(trainings.values(), key=lambda training: training["date"])
    bench.write(args.directory, {key: last[key] for key in ("commit", "date", "machine")})
    draw(accuracies, trainings, args.directory)
    print(markdown(accuracies))


if __name__ == "__main__":
    main()
