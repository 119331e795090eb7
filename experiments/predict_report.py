"""The page that a prediction ends with."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cpm_jax.common import report
from cpm_jax.common.figures import Interval as Whisker
from cpm_jax.common.figures import Series, human, interval_figure, line_figure
from cpm_jax.common.report import Details, Figures, Headline, Page, Section, Table, Text
from cpm_jax.common.training_report import REPORT_FILE, footer
from cpm_jax.scaling.prediction import LossPrediction, law_curve


def write_prediction_report(workdir: Path, results: Mapping[str, Any], found: LossPrediction) -> Path:
    """Writes `report.html`.

    Args:
        workdir: of the prediction.
        results: what prediction.json holds.
        found: the laws.

    Returns:
        Path of the page.
    """
    target, loss, cost, first = results["target"], results["loss"], results["cost"], results["next"][0]
    rate = results["settings"]["learning_rate"]
    page = Page(
        title="Prediction",
        subtitle=f"{human(target['num_params'])} parameters on {human(target['tokens'])} tokens, from "
        f"{results['runs']['fitted']} runs of at most {found.best.law.points.flops.max():.2g} FLOPs.",
        headlines=[
            Headline("Loss", f"{loss['value']:.3f}", "nats/token", f"{loss['low']:.3f} to {loss['high']:.3f}"),
            Headline(
                "Learning rate", "?" if rate["value"] is None else human(rate["value"]["value"]), "", rate["note"]
            ),
            Headline("Cost", human(cost["chip_hours"]), "chip-hours", cost["basis"]),
            Headline(
                "Next experiment",
                f"{human(first['num_params'])} × {human(first['tokens'])}",
                "",
                f"interval {first['narrower']:.0%} narrower",
            ),
        ],
        sections=[
            Section("Before you believe it", [Text(said) for said in results["warnings"] or ["Nothing stands out."]]),
            _loss_section(results, found),
            _forms(results),
            *([_scores(results)] if results["scores"] else []),
            _settings(results),
            _next(results),
            Section("Run", [Details("Everything", json.dumps(results, indent=1, default=str))]),
        ],
        footer=footer(),
    )
    return report.write(page, workdir / REPORT_FILE)


def interval_text(value: Mapping[str, float]) -> str:
    """A figure with its interval, where it has one."""
    if not math.isfinite(value["low"]):
        return human(value["value"])
    return f"{human(value['value'])} ({human(value['low'])} to {human(value['high'])})"


def _loss_section(results: Mapping[str, Any], found: LossPrediction) -> Section:
    law, target = found.best.law, results["target"]
    order = np.argsort(law.points.flops)
    measured = np.log10(law.points.flops[order])
    fitted = [
        law.predict(*(values[i] for values in (law.points.num_params, law.points.tokens, law.points.flops)))
        for i in order
    ]
    ratio = target["tokens"] / target["num_params"]
    computes = np.geomspace(law.points.flops.min(), 6 * target["num_params"] * target["tokens"], 40)
    curve = law_curve(law, ratio, list(computes), results["config"]["level"])
    there = list(np.log10(computes))
    near = line_figure(
        {
            "measured": Series(list(measured), list(law.points.loss[order]), markers=True),
            "law": Series(list(measured), fitted, markers=True),
        },
        xlabel="log10 of the FLOPs of a run",
        ylabel="held-out loss (nats per token)",
        caption="The runs that the law was fitted to, and the law at their own N and D.",
    )
    far = line_figure(
        {
            "law": Series(there, [one.value for one in curve]),
            "lower end": Series(there, [one.low for one in curve]),
            "upper end": Series(there, [one.high for one in curve]),
        },
        xlabel="log10 of the FLOPs of a run",
        ylabel="predicted loss (nats per token)",
        caption=f"From the smallest run to the target, at the target's {ratio:.0f} tokens a parameter.",
    )
    return Section("Loss", [near, far])


def _forms(results: Mapping[str, Any]) -> Section:
    rows = []
    for one in results["forms"]:
        value = one["prediction"]
        coefficients = ", ".join(f"{name} {number:.4g}" for name, number in one["coefficients"].items())
        error = f"{one['held_out_error']:.2%}" if one["held_out"] else "–"
        rows.append(
            [
                one["form"],
                f"{value['value']:.4f}",
                f"{value['low']:.4f} to {value['high']:.4f}",
                error,
                "yes" if one["accepted"] else "no",
                coefficients,
            ]
        )
    rows += [[name, "–", "–", "–", "no", why] for name, why in results["refused"].items()]
    errors = {
        f"{one['form']}, {human(held['num_params'])} × {human(held['tokens'])}": Whisker(
            100 * held["error"], 100 * (held["low"] / held["loss"] - 1), 100 * (held["high"] / held["loss"] - 1)
        )
        for one in results["forms"]
        for held in one["held_out"]
    }
    blocks: list[Any] = [
        Table(
            ["form", "loss", "interval", "held-out error", "counts", "coefficients"],
            rows,
            number_columns=[1, 2, 3],
            strong_rows=[0],
            caption="Held-out error: of the largest runs, by a law of the smaller ones. The headline's interval "
            "reaches over all forms that count: those within twice the least error.",
        )
    ]
    if errors:
        caption = "Predicted over measured loss of the held-out runs, with the prediction's interval."
        blocks.append(interval_figure(errors, ylabel="error of the prediction (%)", caption=caption))
    return Section("Forms of the law", blocks)


def _scores(results: Mapping[str, Any]) -> Section:
    rows, figures = [], []
    for task, one in results["scores"].items():
        score, loss = one["score"], one["loss"]
        rows.append(
            [
                task,
                f"{loss['value']:.4f} ({loss['low']:.4f} to {loss['high']:.4f})",
                f"{score['value']:.3f} ({score['low']:.3f} to {score['high']:.3f})",
            ]
        )
        order = np.argsort(one["losses"])
        figures.append(
            line_figure(
                {"runs": Series([one["losses"][i] for i in order], [one["scores"][i] for i in order], markers=True)},
                xlabel="loss on the benchmark",
                ylabel=f"score of {task}",
                wide=False,
            )
        )
    return Section("Scores", [Table(["task", "predicted loss", "predicted score"], rows), Figures(figures)])


def _settings(results: Mapping[str, Any]) -> Section:
    rows = []
    for name, setting in results["settings"].items():
        said = "unknown" if setting["value"] is None else interval_text(setting["value"])
        law = setting["law"]
        shown = (
            "–"
            if law is None
            else " · ".join(
                [
                    f"{law['coefficient']:.4g}",
                    *(f"{variable}^{power:.3f}" for variable, power in law["exponents"].items()),
                ]
            )
        )
        rows.append([name, said, shown, setting["note"]])
    share = results["decay_share"]
    rows.append(["decay share", f"{share['value']:.0%}", "–", share["note"]])
    return Section("Settings", [Table(["setting", "suggested", "law", "rests on"], rows)])


def _next(results: Mapping[str, Any]) -> Section:
    rows = [
        [
            human(one["num_params"]),
            human(one["tokens"]),
            f"{one['flops']:.3g}",
            f"{one['flops'] / results['spent_flops']:.1%}",
            f"{one['narrower']:.0%}",
        ]
        for one in results["next"]
    ]
    return Section(
        "Next experiment",
        [
            Table(
                ["N", "D", "FLOPs", "of all so far", "interval narrower by"],
                rows,
                number_columns=range(5),
                strong_rows=[0],
                caption="Each simulated: a run with the law's own loss is added, and the law is fitted and "
                "bootstrapped again. Below 0 is the scatter of the bootstrap.",
            )
        ],
    )
