"""The pages that `classify` ends with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpm_jax.common import report
from cpm_jax.common.figures import Series, bar_figure, human_bytes, line_figure
from cpm_jax.common.report import Details, Figures, Headline, Page, Sample, Section, Table, Text
from cpm_jax.common.training_report import REPORT_FILE, footer

_SET_ASIDE = ["pool", "documents", "set aside"]


def write_training_report(workdir: Path, result: Mapping[str, Any]) -> Path:
    """Writes `report.html` of a training.

    Args:
        workdir: where it goes.
        result: what `classifier.json` holds.
    """
    at = result["at_threshold"]
    precision = "–" if at["precision"] is None else f"{at['precision']:.3f}"
    headlines = [
        Headline("Average precision", f"{result['average_precision']:.3f}", "", "on held-out documents"),
        Headline("Calibration error", f"{result['expected_calibration_error']:.3f}", "", "0 is perfect"),
        Headline("Threshold", f"{result['threshold']:.3f}", "", f"precision {precision}, recall {at['recall']:.3f}"),
        Headline("Kept of the negative pool", f"{100 * at['keep_rate_of_negatives']:.1f}", "%"),
    ]
    sections = [_curves(result), _pools(result)]
    if "words" in result:
        sections.append(_words(result["words"]))
    sections.append(_mistakes(result["mistakes"]))
    if "before_quantization" in result:
        sections.append(_quantization(result))
    sections.append(Section("Run", [Details("Settings", json.dumps(result["config"], indent=1))]))
    held_out = result["held_out"]
    page = Page(
        title=f"Classifier ({result['kind']})",
        subtitle=(
            f"{sum(result['examples'].values()):,} examples; measured on {held_out['positive']:,} positive and "
            f"{held_out['negative']:,} negative documents that were not trained on."
        ),
        headlines=headlines,
        sections=sections,
        footer=footer(),
    )
    return report.write(page, workdir / REPORT_FILE)


def write_scoring_report(workdir: Path, summary: Mapping[str, Any]) -> Path:
    """Writes `report.html` of a scoring.

    Args:
        workdir: where it goes.
        summary: what `summary.json` holds.
    """
    share = summary["kept"] / max(1, summary["documents"])
    blocks: list[report.Block] = [_histogram({"documents": summary["histogram"]}, summary["threshold"])]
    if summary["set_aside"]:
        rows = [[reason, f"{count:,}"] for reason, count in summary["set_aside"].items()]
        blocks.append(Table(["could not be read", "records"], rows, number_columns=(1,)))
    blocks += _quarantined(summary["quarantined"])
    samples = [
        Section(
            f"Some that are {name}",
            [Sample(f"{s['id']}, score {s['score']:.3f}", "", s["text"]) for s in summary["samples"][name]],
        )
        for name in ("kept", "dropped")
    ]
    page = Page(
        title="Scored documents",
        subtitle=f"Kept are those that score {summary['threshold']:.3f} or more.",
        headlines=[
            Headline("Documents", f"{summary['documents']:,}"),
            Headline("Kept", f"{100 * share:.1f}", "%", f"{summary['kept']:,} documents"),
            Headline("Text kept", human_bytes(summary["kept_bytes"]), "", f"of {human_bytes(summary['bytes'])}"),
        ],
        sections=[Section("Scores", blocks), *samples],
        footer=footer(),
    )
    return report.write(page, workdir / REPORT_FILE)


def _histogram(counts: Mapping[str, list[int]], threshold: float) -> report.Figure:
    centres = ((np.arange(20) + 0.5) / 20).tolist()
    return line_figure(
        {name: Series(centres, values, markers=True) for name, values in counts.items()},
        xlabel="score",
        ylabel="documents in bins of 0.05",
        caption=f"Documents from {threshold:.3f} on are kept.",
        from_zero=True,
        wide=False,
    )


def _curves(result: Mapping[str, Any]) -> Section:
    curve, calibration = result["curve"], result["calibration"]
    order = np.argsort(curve["recall"], kind="stable")
    precision = line_figure(
        {"precision": Series(np.array(curve["recall"])[order].tolist(), np.array(curve["precision"])[order].tolist())},
        xlabel="recall",
        ylabel="precision",
        caption="Every threshold is a point.",
        wide=False,
    )
    calibrated = line_figure(
        {
            "measured": Series(calibration["mean_score"], calibration["positive_share"], markers=True),
            "perfect": Series([0, 1], [0, 1]),
        },
        xlabel="mean score",
        ylabel="share of positives",
        caption="Below the straight line, scores promise too much. It depends on the shares of the pools.",
        wide=False,
    )
    keep = line_figure(
        {
            name: Series(curve["thresholds"], curve[key])
            for name, key in (("precision", "precision"), ("recall", "recall"), ("kept of all", "keep_rate"))
        },
        xlabel="threshold",
        ylabel="share",
        from_zero=True,
        wide=False,
    )
    return Section(
        "On held-out documents",
        [Figures([precision, calibrated, keep, _histogram(result["histogram"], result["threshold"])])],
    )


def _pools(result: Mapping[str, Any]) -> Section:
    rows = [
        [
            name,
            f"{pool['documents']:,}",
            ", ".join(f"{count:,} {why}" for why, count in pool["set_aside"].items()) or "–",
        ]
        for name, pool in result["pools"].items()
    ]
    damaged = [reject for pool in result["pools"].values() for reject in pool["quarantined"]]
    return Section("Pools", [Table(_SET_ASIDE, rows, number_columns=(1,)), *_quarantined(damaged)])


def _quarantined(rejects: Sequence[Mapping[str, str]]) -> list[report.Block]:
    """Files of many documents that are damaged; no table where there is none."""
    rows = [[reject["source"], reject["id"], reject["reason"], reject["detail"]] for reject in rejects]
    caption = "Files that break off: which documents they lost is not known, so nothing of them is used."
    return [Table(["source", "quarantined", "why", "detail"], rows, caption)] if rows else []


def _words(words: Mapping[str, list[Mapping[str, Any]]]) -> Section:
    blocks: list[report.Block] = [
        Text(
            "A document's log-odds are the mean of the pulls of its words and runs of words. Listed are the words with "
            "the largest pull times occurrences."
        )
    ]
    for name, found in words.items():
        rows = [[w["word"], f"{w['pull']:+.2f}", f"{w['count']:,}"] for w in found]
        blocks.append(Table([f"for {name}", "pull", "occurrences"], rows, number_columns=(1, 2)))
    return Section("The words that decide", blocks)


def _mistakes(mistakes: Mapping[str, list[Mapping[str, Any]]]) -> Section:
    blocks: list[report.Block] = [
        Sample(f"{name.replace('_', ' ')}: {found['id']}, score {found['score']:.3f}", "", found["text"])
        for name, rows in mistakes.items()
        for found in rows
    ]
    return Section("Its worst mistakes", blocks or [Text("None on the held-out documents.")])


def _quantization(result: Mapping[str, Any]) -> Section:
    before = result["before_quantization"]
    names = ("average_precision", "accuracy_at_0.5", "expected_calibration_error", "brier")
    rows = [[name.replace("_", " "), f"{before[name]:.4f}", f"{result[name]:.4f}"] for name in names]
    size = bar_figure({"model.ftz": result["model"]["bytes"]}, ylabel="size", format_value=human_bytes, wide=False)
    return Section("Quantisation", [Table(["", "before", "after"], rows, number_columns=(1, 2)), size])
