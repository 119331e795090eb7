"""The one form of measured figures: a table on the terminal and `results/<name>.json`.

`python -m benchmarks.results` (`make results`) prints all of them, rows that miss their goal first.
"""

import argparse
import datetime
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpm_jax.common import provenance
from cpm_jax.common.files import write_json

RESULTS_DIR = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        metric: what was measured.
        unit: its unit.
        ours: our figure.
        baseline_name: what it is held against: another program, or a limit such as "at most 10 minutes".
        baseline: the figure of that; None where there is nothing to compare with.
        ratio: ours against the baseline, oriented so that larger is better and 1 is a draw.
        goal: the least ratio that an issue asked for; None where none did.
        met: whether the ratio reaches the goal; None without a goal.
    """

    metric: str
    unit: str
    ours: float
    baseline_name: str
    baseline: float | None
    ratio: float | None
    goal: float | None
    met: bool | None


def origin() -> dict[str, Any]:
    """Commit, date and machine of what is measured here and now.

    What is measured on one machine and reported on another is kept together with this.
    """
    return {
        "commit": provenance.git_revision(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": provenance.machine() | {"jax": provenance.versions()["jax"]},
    }


class Benchmark:
    """Collects the rows of one benchmark, prints them and writes them down."""

    def __init__(self, name: str, command: str | None = None):
        """Starts an empty benchmark.

        Args:
            name: of the module in `benchmarks/` and of the file in `results/`.
            command: how to run it again; None takes this process's arguments.
        """
        self.name = name
        self.command = command or " ".join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
        self.rows: list[Row] = []

    def add(
        self,
        metric: str,
        unit: str,
        ours: float,
        *,
        larger_is_better: bool,
        baseline_name: str = "",
        baseline: float | None = None,
        goal: float | None = None,
    ) -> Row:
        """Adds a row.

        Args:
            metric: what was measured.
            unit: its unit.
            ours: our figure, at least 0.
            larger_is_better: which way the figure is good; the ratio is turned accordingly.
            baseline_name: what it is held against.
            baseline: the figure of that.
            goal: the least ratio that an issue asked for.

        Raises:
            ValueError: a figure is negative or not a number, or a goal has nothing to be compared with.
        """
        for value in (ours, baseline):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{metric}: {value} is not a figure")
        if goal is not None and baseline is None:
            raise ValueError(f"{metric}: a goal is a ratio to a baseline, and there is none")
        ratio = None
        if baseline is not None:
            better, worse = (ours, baseline) if larger_is_better else (baseline, ours)
            # A thing that costs nothing is better than any: JSON has no infinity.
            ratio = better / worse if worse else (1.0 if not better else sys.float_info.max)
        met = None if goal is None or ratio is None else ratio >= goal
        row = Row(metric, unit, ours, baseline_name, baseline, ratio, goal, met)
        self.rows.append(row)
        return row

    def write(self, directory: Path = RESULTS_DIR, measured: Mapping[str, Any] | None = None) -> Path:
        """Prints the table and writes `<directory>/<name>.json`.

        Args:
            directory: where to.
            measured: `origin()` of the figures; None takes that of this moment. A commit that was not known there,
                where the code had come without its repository, is this one.
        """
        measured = dict(measured or origin())
        measured["commit"] = measured["commit"] or provenance.git_revision()
        rows = [asdict(row) for row in self.rows]
        result = {"name": self.name, "command": self.command, **measured, "rows": rows}
        path = directory / f"{self.name}.json"
        write_json(path, result)
        print(table([(self.name, row) for row in self.rows]))
        print(f"written to {path}")
        return path


def load(directory: Path = RESULTS_DIR) -> list[dict[str, Any]]:
    """Reads all results of a directory and of the folders in it, in the order of their names.

    A result in a folder bears the folder's name before its own.

    Raises:
        ValueError: a file is not a result; names it.
    """
    results = []
    for path in sorted([*directory.glob("*.json"), *directory.glob("*/*.json")]):
        try:
            result = json.loads(path.read_text("utf-8"))
            result["rows"] = [Row(**row) for row in result["rows"]]
            result["name"] = str(path.parent.relative_to(directory) / result["name"])
            results.append({key: result[key] for key in ("name", "command", "commit", "date", "machine", "rows")})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of a benchmark: {error!r}") from error
    return results


def unmet_first(rows: Iterable[tuple[str, Row]]) -> list[tuple[str, Row]]:
    """Rows that miss their goal, then those that reach it, then those without one."""
    return sorted(rows, key=lambda item: {False: 0, True: 1, None: 2}[item[1].met])


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if value == sys.float_info.max:
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: Sequence[tuple[str, Row]]) -> str:
    """Lays rows out in columns.

    Args:
        rows: each with the name of its benchmark.
    """
    header = ("benchmark", "metric", "ours", "unit", "baseline", "of", "ratio", "goal", "met")
    cells = [header] + [
        (
            name,
            row.metric,
            _number(row.ours),
            row.unit,
            _number(row.baseline),
            row.baseline_name or "–",
            _number(row.ratio),
            _number(row.goal),
            {True: "yes", False: "NO", None: "–"}[row.met],
        )
        for name, row in rows
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    numbers = {2, 4, 6, 7}
    lines = []
    for row in cells:
        shown = [
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(shown).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints all results; returns an exit code."""
    parser = argparse.ArgumentParser(description="Print all measured figures, rows that miss their goal first.")
    parser.add_argument("--directory", type=Path, default=RESULTS_DIR, help="where the results are")
    directory = parser.parse_args(argv).directory
    try:
        results = load(directory)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not results:
        print(f"no results in {directory}: run one with make bench NAME=…")
        return 0
    print(table(unmet_first((result["name"], row) for result in results for row in result["rows"])))
    print()
    for result in results:
        machine = result["machine"]
        print(
            f"{result['name']}: {result['date']}, commit {result['commit'][:12] or 'unknown'}, {machine['cpu']}, "
            f"{machine['cores']} cores, {machine['device_kind']}; {result['command']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
