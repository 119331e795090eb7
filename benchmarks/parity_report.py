"""The parity matrix as a page and as figures in the form of all results."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.parity_cells import LOGITS, PERPLEXITY, RED, Cell, describe_limit
from benchmarks.results import Benchmark, origin
from cpm_jax.common.report import Block, Grid, Headline, Mark, Page, Section, Table, Text, write

NAME = "parity"
TONES = {"equal": "good", "differs": "bad", "failed": "bad", "cannot": "none", "gap": "gap"}
TITLES = {"cannot": "cannot be", "gap": "not installed", "failed": "failed", "differs": "differs"}
HOW_TO_READ = (
    "Each cell compares a runtime with our decoder's full forward pass, in float32, without a cache, on the same "
    "values and the same held-out text, Python's standard library. It shows the largest difference of two logits, as a "
    "share of the largest logit, beside what is allowed; the greedy tokens that are ours, ties included, of 256 after "
    "each text; and tokens per second. Perplexity, KL divergence, size and times are in its tooltip, and in the table "
    "below."
)


def summary(cell: Cell) -> str:
    """A cell in a line."""
    if not cell.figures:
        return f"{TITLES[cell.status]}: {cell.words}"
    figures = cell.figures
    said = f"{figures['error']:.1e} of the largest logit, {_greedy(cell)} greedy tokens, perplexity "
    said += (
        f"{figures['perplexity']:.4f} ({figures['our_perplexity']:.4f}), {figures['tokens_per_second']:.0f} tokens/s"
    )
    return f"{cell.status}: {said}" + (f". {cell.words}" if cell.words else "")


def _greedy(cell: Cell) -> str:
    return f"{cell.figures['agreed'] + cell.figures['ties']:.0f}/{cell.figures['tokens']:.0f}"


def _mark(cell: Cell | None) -> Mark:
    if cell is None:
        return Mark("", "none")
    tone = TONES[cell.status]
    if not cell.figures:
        return Mark(TITLES[cell.status], tone, tooltip=cell.words)  # type: ignore[arg-type]
    figures = cell.figures
    lines = [
        cell.words,
        f"logits: {figures['error']:.2e} of the largest, {figures['largest_logit']:.4g}",
        f"KL divergence: {figures['kl']:.2e} nats",
        f"greedy tokens: {figures['agreed']:.0f} ours, {figures['ties']:.0f} ties, of {figures['tokens']:.0f}",
        f"perplexity: {figures['perplexity']:.6g}, ours {figures['our_perplexity']:.6g}",
        f"from ours without rounding of activations: {figures['unrounded_drift']:.2%}" if cell.rounds else "",
        f"{figures['megabytes']:.4g} MB, loaded in {figures['load_seconds']:.2f} s, "
        f"{figures['tokens_per_second']:.1f} tokens/s",
        f"allowed: {describe_limit(cell.rounds)}",
        "; ".join(filter(None, (cell.format, cell.versions))),
    ]
    detail = f"{_greedy(cell)} tokens, {figures['tokens_per_second']:.0f}/s"
    return Mark(_verdict(cell), tone, detail, "\n".join(filter(None, lines)))  # type: ignore[arg-type]


def _verdict(cell: Cell) -> str:
    """What is judged beside its limit."""
    if cell.rounds:
        drift = cell.figures["drift"]
        return f"{drift:.2%} {'≤' if drift <= PERPLEXITY else '>'} {PERPLEXITY:.1%}"
    error = cell.figures["error"]
    return f"{error:.0e} {'≤' if error <= LOGITS else '>'} {LOGITS:.0e}"


def _reasons(cells: Sequence[Cell], titles: Mapping[str, str], statuses: Sequence[str]) -> list[tuple[str, str, str]]:
    return [(cell.checkpoint, titles[cell.runtime], cell.words) for cell in cells if cell.status in statuses]


def _details(cells: Sequence[Cell], titles: Mapping[str, str]) -> Table:
    rows = [
        (
            cell.checkpoint,
            titles[cell.runtime],
            cell.format,
            f"{cell.figures['error']:.1e}",
            f"{cell.figures['kl']:.1e}",
            f"{cell.figures['agreed']:.0f} + {cell.figures['ties']:.0f}",
            f"{cell.figures['perplexity']:.4f}",
            f"{cell.figures['our_perplexity']:.4f}",
            f"{cell.figures['megabytes']:.2f}",
            f"{cell.figures['load_seconds']:.2f}",
            f"{cell.figures['tokens_per_second']:.0f}",
        )
        for cell in cells
        if cell.figures
    ]
    header = ("checkpoint", "runtime", "what it loads", "error", "KL, nats", "ours + ties", "perplexity", "ours", "MB",
              "load, s", "tokens/s")  # fmt: skip
    return Table(header, rows, number_columns=range(3, len(header)))


def _page(cells: Sequence[Cell], rows: Sequence[str], titles: Mapping[str, str], footer: str) -> Page:
    found = {(cell.checkpoint, cell.runtime): cell for cell in cells}
    marks = [(row, [_mark(found.get((row, runtime))) for runtime in titles]) for row in rows]
    caption = (
        f"Green: logits within {LOGITS:g} of the largest and all greedy tokens equal up to ties. llama.cpp rounds "
        f"activations to fit packed weights: there the perplexity is judged, within {PERPLEXITY:.1%} of ours with "
        "activations rounded likewise. Grey: cannot be. Hatched: not installed here."
    )
    blocks: list[Block] = [Text(HOW_TO_READ), Grid(("", *titles.values()), marks, caption)]
    sections = [Section("The matrix", blocks)]
    for title, statuses in (
        ("What differs or fails", RED),
        ("What cannot be, in the export's own words", ("cannot",)),
        ("What is not installed", ("gap",)),
    ):
        if reasons := _reasons(cells, titles, statuses):
            sections.append(Section(title, [Table(("checkpoint", "runtime", "why"), reasons)]))
    sections.append(Section("All figures", [_details(cells, titles)]))
    return Page("One checkpoint, equal logits, in every runtime", "", _headlines(cells), sections, footer)


def count(cells: Sequence[Cell], statuses: Sequence[str]) -> int:
    """Number of cells of some statuses."""
    return sum(cell.status in statuses for cell in cells)


def _headlines(cells: Sequence[Cell]) -> list[Headline]:
    exact = [cell.figures["error"] for cell in cells if cell.figures and not cell.rounds]
    headlines = [
        Headline("equal", str(count(cells, ["equal"])), "cells"),
        Headline("differ or fail", str(count(cells, RED)), "cells"),
        Headline("cannot be", str(count(cells, ["cannot"])), "cells"),
        Headline("not installed", str(count(cells, ["gap"])), "cells"),
    ]
    if exact:
        headlines.append(Headline("largest difference", f"{max(exact):.1e}", "of the largest logit", "float32 cells"))
    return headlines


def _add_rows(bench: Benchmark, cells: Sequence[Cell], titles: Mapping[str, str]) -> None:
    judged = [cell for cell in cells if cell.status != "cannot"]
    bench.add("cells that are equal", "", count(cells, ["equal"]), larger_is_better=True,
              baseline_name="cells that can be", baseline=len(judged), goal=1.0)  # fmt: skip
    for cell in cells:
        if not cell.figures:
            continue
        title, figures = f"{cell.checkpoint}, {titles[cell.runtime]}", cell.figures
        if cell.rounds:
            bench.add(f"{title}: perplexity's difference from ours with activations rounded likewise, of ours", "",
                      figures["drift"], larger_is_better=False, baseline_name="limit", baseline=PERPLEXITY,
                      goal=1.0)  # fmt: skip
            bench.add(f"{title}: perplexity's difference from ours without that, of ours", "",
                      figures["unrounded_drift"], larger_is_better=False)  # fmt: skip
            continue
        bench.add(f"{title}: largest difference of logits, of the largest", "", figures["error"],
                  larger_is_better=False, baseline_name="limit", baseline=LOGITS, goal=1.0)  # fmt: skip
        bench.add(f"{title}: greedy tokens that are ours, or ties", "", figures["agreed"] + figures["ties"],
                  larger_is_better=True, baseline_name="tokens", baseline=figures["tokens"], goal=1.0)  # fmt: skip


def write_report(
    cells: Sequence[Cell], rows: Sequence[str], titles: Mapping[str, str], folder: Path, command: str
) -> None:
    """Writes `parity.html` and `parity.json`.

    The latter has what is judged as rows, and every cell with all its figures and words under "cells".

    Args:
        cells: of the matrix.
        rows: names of the checkpoints, in order.
        titles: of the runtimes by their names, in order.
        folder: where to.
        command: that made them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    measured = origin()
    bench = Benchmark(NAME, command)
    _add_rows(bench, cells, titles)
    bench.write(folder, measured | {"cells": [asdict(cell) for cell in cells]})
    machine = measured["machine"]
    footer = (
        f"{measured['date']}, commit {measured['commit'] or 'unknown'}, {machine['cpu']}, {machine['cores']} cores; "
        f"{command}. Speeds are of one run beside whatever else the machine did, and are not judged."
    )
    print(f"written to {write(_page(cells, rows, titles, footer), folder / f'{NAME}.html')}")
