"""The page that a verification ends with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpm_jax.common import report
from cpm_jax.common.figures import Interval, human, human_seconds, interval_figure
from cpm_jax.common.report import Details, Headline, Page, Section, Table, Text
from cpm_jax.common.training_report import REPORT_FILE, footer
from cpm_jax.curation.verification import DEFAULT


def write_verification_report(workdir: Path, results: Mapping[str, Any]) -> Path:
    """Writes `report.html`.

    Args:
        workdir: of the verification.
        results: what results.json holds.

    Returns:
        Path of the page.
    """
    cost, ranking = results["cost"], results["ranking"]
    best = next(name for name in ranking if name != DEFAULT)
    page = Page(
        title="Verification of data",
        subtitle=f"{len(ranking) - 1} candidates and the default mix, {results['pairs'][0]['seeds']} seeds each.",
        headlines=[
            Headline("Best candidate", best, "", f"{_figure(results, best)} {results['unit']['name']}"),
            Headline("Tokens", human(cost["tokens"]), "", f"{cost['cells']} annealings"),
            Headline("Training", human_seconds(cost["train_seconds"]), "", f"{cost['flops']:.2g} FLOPs"),
            Headline(
                "From the beginning", f"{cost['from_scratch_ratio']:.1f}", "times the tokens", "for the same models"
            ),
        ],
        sections=[
            Section("Verdict", [Text(results["verdict"])]),
            _against_default(results),
            _scores(results),
            _pairs(results),
            _candidates(results),
            Section("Run", [Details("Settings and versions", json.dumps(_about(results), indent=1))]),
        ],
        footer=footer(),
    )
    return report.write(page, workdir / REPORT_FILE)


def _about(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: results[name] for name in ("config", "checkpoint", "learning_rate", "cost", "versions", "machine")}


def _figure(results: Mapping[str, Any], name: str) -> str:
    return f"{results['scores'][name]['mean']:.{results['unit']['digits']}f}"


def _against_default(results: Mapping[str, Any]) -> Section:
    intervals = {}
    for pair in results["pairs"]:
        if DEFAULT in (pair["first"], pair["second"]):
            sign = 1 if pair["second"] == DEFAULT else -1
            low, high = sorted(sign * end for end in pair["interval"])
            name = pair["first"] if sign == 1 else pair["second"]
            intervals[name] = Interval(sign * pair["value"], low, high)
    ordered = {name: intervals[name] for name in results["ranking"] if name in intervals}
    caption = "The bar is the 95% interval over items and seeds, of this comparison alone."
    ylabel = f"better than the default mix by ({results['unit']['name']})"
    return Section("Against the default mix", [interval_figure(ordered, ylabel=ylabel, caption=caption)])


def _scores(results: Mapping[str, Any]) -> Section:
    digits, tasks = results["unit"]["digits"], list(results["items"])
    rows = []
    for name, found in results["scores"].items():
        figures = [f"{found['tasks'][task]:.{digits}f}" for task in tasks]
        passes = f"{results['passes'][name]:.2f}" if name in results["passes"] else "–"
        rows.append([name, f"{found['mean']:.{digits}f}", *figures, passes])
    better = "more" if results["unit"]["higher_is_better"] else "fewer"
    return Section(
        f"Scores ({results['unit']['name']}; {better} is better)",
        [
            Table(
                ["candidate", "mean", *tasks, "passes"],
                rows,
                number_columns=range(1, len(tasks) + 3),
                caption="Means over seeds. Passes: how often an annealing read the candidate's training text.",
            )
        ],
    )


def _pairs(results: Mapping[str, Any]) -> Section:
    digits = results["unit"]["digits"]
    rows, strong = [], []
    for index, pair in enumerate(results["pairs"]):
        if pair["significant"]:
            strong.append(index)
        more = (
            "–" if pair["significant"] else "no number" if pair["more_tokens"] is None else human(pair["more_tokens"])
        )
        low, high = pair["interval"]
        rows.append(
            [
                pair["first"],
                pair["second"],
                f"{pair['value']:+.{digits}f}",
                f"{low:+.{digits}f} to {high:+.{digits}f}",
                f"{pair['p_value']:.2g}",
                f"{pair['adjusted_p_value']:.2g}",
                more,
            ]
        )
    header = ["better", "than", "by", "95% interval", "p", "Holm", "more tokens to tell"]
    caption = (
        "Strong: told apart at the 5% level after Holm's correction for the number of pairs. Tokens that both together "
        "would still need for a power of 80%, if the true difference is the one found."
    )
    table = Table(header, rows, number_columns=range(2, 7), strong_rows=strong, caption=caption)
    return Section("All pairs", [table])


def _candidates(results: Mapping[str, Any]) -> Section:
    rows = []
    for name, found in results["candidates"].items():
        set_aside = ", ".join(f"{count:,} {reason}" for reason, count in found["set_aside"].items()) or "–"
        rows.append([name, *(f"{found[count]:,}" for count in ("documents", "tokens", "duplicates")), set_aside])
    header = ["candidate", "documents", "tokens", "duplicates left out", "set aside"]
    caption = "Of a candidate that came as a dataset folder: what was counted when that was prepared."
    return Section("What the candidates hold", [Table(header, rows, caption, number_columns=range(1, 4))])
