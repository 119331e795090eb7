"""What a family of small runs says about a large one, and the next run that would say it better."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cpm_jax.common.config import InputError
from cpm_jax.scaling.fitting import FitError
from cpm_jax.scaling.hyperparameters import Optimum, PowerLaw, Setting, find_optima, fit_power_law
from cpm_jax.scaling.laws import (
    FORMS,
    FormName,
    HeldOut,
    Interval,
    LossLaw,
    Points,
    check_extrapolation,
    fit_loss,
    points_of_runs,
    with_point,
)
from cpm_jax.scaling.runs import Run, but_seed, finished

DECAY_SHARE = 0.1  # of all tokens, where none was varied (MiniCPM, arXiv:2404.06395 §4.3)
_ACCEPTED = 2.0  # times the error of the best form, within which a form still counts


class Target(NamedTuple):
    """The large run.

    Attributes:
        num_params: N, non-embedding.
        tokens: D.
    """

    num_params: float
    tokens: float


class Candidate(NamedTuple):
    """A form of the law, and how it does.

    Attributes:
        form: which.
        law: fitted to all runs.
        held_out: the largest runs as the smaller ones predict them.
        error: root mean square of their relative errors.
        prediction: at the target.
        accepted: whether the form's interval counts.
    """

    form: FormName
    law: LossLaw
    held_out: list[HeldOut]
    error: float
    prediction: Interval
    accepted: bool


class LossPrediction(NamedTuple):
    """The loss of the target.

    Attributes:
        loss: of the form with the least held-out error; the interval reaches over those of all accepted forms.
        best: that form.
        candidates: all forms that could be fitted, the best first.
        refused: forms that could not, and why.
    """

    loss: Interval
    best: Candidate
    candidates: list[Candidate]
    refused: dict[str, str]


class Experiment(NamedTuple):
    """A run that is not yet made.

    Attributes:
        num_params: N.
        tokens: D.
        flops: its cost.
        width: of the target's interval (high - low) with the law refitted to this run too.
        narrower: by what part that is narrower than now.
    """

    num_params: float
    tokens: float
    flops: float
    width: float
    narrower: float


class Setup(NamedTuple):
    """A suggested setting.

    Attributes:
        value: with its interval; None where the runs do not say.
        optima: that it rests on.
        law: over N and D, where enough optima were found.
        note: what it rests on, or what is missing, in a sentence.
    """

    value: Interval | None
    optima: list[Optimum]
    law: PowerLaw | None
    note: str


def best_of_each_size(runs: Sequence[Run]) -> list[Run]:
    """Of each N and D the runs with the best setting (all its seeds): laws are of well-tuned runs.

    Runs of one size count as one D where their tokens agree to two digits.
    """
    groups: dict[tuple[int, int], dict[Hashable, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in finished(runs).runs:
        groups[run.num_params, _two_digits(run.tokens)][but_seed(run)].append(run)
    best = []
    for _, settings in sorted(groups.items()):
        best += min(settings.values(), key=lambda same: float(np.mean([run.loss or np.inf for run in same])))
    return best


def predict_loss(
    points: Points, target: Target, *, level: float = 0.9, samples: int = 200, seed: int = 0
) -> LossPrediction:
    """Fits all forms, holds the largest runs against each, and predicts the target by those that do well.

    Args:
        points: of well-tuned runs.
        target: what is predicted.
        level: of the intervals.
        samples: fits of each bootstrap.
        seed: of them.

    Raises:
        FitError: no form can be fitted; names each and why.
    """
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    for form in FORMS:
        if form == "compute" and not one_ratio(points):
            refused[form] = "the runs have several ratios of tokens to parameters; it is for a family of one"
            continue
        try:
            law = fit_loss(points, form, samples=samples, seed=seed)  # type: ignore[arg-type]
            held = _held_out(points, form, level, seed)  # type: ignore[arg-type]
        except FitError as refusal:
            refused[form] = str(refusal)
            continue
        error = float(np.sqrt(np.mean([one.error**2 for one in held]))) if held else float("inf")
        prediction = law.interval(*target, level=level)
        found.append(Candidate(form, law, held, error, prediction, accepted=False))  # type: ignore[arg-type]
    if not found:
        raise FitError("no law can be fitted to these runs: " + "; ".join(f"{k}: {v}" for k, v in refused.items()))
    found.sort(key=lambda one: one.error)
    limit = found[0].error * _ACCEPTED
    found = [one._replace(accepted=one.error <= limit) for one in found]
    chosen = [one.prediction for one in found if one.accepted]
    loss = Interval(found[0].prediction.value, min(one.low for one in chosen), max(one.high for one in chosen))
    return LossPrediction(loss, found[0], found, refused)


def suggest(runs: Sequence[Run], setting: Setting, target: Target, *, level: float = 0.9) -> Setup:
    """The best learning rate or batch at the target, by a power law over the best of each size.

    Args:
        runs: a family in which it was swept.
        setting: which.
        target: where.
        level: of the interval.
    """
    try:
        optima = find_optima(runs, setting)
    except InputError as error:
        return Setup(None, [], None, f"not swept: {error}")
    inside = [optimum for optimum in optima if not optimum.at_edge]
    edge = (
        f"; {len(optima) - len(inside)} more lie at the edge of their grid and are left out"
        if len(inside) < len(optima)
        else ""
    )
    variables = {"num_params": [o.num_params for o in inside], "tokens": [o.tokens for o in inside]}
    at = {"num_params": target.num_params, "tokens": target.tokens}
    tries = ((("num_params", "tokens"), "N and D"), (("num_params",), "N"), (("tokens",), "D"))
    for names, what in tries:
        chosen = {name: variables[name] for name in names}
        try:
            law = fit_power_law([o.value for o in inside], chosen)
        except FitError:
            continue
        value = law.interval(level, **{name: at[name] for name in names})
        alone = (
            ""
            if len(names) == 2
            else f"; how it moves with {'D' if names == ('num_params',) else 'N'} the runs cannot tell"
        )
        return Setup(value, optima, law, f"power law over {what} of {len(inside)} optima{alone}{edge}")
    if not inside:
        return Setup(None, optima, None, f"all {len(optima)} optima lie at the edge of their grid: widen it")
    nearest = min(
        inside, key=lambda o: abs(np.log(o.num_params / target.num_params)) + abs(np.log(o.tokens / target.tokens))
    )
    note = f"that of the size nearest to the target; {len(inside)} optima are too few for a law{edge}"
    return Setup(Interval(nearest.value, float("nan"), float("nan")), optima, None, note)


def decay_share(runs: Sequence[Run]) -> tuple[float, str]:
    """The share of decay that did best most often where it was varied, and what that rests on."""
    by_size: dict[tuple[int, int], dict[tuple[float, Hashable], list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in finished(runs).runs:
        share = next((value for name, value in run.config.items() if name.endswith("decay_share")), None)
        if isinstance(share, int | float):
            setting = (round(float(share), 3), but_seed(run))
            by_size[run.num_params, _two_digits(run.tokens)][setting].append(run.loss or np.inf)
    best = [
        min(settings, key=lambda setting: float(np.mean(settings[setting])))[0]
        for settings in by_size.values()
        if len({share for share, _ in settings}) > 1
    ]
    if not best:
        return DECAY_SHARE, "MiniCPM's; the runs do not vary it"
    return float(np.median(best)), f"median of the best of {len(best)} sizes at which it was varied"


def next_experiments(
    law: LossLaw,
    target: Target,
    budget_flops: float,
    *,
    level: float = 0.9,
    samples: int = 60,
    seed: int = 0,
) -> list[Experiment]:
    """What each of some runs would do to the target's interval: refits with the run simulated, its loss on the law.

    Args:
        law: of the runs so far.
        target: whose interval should shrink.
        budget_flops: the most that a run may cost.
        level: of the interval.
        samples: fits of each bootstrap.
        seed: of them; the same for all, so that they are compared on the same draws.

    Returns:
        Those within the budget, the cheapest of those that shrink it about most first.

    Raises:
        FitError: no run within the budget differs from those that were made.
    """
    points = law.points
    now = _width(fit_loss(points, law.form, samples=samples, seed=seed, start_from=law), target, level)
    per_pair = float(np.median(points.flops / (points.num_params * points.tokens)))
    sizes = sorted({*np.unique(points.num_params), *(points.num_params.max() * factor for factor in (2.0, 4.0))})
    lengths = sorted({points.tokens.min(), points.tokens.max(), points.tokens.max() * 2, points.tokens.max() * 4})
    made = {(round(np.log(n), 1), round(np.log(d), 1)) for n, d in zip(points.num_params, points.tokens, strict=True)}
    found = []
    for n in sizes[:1] + sizes[-4:]:
        for d in lengths:
            flops = per_pair * n * d
            if flops > budget_flops or (round(np.log(n), 1), round(np.log(d), 1)) in made:
                continue
            again = fit_loss(with_point(law, n, d, flops), law.form, samples=samples, seed=seed, start_from=law)
            width = _width(again, target, level)
            found.append(Experiment(float(n), float(d), float(flops), width, 1 - width / now))
    if not found:
        raise FitError(
            f"no new run costs at most {budget_flops:.3g} FLOPs: the smallest is {per_pair * sizes[0] * lengths[0]:.3g}"
        )
    most = max(one.narrower for one in found)
    # Widths of a bootstrap scatter: what is within a tenth of the most is as good, and the cheapest of them wins.
    good = sorted((one for one in found if one.narrower >= most - 0.1 * abs(most)), key=lambda one: one.flops)
    rest = sorted((one for one in found if one not in good), key=lambda one: -one.narrower)
    return good + rest


def law_curve(law: LossLaw, ratio: float, flops: Sequence[float], level: float = 0.9) -> list[Interval]:
    """The law at some computes for models of one ratio of tokens to parameters."""
    found = []
    for compute in flops:
        n = float(np.sqrt(compute / 6 / ratio))
        found.append(law.interval(n, ratio * n, compute, level=level))
    return found


def points_of(runs: Sequence[Run]) -> Points:
    """Points of the best runs of each size.

    Raises:
        FitError: no run is done.
    """
    best = best_of_each_size(runs)
    return points_of_runs(best if best else runs)


def one_ratio(points: Points) -> bool:
    """Whether all runs have about one number of tokens for each parameter: within 10% of each other."""
    return bool(np.ptp(np.log(points.tokens / points.num_params)) < 0.1)


def _held_out(points: Points, form: FormName, level: float, seed: int) -> list[HeldOut]:
    """The largest fifth of the runs, or as many as the rest can do without; those of one compute go together."""
    limits = np.unique(points.flops)[:-1]
    above = [int((points.flops > limit).sum()) for limit in limits]
    for limit, count in zip(limits, above, strict=True):
        if count > max(len(points.flops) // 5, above[-1]):
            continue
        try:
            return check_extrapolation(points, form, limit, level=level, samples=40, seed=seed)
        except FitError:
            continue
    return []


def _width(law: LossLaw, target: Target, level: float) -> float:
    value: Float[np.ndarray, " samples"] = law.draws(*target, new_run=False)
    low, high = np.quantile(value, [(1 - level) / 2, (1 + level) / 2])
    return float(high - low)


def _two_digits(value: int) -> int:
    return round(value, 1 - int(np.floor(np.log10(value))))
