"""Laws of the loss over parameters, tokens and compute: fits with intervals, the frontier, and held-out checks.

Forms (N parameters, D tokens, C FLOPs; natural logarithms; loss in nats per token):

| name | L | source |
|---|---|---|
| `chinchilla` | E + A/N^α + B/D^β | Hoffmann et al. 2022, arXiv:2203.15556, eq. 2 |
| `tied` | E + A/N^α + B/D^α | one exponent; Gadre et al. 2024, arXiv:2403.08540, eq. 4 |
| `kaplan` | ((N_c/N)^(α_N/α_D) + D_c/D)^α_D | Kaplan et al. 2020, arXiv:2001.08361, eq. 1.5 |
| `compute` | E + A/C^α | a family trained at one ratio of tokens to parameters |
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar

from cpm_jax.scaling.fitting import DELTA, Fit, FitError, LogSum, bootstrap, fit, residual_draws
from cpm_jax.scaling.runs import Run, finished

FormName = Literal["chinchilla", "tied", "kaplan", "compute"]
Resample = Literal["points", "residuals"]

FORMS: dict[str, tuple[str, ...]] = {
    "chinchilla": ("E", "A", "B", "alpha", "beta"),
    "tied": ("E", "A", "B", "alpha"),
    "kaplan": ("N_c", "D_c", "alpha_N", "alpha_D"),
    "compute": ("E", "A", "alpha"),
}
_EXPONENTS = (0.02, 3.0)  # that a fit may have
# Values of N, of D or of C: a power beside a constant has three unknowns.
_LEAST_DIFFERENT: dict[str, int] = {"chinchilla": 3, "tied": 2, "kaplan": 2, "compute": 3}


class Points(NamedTuple):
    """What a law is fitted to.

    Attributes:
        num_params: N.
        tokens: D.
        loss: nats per token.
        flops: C; 6ND where a source gives none.
    """

    num_params: Float[np.ndarray, " n"]
    tokens: Float[np.ndarray, " n"]
    loss: Float[np.ndarray, " n"]
    flops: Float[np.ndarray, " n"]

    def take(self, chosen: Int[np.ndarray, " chosen"]) -> "Points":
        """Some of them."""
        return Points(*(values[chosen] for values in self))


class Interval(NamedTuple):
    """A predicted figure.

    Attributes:
        value: the fit's own.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float


def make_points(
    num_params: Sequence[float] | np.ndarray,
    tokens: Sequence[float] | np.ndarray,
    loss: Sequence[float] | np.ndarray,
    flops: Sequence[float] | np.ndarray | None = None,
) -> Points:
    """Points of arrays of one length; C is 6ND where it is not given.

    Raises:
        FitError: lengths differ, or a value is not finite or not positive; names it.
    """
    n, d, y = (np.asarray(values, np.float64) for values in (num_params, tokens, loss))
    if not n.shape == d.shape == y.shape or n.ndim != 1:
        raise FitError(f"num_params, tokens and loss have the shapes {n.shape}, {d.shape}, {y.shape}; must be one line")
    points = Points(n, d, y, 6 * n * d if flops is None else np.asarray(flops, np.float64))
    for name, values in points._asdict().items():
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if len(bad):
            raise FitError(f"{name}[{bad[0]}] = {values[bad[0]]}: must be finite and above 0; leave such runs out")
    return points


def points_of_runs(runs: Sequence[Run]) -> Points:
    """The points of the runs that are done; `runs.finished` names the others.

    Raises:
        FitError: none is done.
    """
    kept, left_out = finished(runs)
    if not kept:
        said = "; ".join(f"{len(ids)} {status}" for status, ids in left_out.items()) or "there is no run"
        raise FitError(f"no run is done ({said}): a law needs runs that ended with a finite held-out loss")
    return make_points(
        [run.num_params for run in kept],
        [run.tokens for run in kept],
        [run.loss or np.nan for run in kept],
        [run.flops for run in kept],
    )


@dataclass(frozen=True)
class LossLaw:
    """A fitted law.

    Attributes:
        form: which.
        coefficients: by name.
        points: that it was fitted to.
        centre: mean of log N, log D, log C that the parameters are relative to.
        best: the fit in its own parameters.
        samples: parameters of the bootstrap's fits; none were drawn where it has no row.
    """

    form: FormName
    coefficients: dict[str, float]
    points: Points
    centre: Float[np.ndarray, " 3"]
    best: Fit
    samples: Float[np.ndarray, "samples params"]

    def predict(self, num_params: float, tokens: float, flops: float | None = None) -> float:
        """The loss of a model, in nats per token."""
        return float(np.exp(self._log(self.best.theta, num_params, tokens, flops)))

    def interval(
        self, num_params: float, tokens: float, flops: float | None = None, *, level: float = 0.9, new_run: bool = True
    ) -> Interval:
        """The loss with its interval.

        Args:
            num_params: N.
            tokens: D.
            flops: C, for the form `compute`; 6ND if None.
            level: share of the bootstrap's draws within.
            new_run: whether the noise of a single run is in it, or only the uncertainty of the law.

        Raises:
            FitError: the law was fitted without a bootstrap.
        """
        draws = self.draws(num_params, tokens, flops, new_run=new_run)
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return Interval(self.predict(num_params, tokens, flops), float(low), float(high))

    def draws(
        self, num_params: float, tokens: float, flops: float | None = None, *, new_run: bool = True
    ) -> Float[np.ndarray, " samples"]:
        """The loss by each of the bootstrap's fits."""
        if not len(self.samples):
            raise FitError("the law has no bootstrap: fit it with samples > 0")
        logs = np.array([self._log(theta, num_params, tokens, flops) for theta in self.samples])
        if new_run:
            rng = np.random.default_rng(0)
            logs = logs + residual_draws(_terms(self.form, self.points, self.centre), self.best.theta, rng, len(logs))
        return np.exp(logs)

    def coefficient_samples(self) -> dict[str, Float[np.ndarray, " samples"]]:
        """The bootstrap's coefficients, by name."""
        rows = [_natural(self.form, theta, self.centre) for theta in self.samples]
        return {name: np.array([row[name] for row in rows]) for name in self.coefficients}

    def coefficient_intervals(self, level: float = 0.9) -> dict[str, Interval]:
        """The coefficients with their intervals."""
        tails = [(1 - level) / 2, (1 + level) / 2]
        found = {name: np.quantile(values, tails) for name, values in self.coefficient_samples().items()}
        return {name: Interval(self.coefficients[name], float(low), float(high)) for name, (low, high) in found.items()}

    @property
    def residuals(self) -> Float[np.ndarray, " n"]:
        """log of measured over predicted loss, of each point."""
        points = _terms(self.form, self.points, self.centre)
        return points.log_y - points.log_prediction(self.best.theta)

    def _log(self, theta: Float[np.ndarray, " params"], num_params: float, tokens: float, flops: float | None) -> float:
        compute = 6 * num_params * tokens if flops is None else flops
        where = Points(*(np.array([value], float) for value in (num_params, tokens, 1.0, compute)))
        return float(_terms(self.form, where, self.centre).log_prediction(theta)[0])


def fit_loss(
    points: Points,
    form: FormName = "chinchilla",
    *,
    samples: int = 200,
    resample: Resample = "residuals",
    delta: float = DELTA,
    squares: bool = False,
    seed: int = 0,
    start_from: LossLaw | None = None,
) -> LossLaw:
    """Fits a law of the loss.

    Args:
        points: of runs; at least one more than the form has parameters.
        form: see the table above.
        samples: fits of the bootstrap; 0 draws none.
        resample: what the bootstrap draws (`fitting.bootstrap`).
        delta: of Huber's loss on log loss.
        squares: least squares of the loss itself instead, to compare with fits that were published so.
        seed: of the bootstrap.
        start_from: a law of the same form of nearly the same points, to start from instead of a grid.

    Raises:
        FitError: too few runs, or all of one size, or of one number of tokens, where the form needs two.
    """
    check(points, form)
    centre = np.array([np.log(values).mean() for values in (points.num_params, points.tokens, points.flops)])
    if start_from is not None:
        centre = start_from.centre
    terms = replace(_terms(form, points, centre), squares=squares)
    bounds = _bounds(form, terms.log_y)
    starts = _starts(form, terms.log_y) if start_from is None else [start_from.best.theta]
    best = fit(terms, starts, bounds=bounds, delta=delta)

    def refit(drawn: LogSum, start: Float[np.ndarray, " params"]) -> Float[np.ndarray, " params"]:
        return fit(drawn, [start], bounds=bounds, delta=delta, max_iterations=300).theta

    def valid(indices: Int[np.ndarray, " n"]) -> bool:
        try:
            check(points.take(np.unique(indices)), form)
        except FitError:
            return False
        return True

    drawn = bootstrap(terms, best, refit, resample=resample, samples=samples, seed=seed, valid=valid)
    return LossLaw(form, _natural(form, best.theta, centre), points, centre, best, drawn)


def check(points: Points, form: FormName) -> None:
    """Checks that a form can be fitted.

    Raises:
        FitError: too few points, or they vary too little in what the form is about to tell its coefficients.
    """
    if form not in FORMS:
        raise FitError(f"form = {form!r}: there are {', '.join(FORMS)}")
    needed = len(FORMS[form]) + 1
    if len(points.loss) < needed:
        raise FitError(
            f"{len(points.loss)} runs are too few for the form {form}: it has {needed - 1} coefficients and needs at "
            f"least {needed} runs that are done; 'compute' needs least"
        )
    varied = [("compute", points.flops)] if form == "compute" else [("N", points.num_params), ("D", points.tokens)]
    for name, values in varied:
        if _different(values) < 2:
            raise FitError(
                f"all {len(values)} runs have one {name} ({values[0]:.4g}): the form {form} needs at least two that "
                "differ by 1% or more; nothing can be said about other sizes from one"
            )
        if (different := _different(values)) < _LEAST_DIFFERENT[form]:
            raise FitError(
                f"the runs have {different} different values of {name}: the form {form} needs at least "
                f"{_LEAST_DIFFERENT[form]}, or its irreducible loss and its exponent cannot be told apart"
            )
    if form == "compute":
        return
    n, d = np.log(points.num_params), np.log(points.tokens)
    if (different := _different(points.num_params, points.tokens)) < needed - 1:
        raise FitError(
            f"the runs have {different} different pairs of N and D: the form {form} has {needed - 1} coefficients, and "
            "other seeds do not tell them apart"
        )
    if np.std(d - np.polyval(np.polyfit(n, d, 1), n)) < 0.05:
        raise FitError(
            f"N and D vary together in these runs: the form {form} cannot tell what each does; train some sizes on "
            "other numbers of tokens, or use 'compute'"
        )


def _different(*values: Float[np.ndarray, " n"]) -> int:
    """How many different points there are; 1% is no difference."""
    return len(np.unique(np.round(np.log(np.stack(values)), 2), axis=1).T)


def compute_optimal(law: LossLaw, flops: float, *, flops_per_param_token: float = 6.0) -> tuple[float, float]:
    """N and D of the lowest loss at a compute, C = 6ND.

    Args:
        law: of a form that has both.
        flops: C.
        flops_per_param_token: 6 where C counts the parameters that N counts.

    Raises:
        FitError: the form has no N and D.
    """
    return _optimum(law, law.best.theta, flops / flops_per_param_token)


def frontier_exponent(law: LossLaw) -> float:
    """a of N_opt ∝ C^a: β/(α+β) for `chinchilla`, 1/2 for `tied`, α_D/(α_N+α_D) for `kaplan`."""
    return _exponent(law.form, law.coefficients)


def frontier_exponent_samples(law: LossLaw) -> Float[np.ndarray, " samples"]:
    """The same of each of the bootstrap's fits."""
    return np.array([_exponent(law.form, _natural(law.form, theta, law.centre)) for theta in law.samples])


class HeldOut(NamedTuple):
    """How a law that saw only the smaller runs predicts a larger one.

    Attributes:
        num_params: N.
        tokens: D.
        loss: measured.
        predicted: by the law of the smaller runs.
        low: lower end of its interval.
        high: upper end.
    """

    num_params: float
    tokens: float
    loss: float
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Predicted over measured loss, less 1."""
        return self.predicted / self.loss - 1

    @property
    def covered(self) -> bool:
        """Whether the interval has the measured loss in it."""
        return self.low <= self.loss <= self.high


def check_extrapolation(
    points: Points, form: FormName, max_flops: float, *, level: float = 0.9, **options: object
) -> list[HeldOut]:
    """Fits the runs of at most some compute, and predicts the others.

    Args:
        points: all runs.
        form: of the law.
        max_flops: largest compute of a run that the fit sees.
        level: of the intervals.
        **options: of `fit_loss`.

    Raises:
        FitError: too few runs are below, or none is above.
    """
    seen = points.flops <= max_flops
    if seen.all():
        raise FitError(f"max_flops = {max_flops:.3g}: no run is larger ({points.flops.max():.3g} at most)")
    law = fit_loss(points.take(np.flatnonzero(seen)), form, **options)  # type: ignore[arg-type]
    found = []
    for n, d, loss, flops in zip(*points.take(np.flatnonzero(~seen)), strict=True):
        value, low, high = law.interval(n, d, flops, level=level)
        found.append(HeldOut(n, d, loss, value, low, high))
    return found


def with_point(law: LossLaw, num_params: float, tokens: float, flops: float | None = None) -> Points:
    """The law's points and one more, with the loss that the law says."""
    more = make_points(
        [num_params], [tokens], [law.predict(num_params, tokens, flops)], None if flops is None else [flops]
    )
    return Points(*(np.concatenate(pair) for pair in zip(law.points, more, strict=True)))


def _exponent(form: FormName, found: dict[str, float]) -> float:
    if form == "chinchilla":
        return found["beta"] / (found["alpha"] + found["beta"])
    if form == "kaplan":
        return found["alpha_D"] / (found["alpha_N"] + found["alpha_D"])
    if form == "tied":
        return 0.5
    raise FitError("the form 'compute' has no N and D of its own")


def _optimum(law: LossLaw, theta: Float[np.ndarray, " params"], product: float) -> tuple[float, float]:
    if law.form == "compute":
        raise FitError("the form 'compute' has no N and D of its own")

    def loss(log_n: float) -> float:
        n = np.exp(log_n)
        return law._log(theta, n, product / n, None)

    middle = np.log(product) / 2
    found = minimize_scalar(loss, bounds=(middle - 15, middle + 15), method="bounded", options={"xatol": 1e-6})
    n = float(np.exp(found.x))
    return n, product / n


def _terms(form: FormName, points: Points, centre: Float[np.ndarray, " 3"]) -> LogSum:
    """The design of a form, in logarithms relative to the centre, so that intercepts and exponents hardly correlate."""
    n, d, c = (
        np.log(values) - middle
        for values, middle in zip((points.num_params, points.tokens, points.flops), centre, strict=True)
    )
    columns = {"chinchilla": 5, "tied": 4, "kaplan": 3, "compute": 3}[form]
    num_terms = {"chinchilla": 3, "tied": 3, "kaplan": 2, "compute": 2}[form]
    design = np.zeros((len(n), num_terms, columns))
    offset = np.zeros((len(n), num_terms))
    if form == "kaplan":  # parameters: a, b, p = α_N / α_D, and the outer α_D
        design[:, 0, 0], design[:, 0, 2] = 1, -n
        design[:, 1, 1], offset[:, 1] = 1, -d
    else:  # parameters: e, a, (b,) exponents
        design[:, 0, 0] = 1
        design[:, 1, 1], design[:, 1, columns - 1 if form != "chinchilla" else 3] = 1, -(c if form == "compute" else n)
        if form != "compute":
            design[:, 2, 2], design[:, 2, columns - 1] = 1, -d
    return LogSum(design, offset, np.log(points.loss), outer=form == "kaplan")


def _natural(form: FormName, theta: Float[np.ndarray, " params"], centre: Float[np.ndarray, " 3"]) -> dict[str, float]:
    """The coefficients of the table, from parameters relative to the centre."""
    n, d, c = centre
    if form == "kaplan":
        a, b, ratio, outer = theta
        values = [np.exp(a / ratio + n), np.exp(b + d), ratio * outer, outer]
    elif form == "compute":
        e, a, alpha = theta
        values = [np.exp(e), np.exp(a + alpha * c), alpha]
    else:
        e, a, b, alpha = theta[:4]
        beta = theta[-1]
        values = [np.exp(e), np.exp(a + alpha * n), np.exp(b + beta * d), alpha, beta]
    return {name: float(value) for name, value in zip(FORMS[form], values, strict=False)}


def _bounds(form: FormName, log_y: Float[np.ndarray, " n"]) -> list[tuple[float, float]]:
    free, exponent = (-60.0, 60.0), _EXPONENTS
    if form == "kaplan":
        return [free, free, (0.05, 20.0), (0.005, 3.0)]
    terms = {"chinchilla": 2, "tied": 2, "compute": 1}[form]
    # An irreducible loss below a thousandth of the least measured one is none.
    low = float(log_y.min()) - 7
    return [(low, float(log_y.min())), *[free] * terms, *[exponent] * (2 if form == "chinchilla" else 1)]


def _starts(form: FormName, log_y: Float[np.ndarray, " n"]) -> list[Float[np.ndarray, " params"]]:
    """A grid of irreducible losses, exponents, and shares of N and D in the reducible loss at the centre."""
    least, middle = float(np.exp(log_y.min())), float(np.exp(log_y.mean()))
    exponents, shares = (0.1, 0.3, 0.6), (0.2, 0.5, 0.8)
    if form == "kaplan":
        grid = itertools.product((0.5, 1.0, 2.0), (0.05, 0.1, 0.3), shares)
        return [
            np.array([np.log(middle) / outer + np.log(share), np.log(middle) / outer + np.log(1 - share), ratio, outer])
            for ratio, outer, share in grid
        ]
    starts = []
    for of_least in (0.02, 0.4, 0.8, 0.95):
        e, rest = np.log(of_least * least), middle - of_least * least
        if form == "compute":
            starts += [np.array([e, np.log(rest), alpha]) for alpha in exponents]
            continue
        betas = exponents if form == "chinchilla" else (None,)
        for alpha, beta, share in itertools.product(exponents, betas, shares):
            last = [alpha] if beta is None else [alpha, beta]
            starts.append(np.array([e, np.log(rest * share), np.log(rest * (1 - share)), *last]))
    return starts
