"""The page that an evaluation ends with."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpm_jax.checkpoints.manager import CHECKPOINTS_DIR
from cpm_jax.common import report
from cpm_jax.common.figures import Interval, bar_figure, interval_figure
from cpm_jax.common.report import Block, Details, Headline, Page, Sample, Section, Table, Text
from cpm_jax.common.training_report import REPORT_FILE, footer

if TYPE_CHECKING:  # they need lm_eval
    from cpm_jax.evaluation.comparison import Paired
    from cpm_jax.evaluation.results import Item

_HEADLINES = 6
_SAMPLES = 2  # of each kind and task
_SHOWN = 700  # characters of a prompt


def write_evaluation_report(
    workdir: Path,
    *,
    results: Mapping[str, Any],
    items: Mapping[str, Sequence["Item"]],
    comparison: Sequence["Paired"] = (),
    other: str = "",
) -> Path:
    """Writes `report.html`.

    Args:
        workdir: folder of the evaluation.
        results: what results.json holds.
        items: of each task.
        comparison: with another evaluation.
        other: folder of that.

    Returns:
        Path of the page.
    """
    tasks = results["tasks"]
    sections = [_scores(tasks)]
    if comparison:
        sections.insert(0, _comparison(comparison, other))
    sections += [_samples(name, items[name], tasks[name]) for name in tasks]
    sections.append(Section("Run", [Details("Settings and versions", json.dumps(_about(results), indent=1))]))
    page = Page(
        title=f"Evaluation of {_name(Path(results['checkpoint']))}",
        subtitle=f"{sum(task['items'] for task in tasks.values()):,} items of {len(tasks)} tasks; {_how(results)}.",
        headlines=[_headline(name, task) for name, task in list(tasks.items())[:_HEADLINES]],
        sections=sections,
        footer=footer(),
    )
    return report.write(page, workdir / REPORT_FILE)


def _name(checkpoint: Path) -> str:
    """The run's name, where a checkpoint lies in its workdir, else that of the file or folder."""
    return checkpoint.parents[1].name if checkpoint.parent.name == CHECKPOINTS_DIR else checkpoint.name


def _about(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("checkpoint", "step", "settings", "versions", "machine")}


def _how(results: Mapping[str, Any]) -> str:
    settings = results["settings"]
    prompts = "prompts in the chat template" if settings["chat"] else "plain prompts"
    return f"{prompts}, checkpoint of step {results['step']:,}" if results["step"] else prompts


def _main(task: Mapping[str, Any]) -> tuple[float, float]:
    figure = task["metrics"][task["main_metric"]]
    value = math.nan if figure["value"] is None else figure["value"]
    return value, figure["standard_error"] or 0.0


def _headline(name: str, task: Mapping[str, Any]) -> Headline:
    value, error = _main(task)
    chance = "" if task["chance"] is None else f"; chance {task['chance']:.2f}"
    return Headline(name, f"{value:.3f}", task["main_metric"], f"± {error:.3f}, n = {task['items']}{chance}")


def _scores(tasks: Mapping[str, Any]) -> Section:
    blocks: list[Block] = []
    for metric_is_bits, label in ((False, "main metric of each task (higher is better)"), (True, "bits per byte")):
        chosen = {
            name: _main(task)
            for name, task in tasks.items()
            if (task["main_metric"] == "bits_per_byte") == metric_is_bits and math.isfinite(_main(task)[0])
        }
        if chosen:
            blocks.append(
                bar_figure(
                    {name: value for name, (value, _) in chosen.items()},
                    ylabel=label,
                    errors={name: error for name, (_, error) in chosen.items()},
                    caption="The whisker is one standard error over items.",
                )
            )
    rows, strong = list[list[str]](), list[int]()
    for name, task in tasks.items():
        for metric, figure in task["metrics"].items():
            error = "–" if figure["standard_error"] is None else f"{figure['standard_error']:.4f}"
            if metric == task["main_metric"]:
                strong.append(len(rows))
            value = "not finite" if figure["value"] is None else f"{figure['value']:.4f}"
            rows.append([name, metric, value, error, f"{figure['n']:,}", str(task["num_fewshot"])])
    blocks.append(
        Table(
            ["task", "metric", "value", "standard error", "items", "examples in a prompt"],
            rows,
            number_columns=range(2, 6),
            strong_rows=strong,
            caption="Items are taken as independent draws. Strong: the main metric of a task.",
        )
    )
    for name, task in tasks.items():
        notes = [task["data"]]
        if task["truncated"]:
            notes.append(f"{task['truncated']} prompts did not fit and lost their beginning")
        if task["not_finite"]:
            notes.append(f"{task['not_finite']} items have likelihoods that are not finite: their metrics say nothing")
        if task["rejected"]:
            notes.append(f"{task['rejected']} records were set aside (rejects/)")
        blocks.append(Text(f"{name}: {'; '.join(notes)}."))
    return Section("Scores", blocks)


def _comparison(comparison: Sequence["Paired"], other: str) -> Section:
    main = list({paired.task: paired for paired in reversed(comparison)}.values())[::-1]
    blocks: list[Block] = [Text(paired.verdict) for paired in main]
    blocks.append(
        interval_figure(
            {f"{p.task}, {p.metric}": Interval(p.difference, *p.interval) for p in comparison},
            ylabel="this model minus the other",
            caption=(
                f"Paired over the items that both have; the other is {other}. The bar is the 95% interval of 10,000 "
                "draws of items with replacement."
            ),
        )
    )
    rows = [
        [
            p.task,
            p.metric,
            f"{p.ours:.4f}",
            f"{p.theirs:.4f}",
            f"{p.difference:+.4f}",
            "–" if p.standard_error is None else f"{p.standard_error:.4f}",
            f"{p.changed[0]} / {p.changed[1]}",
            f"{p.n:,}",
            f"{p.p_value:.2g}",
            f"{p.adjusted_p_value:.2g}" if p in main else "–",
            p.test,
        ]
        for p in comparison
    ]
    header = [
        "task",
        "metric",
        "this",
        "other",
        "difference",
        "standard error",
        "better / worse",
        "items",
        "p",
        "Holm",
        "test",
    ]
    blocks.append(
        Table(
            header,
            rows,
            number_columns=range(2, 10),
            caption="Holm: p of the main metrics, corrected for how many tasks are compared.",
        )
    )
    if differing := {p.task: p.prompts_differ for p in main if p.prompts_differ}:
        said = ", ".join(f"{count} of {task}" for task, count in differing.items())
        blocks.append(Text(f"Prompts differ between the two evaluations: {said}. The questions are the same."))
    return Section("Compared with another evaluation", blocks)


def _samples(name: str, items: Sequence["Item"], task: Mapping[str, Any]) -> Section:
    """Some of the best and of the worst items."""
    metric = task["main_metric"]
    ranked = sorted(items, key=lambda item: item.metrics[metric].value / item.metrics[metric].weight)
    if task["higher_is_better"][metric]:
        ranked.reverse()
    chosen = [*ranked[:_SAMPLES], *ranked[max(_SAMPLES, len(ranked) - _SAMPLES) :]]
    return Section(f"Items of {name}", [_sample(item, metric) for item in chosen])


def _sample(item: "Item", metric: str) -> Sample:
    measured = item.metrics[metric]
    if item.choices:
        text = "".join(
            f"\n{'→' if item.target in (str(index), choice.strip()) else ' '} {choice.strip()}   ({response[0]:.2f})"
            for index, (choice, response) in enumerate(zip(item.choices, item.responses, strict=True))
        )
    elif item.responses and isinstance(item.responses[0], str):
        text = item.responses[0]
    else:
        text = ""
    prompt = item.prompt if len(item.prompt) <= _SHOWN else f"… {item.prompt[-_SHOWN:]}"
    return Sample(f"item {item.index}, {metric} {measured.value / measured.weight:.3g}", prompt, text)
