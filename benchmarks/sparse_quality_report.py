"""What `sparse_quality` measured, as figures: losses with their errors, shares of attention, drawings.

    python -m benchmarks.sparse_quality_report --work DIR

DIR holds the rows and what was computed of them, on whatever machine: the report names that one.
"""

import argparse
import csv
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from benchmarks.block_rules import TILES, Rule
from benchmarks.results import RESULTS_DIR, Benchmark
from benchmarks.sparse_quality import BUDGETS, WEIGHED, WEIGHED_BUDGETS
from benchmarks.sparse_quality_cells import Cell, Measured, Weights
from benchmarks.sparse_quality_texts import LENGTH, LONG, TRAIN_LENGTH, read_rows
from benchmarks.sparse_quality_training import TRAIN_BLOCKS, curve_of
from cpm_jax.common.figures import Series, heat_map_figure, line_figure

NAMES: dict[Rule, str] = {
    "dense": "dense",
    "lse": "InfLLM v2",
    "exact": "InfLLM v2, exact normaliser",
    "window": "window + first block",
    "random": "random blocks",
    "oracle": "best blocks by dense attention",
    "tile16": "InfLLM v2, shared by 16 queries",
    "tile64": "InfLLM v2, shared by 64 queries",
}
RIVALS: tuple[Rule, ...] = ("window", "random")
LEVEL = 0.05  # of the one-sided t-test that a rival's loss is the larger one
BIN = 512  # tokens of a point of the drawing over positions


class Estimate(NamedTuple):
    """A mean over rows and its standard error, rows taken as independent draws; nan of a single row."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """The mean of one value of each row."""
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), error)

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


class Losses:
    """The losses of all rows that are measured, for sums over ranges of positions."""

    def __init__(self, work: Path, num_bytes: Mapping[str, Callable[[int, int], int]]):
        """Reads what there is.

        Args:
            work: where cells are kept.
            num_bytes: of each row, the bytes of text of the targets from one position to before another.
        """
        self._num_bytes = num_bytes
        self._losses: dict[Cell, dict[str, np.ndarray]] = {}
        self.origin: Mapping[str, Any] = {}  # of the latest cell
        for path in sorted((work / "cells").glob("*.npz")):
            weights, rule, blocks, length, rope, row = path.stem.split("-")
            cell = Cell(weights, rule, int(blocks), int(length), rope)  # type: ignore[arg-type]
            measured = Measured.load(work, cell, row)
            self._losses.setdefault(cell, {})[row] = measured.losses
            self.origin = max(self.origin, measured.origin, key=lambda origin: origin.get("date", ""))
        # Where a study was cut off, one row alone has no error and is no figure.
        for cell, rows in list(self._losses.items()):
            dense = self._losses.get(cell._replace(rule="dense", blocks=0), rows)
            if len(rows) == 1 < len(dense):
                del self._losses[cell]

    def rows(self, *cells: Cell) -> list[str]:
        """The rows that all of these cells have been measured on."""
        return sorted(set.intersection(*(set(self._losses.get(cell, {})) for cell in cells)))

    def cells(self, weights: Weights, length: int) -> list[Cell]:
        """The cells of some weights and length that have been measured."""
        return sorted(cell for cell in self._losses if (cell.weights, cell.length) == (weights, length))

    def loss(self, cell: Cell, begin: int, end: int, rows: Sequence[str]) -> Estimate:
        """Nats a token from position `begin` to before `end`."""
        return Estimate.of([self._losses[cell][row][begin:end].mean() for row in rows])

    def beyond(self, cell: Cell, base: Cell, begin: int, end: int, rows: Sequence[str]) -> Estimate:
        """Nats a token more than another cell has, row by row."""
        pairs = [(self._losses[cell][row], self._losses[base][row]) for row in rows]
        return Estimate.of([float((ours - theirs)[begin:end].mean()) for ours, theirs in pairs])

    def bits_per_byte(self, cell: Cell, begin: int, end: int, rows: Sequence[str]) -> float:
        """Bits for each byte of the text of the targets."""
        nats = sum(float(self._losses[cell][row][begin:end].sum()) for row in rows)
        return nats / math.log(2) / sum(self._num_bytes[row](begin, end) for row in rows)


def _add_loss(bench: Benchmark, losses: Losses, title: str, cell: Cell, base: Cell, begin: int, end: int) -> None:
    """A row of the table: a loss beside another one."""
    rows = losses.rows(cell, base)
    loss, more = losses.loss(cell, begin, end, rows), losses.beyond(cell, base, begin, end, rows)
    blocks = f", {cell.blocks} blocks" if cell.blocks else ""
    bench.add(
        f"{title}, {NAMES[cell.rule]}{blocks}: ± {loss.error:.3f}, "
        f"{more.value:+.4f} ± {more.error:.4f} to {NAMES[base.rule]}, "
        f"{losses.bits_per_byte(cell, begin, end, rows):.4f} bits/byte, n = {len(rows)}",
        "nats/token",
        loss.value,
        larger_is_better=False,
        baseline_name=NAMES[base.rule],
        baseline=losses.loss(base, begin, end, rows).value,
    )


def _add_wins(bench: Benchmark, losses: Losses, title: str, cell: Cell, begin: int, end: int) -> None:
    """Rows that say whether InfLLM v2 has a clearly lower loss than its rivals at the same number of blocks."""
    for rival in RIVALS:
        other = cell._replace(rule=rival)
        rows = losses.rows(cell, other)
        more = losses.beyond(other, cell, begin, end, rows) if len(rows) > 1 else None
        if more and more.error:  # none where both see all blocks
            bench.add(
                f"{title}, {cell.blocks} blocks: {NAMES[rival]} {more.value:+.4f} ± {more.error:.4f} nats to InfLLM "
                f"v2, n = {len(rows)}",
                "standard errors",
                max(more.value / more.error, 0.0),
                larger_is_better=True,
                baseline_name=f"{LEVEL:.0%} by chance",
                baseline=float(scipy.stats.t.ppf(1 - LEVEL, len(rows) - 1)),
                goal=1.0,
            )


def _loss_rows(bench: Benchmark, losses: Losses, length: int, main: int) -> None:
    dense = Cell("published", "dense", 0, length, "plain")
    cells = [cell for cell in losses.cells("published", length) if losses.rows(cell, dense)]
    for prefix in (length // 4, length // 2, length):
        for part, begin in (("all", 0), ("second half", prefix // 2)):
            title = f"{prefix // 1024}K tokens, {part}"
            for cell in cells:
                # Where every token sees all blocks, there is nothing to choose.
                if cell.blocks in (0, main) or (prefix == length and begin):
                    _add_loss(bench, losses, title, cell, dense, begin, prefix)
                    own = cell._replace(rule="lse")
                    if cell.rule in TILES and losses.rows(cell, own):
                        _add_loss(bench, losses, title, cell, own, begin, prefix)
            for cell in cells:
                if begin and cell.rule == "lse" and (cell.blocks == main or prefix == length):
                    _add_wins(bench, losses, title, cell, begin, prefix)


def _long_rows(bench: Benchmark, losses: Losses, length: int) -> None:
    dense = Cell("published", "dense", 0, length, "yarn")
    for part, begin in (("all", 0), ("second half", length // 2)):
        for cell in losses.cells("published", length):
            title = f"{length // 1024}K tokens{' with YaRN' if cell.rope == 'yarn' else ', no scaling'}, {part}"
            if losses.rows(cell, dense):
                _add_loss(bench, losses, title, cell, dense, begin, length)
            if begin and cell.rule == "lse":
                _add_wins(bench, losses, title, cell, begin, length)


def _training_rows(bench: Benchmark, losses: Losses, length: int, train_length: int, blocks: int) -> None:
    """The gap between sparse and dense, of the same weights or each of its own training, before and after."""
    pairs = {
        "as published": ("published", "published"),
        "trained sparse, beside trained dense": ("trained_sparse", "trained_dense"),
        "trained dense, run sparse": ("trained_dense", "trained_dense"),
        "trained sparse, run dense": ("trained_sparse", "trained_dense"),
    }
    for title, (ours, theirs) in pairs.items():
        rule: tuple[Rule, int] = ("dense", 0) if title.endswith("run dense") else ("lse", blocks)
        cell = Cell(ours, *rule, length, "plain")  # type: ignore[arg-type]
        base = Cell(theirs, "dense", 0, length, "plain")  # type: ignore[arg-type]
        if not losses.rows(cell, base):
            continue
        for where, begin, end in (
            (f"{train_length // 2048}K to {train_length // 1024}K", train_length // 2, train_length),
            (f"{length // 2048}K to {length // 1024}K", length // 2, length),
        ):
            _add_loss(bench, losses, f"training, positions {where}: {title}", cell, base, begin, end)


def _share_rows(
    bench: Benchmark, shares: np.ndarray, rules: Sequence[Rule], budgets: Sequence[int], main: int, directory: Path
) -> None:
    """Shares of attention: rows of the table, a file with every layer and head, a map for each rule.

    Args:
        bench: gets the rows.
        shares: [rows, L, rules, budgets, N, R].
        rules: of its third dimension.
        budgets: of its fourth dimension.
        main: the one of the maps.
        directory: where files go.
    """
    by_head = shares.mean(axis=(0, 5)).transpose(1, 2, 0, 3)  # [rules, budgets, L, N]
    for place, budget in enumerate(budgets):
        for number, rule in enumerate(rules):
            every, heads = shares[:, :, number, place], by_head[number, place]
            low, median = np.percentile(every, [5, 50])
            bench.add(
                f"dense attention held by {budget} blocks, {NAMES[rule]}: 5% of queries below {low:.3f}, median "
                f"{median:.3f}; least head {heads.min():.3f}, least layer {heads.mean(axis=1).min():.3f}",
                "share",
                float(heads.mean()),
                larger_is_better=True,
                baseline_name=NAMES["window"],
                baseline=float(by_head[rules.index("window"), place].mean()),
            )
    num_layers, num_heads = by_head.shape[2:]
    for number, rule in enumerate(rules):
        figure = heat_map_figure(
            by_head[number, budgets.index(main)].tolist(),
            rows=[str(layer) for layer in range(num_layers)],
            columns=[str(head) for head in range(num_heads)],
            xlabel="head",
            ylabel="layer",
            title=f"{NAMES[rule]}: attention in {main} blocks",
        )
        (directory / f"sparse_quality_shares_{rule}.svg").write_text(figure.svg, "utf-8")
    with (directory / "sparse_quality_shares.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rule", "blocks", "layer", "head", "share"])
        for (number, rule), (place, budget) in itertools.product(enumerate(rules), enumerate(budgets)):
            for (layer, head), share in np.ndenumerate(by_head[number, place]):
                writer.writerow([rule, budget, layer, head, f"{share:.4f}"])


def _drawings(losses: Losses, length: int, main: int, directory: Path) -> None:
    dense = Cell("published", "dense", 0, length, "plain")
    cells = [cell for cell in losses.cells("published", length) if cell.rule != "dense" and losses.rows(cell, dense)]

    def draw(name: str, lines: dict[str, Series], xlabel: str, which: str) -> None:
        ylabel = f"{which}: nats a token more than dense"
        figure = line_figure(lines, xlabel=xlabel, ylabel=ylabel, from_zero=True)
        (directory / f"sparse_quality_{name}.svg").write_text(figure.svg, "utf-8")

    ends = range(BIN, length + 1, BIN)
    over_positions = {
        NAMES[cell.rule]: Series(
            [float(end) for end in ends],
            [losses.beyond(cell, dense, end - BIN, end, losses.rows(cell, dense)).value for end in ends],
            markers=True,
        )
        for cell in cells
        if cell.blocks == main
    }
    draw("positions", over_positions, f"position, by {BIN}", f"{main} blocks of 64")
    over_blocks = {}
    for rule in ("lse", *RIVALS):
        of_rule = sorted((cell for cell in cells if cell.rule == rule), key=lambda cell: cell.blocks)
        over_blocks[NAMES[rule]] = Series(
            [float(cell.blocks) for cell in of_rule],
            [losses.beyond(cell, dense, length // 2, length, losses.rows(cell, dense)).value for cell in of_rule],
            markers=True,
        )
    draw("blocks", over_blocks, "visible blocks of 64 tokens", f"Positions {length // 2048}K to {length // 1024}K")


class Plan(NamedTuple):
    """What `sparse_quality` measures, as far as its report goes by it.

    Attributes:
        length: of a row, the model's limit.
        long: of a row beyond it.
        budgets: numbers of visible blocks whose shares of attention are taken, ascending.
        main: the number of blocks in tables over lengths.
        weighed: rules whose share of attention is taken.
        train_length: rows in training.
        train_blocks: visible blocks in training.
    """

    length: int
    long: int
    budgets: tuple[int, ...]
    main: int
    weighed: tuple[Rule, ...]
    train_length: int
    train_blocks: int


def _training_curves(bench: Benchmark, work: Path, plan: Plan, directory: Path) -> None:
    """How the loss on held-out rows went while training: rows for its first and last step, and a drawing."""
    folders = {"sparse": work / "trained_sparse", "dense": work / "trained_dense"}
    curves = {name: curve_of(folder) for name, folder in folders.items() if (folder / "training.json").exists()}
    if len(curves) < len(folders):
        return
    lines = {}
    for trained, curve in curves.items():
        steps, *runs = zip(*curve, strict=True)
        for how, losses in zip(("run dense", "run sparse"), runs, strict=True):
            means = [float(np.mean(rows)) for rows in losses]
            lines[f"trained {trained}, {how}"] = Series([float(step) for step in steps], means, markers=True)
    run_sparse = f"run sparse with {plan.train_blocks} blocks"
    for title, trained, sparse in (
        (f"trained sparse, {run_sparse}", "sparse", True),
        (f"trained dense, {run_sparse}", "dense", True),
        ("trained sparse, run dense", "sparse", False),
    ):
        for at in (0, -1):
            (step, runs_dense, runs_sparse), dense = curves[trained][at], curves["dense"][at][1]
            run = runs_sparse if sparse else runs_dense
            more = Estimate.of((np.asarray(run) - np.asarray(dense)).tolist())
            bench.add(
                f"held-out rows of {plan.train_length}, second half, after {step} steps: {title}: "
                f"{more.value:+.4f} ± {more.error:.4f} to trained dense, run dense",
                "nats/token",
                float(np.mean(run)),
                larger_is_better=False,
                baseline_name="dense",
                baseline=float(np.mean(dense)),
            )
    figure = line_figure(lines, xlabel="steps of training", ylabel="nats a token, held-out rows, second half")
    (directory / "sparse_quality_training.svg").write_text(figure.svg, "utf-8")


def _options(work: Path, losses: Losses, plan: Plan) -> str:
    """How much was measured, as options of `sparse_quality`."""
    numbers = [
        max((int(row[-1]) for row in losses.rows(Cell("published", "dense", 0, length, rope))), default=0) + 1  # type: ignore[arg-type]
        for length, rope in ((plan.length, "plain"), (plan.long, "yarn"))
    ]
    folder = work / "trained_sparse"
    steps = curve_of(folder)[-1][0] if (folder / "training.json").exists() else 0
    return f"--rows {numbers[0]} --long_rows {numbers[1]} --train_steps {steps}"


def markdown(losses: Losses, plan: Plan) -> str:
    """Tables for the page: over lengths at the main number of blocks, and over numbers of blocks."""
    rules: tuple[Rule, ...] = ("lse", *TILES, "exact", *RIVALS)
    places = [(plan.length, "plain", end) for end in (plan.length // 4, plan.length // 2, plan.length)]
    places.append((plan.long, "yarn", plan.long))
    lines = ["| perplexity | " + " | ".join(f"{end // 1024}K" for *_, end in places) + " |"]
    lines.append("|---" * (len(places) + 1) + "|")
    for rule in ("dense", *rules):
        shown = []
        for length, rope, end in places:
            dense = Cell("published", "dense", 0, length, rope)  # type: ignore[arg-type]
            cell = dense if rule == "dense" else dense._replace(rule=rule, blocks=plan.main)
            if not (rows := losses.rows(cell, dense)):
                shown.append("")
                continue
            perplexity = math.exp(losses.loss(cell, 0, end, rows).value)
            more = losses.beyond(cell, dense, 0, end, rows)
            shown.append(f"{perplexity:.2f}" + ("" if rule == "dense" else f" ({more.value:+.3f} ± {more.error:.3f})"))
        lines.append(f"| {NAMES[rule]} | " + " | ".join(shown) + " |")
    lines += ["", "| blocks | " + " | ".join(NAMES[rule] for rule in rules) + " |", "|---" * (len(rules) + 1) + "|"]
    dense = Cell("published", "dense", 0, plan.length, "plain")
    for blocks in plan.budgets:
        shown = []
        for cell in (dense._replace(rule=rule, blocks=blocks) for rule in rules):
            rows = losses.rows(cell, dense)
            shown.append(str(losses.beyond(cell, dense, plan.length // 2, plan.length, rows)) if rows else "")
        lines.append(f"| {blocks} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def report(work: Path, num_bytes: Mapping[str, Callable[[int, int], int]], plan: Plan, directory: Path) -> None:
    """Writes `sparse_quality.json`, the shares of every head, and the drawings.

    Args:
        work: where cells are kept.
        num_bytes: of each row, the bytes of text of the targets from one position to before another.
        plan: what was to be measured.
        directory: where results go.
    """
    losses = Losses(work, num_bytes)
    bench = Benchmark(
        "sparse_quality", f"python -m benchmarks.sparse_quality --work DIR {_options(work, losses, plan)}"
    )
    _loss_rows(bench, losses, plan.length, plan.main)
    _long_rows(bench, losses, plan.long)
    _training_rows(bench, losses, plan.length, plan.train_length, plan.train_blocks)
    _training_curves(bench, work, plan, directory)
    dense = Cell("published", "dense", 0, plan.length, "plain")
    every = [Measured.load(work, dense, row).shares for row in losses.rows(dense)]
    shares = np.stack([share for share in every if share is not None]).astype(np.float32)
    _share_rows(bench, shares, plan.weighed, plan.budgets, plan.main, directory)
    _drawings(losses, plan.length, plan.main, directory)
    bench.write(directory, losses.origin)
    print(markdown(losses, plan))


def main(argv: Sequence[str] | None = None) -> None:
    """Writes `results/sparse_quality.json` and its drawings of whatever is measured, and prints the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of rows, cells and trainings")
    parser.add_argument("--directory", type=Path, default=RESULTS_DIR, help="where the results go")
    args = parser.parse_args(argv)
    plan = Plan(LENGTH, LONG, WEIGHED_BUDGETS, BUDGETS[0], WEIGHED, TRAIN_LENGTH, TRAIN_BLOCKS)
    report(args.work, {row.name: row.num_bytes for row in read_rows(args.work).excerpts}, plan, args.directory)


if __name__ == "__main__":
    main()
