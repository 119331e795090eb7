"""The page that `ruler` ends with."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpm_jax.common import report
from cpm_jax.common.figures import Series, heat_map_figure, line_figure
from cpm_jax.common.report import Block, Details, Figures, Headline, Page, Sample, Section, Table, Text
from cpm_jax.common.training_report import REPORT_FILE, footer
from cpm_jax.evaluation.results import Item
from cpm_jax.evaluation.ruler.question import Question
from cpm_jax.evaluation.ruler.runner import METRIC
from cpm_jax.evaluation.ruler.tasks import TASKS

# RULER calls the longest length at which a model does better than Llama 2 7B at 4K its effective length.
EFFECTIVE = 0.856
_HEADLINES = 5
_END = 500  # characters of a prompt that a sample shows


def write_ruler_report(
    workdir: Path,
    *,
    results: Mapping[str, Any],
    questions: Mapping[tuple[str, int], Sequence[Question]],
    items: Mapping[tuple[str, int], Sequence[Item]],
) -> Path:
    """Writes `report.html`.

    Args:
        workdir: folder of the run.
        results: what results.json holds.
        questions: by task and length.
        items: their answers.

    Returns:
        Path of the page.
    """
    tasks, means, settings = results["tasks"], results["mean"], results["settings"]
    sections = [
        Section("Scores", [_lengths(tasks, means), _table(tasks, means)]),
        Section("By length and depth", _heat_maps(tasks, settings["depths"])),
        Section("Answers", _samples(tasks, questions, items)),
        Section("Run", [Details("Settings and versions", json.dumps(_about(results), indent=1))]),
    ]
    turns = {"plain": "plain prompts", "open": "chat, the answer begun", "closed": "chat"}[settings["turns"]]
    page = Page(
        title=f"Long texts: {results['model']}",
        subtitle=f"{len(tasks)} tasks after RULER, {sum(map(len, items.values())):,} questions; {turns}.",
        headlines=_headlines(means),
        sections=sections,
        footer=footer(),
    )
    return report.write(page, workdir / REPORT_FILE)


def _about(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("model", "step", "settings", "versions", "machine")}


def _headlines(means: Mapping[str, Any]) -> list[Headline]:
    effective = 0
    for length, mean in means.items():  # up to the first length that fails
        if mean["value"] < EFFECTIVE:
            break
        effective = int(length)
    shown = f"{effective:,}" if effective else f"below {int(next(iter(means))):,}"
    found = [Headline("effective length", shown, "tokens", f"mean of all tasks at least {EFFECTIVE:.1%} up to there")]
    for length, mean in list(means.items())[-_HEADLINES:]:
        found.append(Headline(f"mean at {int(length):,} tokens", f"{mean['value']:.3f}", "", f"± {_error(mean)}"))
    return found


def _error(figure: Mapping[str, Any]) -> str:
    return "–" if figure["standard_error"] is None else f"{figure['standard_error']:.3f}"


def _lengths(tasks: Mapping[str, Any], means: Mapping[str, Any]) -> Block:
    lengths = [int(length) for length in means]
    lines = {"mean": Series(lengths, [mean["value"] for mean in means.values()], markers=True)}
    if len(tasks) > 1:
        lines |= {
            name: Series(lengths, [cell["score"]["value"] for cell in cells.values()], markers=True)
            for name, cells in tasks.items()
        }
    return line_figure(lines, xlabel="tokens of prompt and answer", ylabel="score", from_zero=True)


def _table(tasks: Mapping[str, Any], means: Mapping[str, Any]) -> Table:
    rows = []
    for name, cells in tasks.items():
        scores = [f"{cell['score']['value']:.3f} ± {_error(cell['score'])}" for cell in cells.values()]
        rows.append([name, TASKS[name].title, *scores])
    rows.append(["mean", "", *(f"{mean['value']:.3f} ± {_error(mean)}" for mean in means.values())])
    return Table(
        ["task", "asked for", *(f"{int(length):,}" for length in means)],
        rows,
        number_columns=range(2, 2 + len(means)),
        strong_rows=[len(rows) - 1],
        caption=(
            "Score by tokens of prompt and answer, with one standard error over questions: the share of the expected "
            "strings that an answer holds; in qa, of the answers that hold one."
        ),
    )


def _heat_maps(tasks: Mapping[str, Any], depths: Sequence[float]) -> list[Block]:
    figures, without = [], []
    for name, cells in tasks.items():
        if not any(cell["by_depth"] for cell in cells.values()):
            without.append(name)
            continue
        figures.append(
            heat_map_figure(
                [
                    [cell["by_depth"].get(str(depth), {"value": math.nan})["value"] for cell in cells.values()]
                    for depth in depths
                ],
                rows=[f"{depth:.0%}" for depth in depths],
                columns=[f"{int(length):,}" for length in cells],
                xlabel="tokens",
                ylabel="depth",
                title=name,
            )
        )
    blocks: list[Block] = [Figures(figures)] if figures else []
    about = "The share that was found of what lies at a depth (0% is the beginning of the context, 100% its end)."
    if without:
        about += f" No depth have {', '.join(without)}: what they ask for is everywhere."
    return [Text(about), *blocks]


def _samples(
    tasks: Mapping[str, Any],
    questions: Mapping[tuple[str, int], Sequence[Question]],
    items: Mapping[tuple[str, int], Sequence[Item]],
) -> list[Block]:
    """The worst answer of each task at the greatest length."""
    blocks: list[Block] = []
    for name, cells in tasks.items():
        cell = (name, int(list(cells)[-1]))
        question, item = min(
            zip(questions[cell], items[cell], strict=True), key=lambda pair: pair[1].metrics[METRIC].value
        )
        title = (
            f"{name} at {cell[1]:,} tokens, question {item.index}, score {item.metrics[METRIC].value:.2f}; "
            f"expected: {item.target}"
        )
        prompt = f"… {(question.body + question.answer_prefix)[-_END:]}"
        blocks.append(Sample(title, prompt, item.responses[0]))
    return blocks
