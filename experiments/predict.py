"""The verb `predict`: what a family of small runs says about a large one."""

import dataclasses
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cpm_jax.common import provenance
from cpm_jax.common.config import ConfigError, InputError, config_dataclass, config_from_dict, config_to_dict
from cpm_jax.common.figures import human
from cpm_jax.common.files import write_json
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import count_params, train_flops_per_token
from cpm_jax.planning.chips import CHIPS
from cpm_jax.scaling.fitting import FitError
from cpm_jax.scaling.laws import Interval, compute_optimal, fit_loss, frontier_exponent, make_points
from cpm_jax.scaling.prediction import (
    LossPrediction,
    Setup,
    Target,
    decay_share,
    next_experiments,
    points_of,
    predict_loss,
    suggest,
)
from cpm_jax.scaling.runs import Run, finished, merge_runs, read_runs
from cpm_jax.scaling.scores import fit_scores
from experiments.predict_report import interval_text, write_prediction_report

RESULTS_FILE = "prediction.json"


@config_dataclass
class PredictConfig:
    """Which runs, and what they should tell about.

    Attributes:
        runs: a runs.jsonl, or several.
        num_params: N of the large model, non-embedding; 0 takes that of the plan's model.
        tokens: D of it; 0 takes the plan's budget.
        plan: a plan.json that `plan` wrote for its pod: the cost is then its estimate; "" takes `chip` and `mfu`.
        scores: a .jsonl with {"run": id, "task": …, "loss": …, "score": …} of the runs: ScalingBench's loss and the
            score, by which the score of the large model is predicted; "" leaves it out.
        chip: whose hours are counted without a plan.
        mfu: model-FLOP utilisation there.
        price_per_chip_hour: in any currency; 0 tells no price.
        level: share of the intervals.
        samples: fits of each bootstrap.
        next_budget: the most that the next experiment may cost, in parts of what all runs cost so far.
        seed: of the bootstraps.
    """

    runs: str | tuple[str, ...] | list[str]
    num_params: NonNegativeFloat = 0.0
    tokens: NonNegativeFloat = 0.0
    plan: str = ""
    scores: str = ""
    chip: str = "v5p"
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.4
    price_per_chip_hour: NonNegativeFloat = 0.0
    level: Annotated[float, Field(gt=0, lt=1)] = 0.9
    samples: PositiveInt = 200
    next_budget: PositiveFloat = 1.0
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("PredictConfig.runs = (): give at least one runs.jsonl", field="PredictConfig.runs")
        if self.chip not in CHIPS:
            raise ConfigError(
                f"PredictConfig.chip = {self.chip!r}: there are {', '.join(CHIPS)}", field="PredictConfig.chip"
            )
        for name in ("num_params", "tokens"):
            if not getattr(self, name) and not self.plan:
                raise ConfigError(
                    f"PredictConfig.{name} = 0: give the target's, or a plan that has it", field=f"PredictConfig.{name}"
                )

    @property
    def run_files(self) -> tuple[str, ...]:
        """`runs`, also when it is one."""
        return (self.runs,) if isinstance(self.runs, str) else tuple(self.runs)


class Cost(NamedTuple):
    """What the large run takes, estimated.

    Attributes:
        flops: of its training.
        chip_hours: of it.
        days: on the plan's slice; None without a plan.
        price: in the currency of the price; None where there is none.
        basis: what it rests on.
    """

    flops: float
    chip_hours: float
    days: float | None
    price: float | None
    basis: str


def run(config: PredictConfig, workdir: Path) -> dict[str, Any]:
    """Fits, predicts, prints, and writes prediction.json and report.html.

    Raises:
        ConfigError: no target.
        InputError: runs, scores or a plan that cannot be read, or of which no law can be told.
    """
    runs = merge_runs(*(read_runs(path) for path in config.run_files))
    left_out = finished(runs).left_out
    plan = _read_plan(config.plan) if config.plan else None
    target = _target(config, plan)
    points = points_of(runs)
    found = predict_loss(points, target, level=config.level, samples=config.samples, seed=config.seed)
    cost = _cost(config, plan, target)
    spent = float(sum(one.flops for one in runs))
    try:
        experiments = next_experiments(
            found.best.law, target, config.next_budget * spent, level=config.level, seed=config.seed
        )
    except FitError as error:
        raise FitError(f"PredictConfig.next_budget = {config.next_budget:g} of {spent:.3g} FLOPs: {error}") from error
    share, share_note = decay_share(runs)
    scores, refused_scores = _scores(config, runs, found, target) if config.scores else ({}, [])
    settings = {
        "learning_rate": suggest(runs, "learning_rate", target, level=config.level),
        "batch_tokens": suggest(runs, "batch_tokens", target, level=config.level),
    }
    results: dict[str, Any] = {
        "target": target._asdict(),
        "loss": found.loss._asdict(),
        "form": found.best.form,
        "coefficients": {
            name: value._asdict() for name, value in found.best.law.coefficient_intervals(config.level).items()
        },
        "forms": [_form(one) for one in found.candidates],
        "refused": found.refused,
        "scores": scores,
        "settings": {name: _setting(setup) for name, setup in settings.items()},
        "decay_share": {"value": share, "note": share_note},
        "compute_optimal": _frontier(found, target),
        "cost": cost._asdict(),
        "spent_flops": spent,
        "next": [one._asdict() for one in experiments],
        "runs": {"given": len(runs), "fitted": len(points.loss), "left_out": left_out},
        "points": {name: values.tolist() for name, values in points._asdict().items()},
        "warnings": _warnings(found, target, left_out) + refused_scores,
        "config": config_to_dict(config),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_revision": provenance.git_revision(),
    }
    write_json(workdir / RESULTS_FILE, _finite(results))
    path = write_prediction_report(workdir, results, found)
    for line in describe(results):
        print(line)
    print(f"report: {path}")
    return results


def describe(results: Mapping[str, Any]) -> list[str]:
    """The prediction in some lines for the terminal."""
    target, loss, cost = results["target"], results["loss"], results["cost"]
    level = results["config"]["level"]
    lines = [
        f"{human(target['num_params'])} parameters on {human(target['tokens'])} tokens: loss {loss['value']:.4f} "
        f"({loss['low']:.4f} to {loss['high']:.4f}, {level:.0%}), by {results['runs']['fitted']} runs and the form "
        f"{results['form']}"
    ]
    for task, score in results["scores"].items():
        value = score["score"]
        lines.append(f"score of {task}: {value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})")
    for name, what in (("learning_rate", "learning rate"), ("batch_tokens", "tokens of a batch")):
        setting = results["settings"][name]
        said = "unknown" if setting["value"] is None else interval_text(setting["value"])
        lines.append(f"{what}: {said} ({setting['note']})")
    optimal = results["compute_optimal"]
    if optimal:
        lines.append(
            f"tokens: {human(target['tokens'])}, {target['tokens'] / target['num_params']:.0f} a parameter; of this "
            f"compute the least loss is {optimal['loss']:.4f}, at {human(optimal['num_params'])} parameters and "
            f"{human(optimal['tokens'])} tokens"
        )
    lines.append(f"decay: {results['decay_share']['value']:.0%} of the tokens ({results['decay_share']['note']})")
    price = "" if cost["price"] is None else f", {cost['price']:,.0f} in money"
    days = "" if cost["days"] is None else f", {cost['days']:,.1f} days"
    lines.append(
        f"cost: {cost['flops']:.3g} FLOPs, {cost['chip_hours']:,.0f} chip-hours{days}{price} ({cost['basis']})"
    )
    first = results["next"][0]
    lines.append(
        f"next experiment: {human(first['num_params'])} parameters on {human(first['tokens'])} tokens, "
        f"{first['flops']:.3g} FLOPs, {first['flops'] / results['spent_flops']:.0%} of what the runs cost: the "
        f"interval would be {first['narrower']:.0%} narrower"
    )
    return lines + [f"warning: {warning}" for warning in results["warnings"]]


def _form(one: Any) -> dict[str, Any]:
    return {
        "form": one.form,
        "coefficients": one.law.coefficients,
        "held_out_error": one.error,
        "held_out": [held._asdict() | {"error": held.error, "covered": held.covered} for held in one.held_out],
        "prediction": one.prediction._asdict(),
        "accepted": one.accepted,
        "starts_agreeing": [one.law.best.agreeing, one.law.best.starts],
    }


def _setting(setup: Setup) -> dict[str, Any]:
    law = setup.law
    return {
        "value": None if setup.value is None else setup.value._asdict(),
        "note": setup.note,
        "optima": [optimum._asdict() for optimum in setup.optima],
        "law": None if law is None else {"coefficient": law.coefficient, "exponents": law.exponents},
    }


def _frontier(found: LossPrediction, target: Target) -> dict[str, Any]:
    """The best N and D of the target's compute; empty where the form does not tell."""
    law = found.best.law
    if law.form == "compute":
        return {}
    n, d = compute_optimal(law, 6 * target.num_params * target.tokens)
    return {"num_params": n, "tokens": d, "loss": law.predict(n, d), "exponent": frontier_exponent(law)}


def _warnings(found: LossPrediction, target: Target, left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """What a reader should know before the figures are believed."""
    points, said = found.best.law.points, []
    far = 6 * target.num_params * target.tokens / points.flops.max()
    if far > 1000:
        said.append(f"the target has {far:.2g} times the compute of the largest run; a law this far out is a guess")
    ratio, own = target.tokens / target.num_params, float(np.median(points.tokens / points.num_params))
    if found.best.form == "compute" and abs(np.log(ratio / own)) > 0.1:
        said.append(
            f"the runs have {own:.3g} tokens a parameter and the target {ratio:.3g}: the loss is that of the target's "
            "compute at the runs' ratio"
        )
    if found.best.law.best.agreeing < 2:
        said.append("only one start of the fit ended at its minimum")
    if not found.best.held_out:
        said.append("too few runs to hold any of them out: the law's extrapolation is unchecked")
    elif not all(held.covered for held in found.best.held_out):
        missed = sum(not held.covered for held in found.best.held_out)
        said.append(f"{missed} of {len(found.best.held_out)} held-out runs lie outside of their intervals")
    said += [f"{len(ids)} runs left out, {status}: {', '.join(ids)}" for status, ids in left_out.items()]
    return said


def _scores(
    config: PredictConfig, runs: Sequence[Run], found: LossPrediction, target: Target
) -> tuple[dict[str, Any], list[str]]:
    """Score of each task: a law of its loss over N and D, and a sigmoid from that loss to the score.

    Returns:
        What was found by task, and why the other tasks tell nothing.
    """
    by_id = {one.id: one for one in finished(runs).runs}
    tasks: dict[str, list[tuple[Run, float, float]]] = {}
    path = Path(config.scores)
    if not path.exists():
        raise InputError(f"{path}: no such file of scores")
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a file of scores: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            scored = (by_id[row["run"]], float(row["loss"]), float(row["score"]))
            tasks.setdefault(str(row["task"]), []).append(scored)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f'{path}, line {number}: {error!r}; a line is {{"run": id of a run that is done, "task": "…", "loss": '
                '…, "score": 0 to 1}'
            ) from error
    results: dict[str, Any] = {}
    refused: list[str] = []
    for task, rows in tasks.items():
        try:
            points = make_points(
                [one.num_params for one, _, _ in rows],
                [one.tokens for one, _, _ in rows],
                [loss for _, loss, _ in rows],
                [one.flops for one, _, _ in rows],
            )
            law = fit_loss(points, found.best.form, samples=config.samples, seed=config.seed)
            scores = fit_scores(points.loss, [score for _, _, score in rows], samples=config.samples, seed=config.seed)
        except FitError as error:
            refused.append(f"no score of {task} is predicted: {error}")
            continue
        draws = law.draws(*target)
        results[task] = {
            "loss": law.interval(*target, level=config.level)._asdict(),
            "score": scores.interval(draws, level=config.level)._asdict(),
            "coefficients": scores.coefficients,
            "losses": points.loss.tolist(),
            "scores": scores.scores.tolist(),
        }
    return results, refused


def _read_plan(path: str) -> dict[str, Any]:
    """A plan.json with its recommended evaluation as "best".

    Raises:
        InputError: it is no plan, or one that recommends nothing.
    """
    try:
        plan = json.loads(Path(path).read_text("utf-8"))
        best = next(one for one in plan["evaluations"] if one["label"] == plan["recommended"])
        best["estimated"]["tokens_per_second_per_chip"]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise InputError(f"{path}: not a plan.json that recommends a layout: {error!r}") from error
    return plan | {"best": best}


def _target(config: PredictConfig, plan: Mapping[str, Any] | None) -> Target:
    model = config_from_dict(ModelConfig, plan["workload"]["model"]) if plan else None
    num_params = config.num_params or (count_params(model).non_embedding if model else 0)
    return Target(float(num_params), float(config.tokens or (plan["token_budget"] if plan else 0)))


def _cost(config: PredictConfig, plan: Mapping[str, Any] | None, target: Target) -> Cost:
    if plan is None:
        flops = 6 * target.num_params * target.tokens
        hours = flops / (CHIPS[config.chip].peak_flops * config.mfu) / 3600
        days, basis = None, f"6ND at {config.mfu:.0%} of a {config.chip}'s peak"
    else:
        model = config_from_dict(ModelConfig, plan["workload"]["model"])
        flops = train_flops_per_token(model, plan["workload"]["seq_len"]) * target.tokens
        per_chip = plan["best"]["estimated"]["tokens_per_second_per_chip"]
        hours = target.tokens / per_chip / 3600
        days, basis = hours / plan["chips"] / 24, f"the plan for {plan['topology']}, {plan['recommended']}"
    price = config.price_per_chip_hour or (plan["price_per_chip_hour"] if plan else 0)
    return Cost(flops, hours, days, hours * price if price else None, basis)


def _finite(value: Any) -> Any:
    """The same with None for what JSON has no number for, and numpy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    if dataclasses.is_dataclass(value) or isinstance(value, Interval):
        return _finite(value._asdict() if isinstance(value, Interval) else dataclasses.asdict(value))  # type: ignore[arg-type]
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
