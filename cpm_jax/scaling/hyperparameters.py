"""Best learning rate and batch size: found on a grid, carried to other sizes by a power law; critical batch size."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from cpm_jax.scaling.fitting import Fit, FitError, LogSum, bootstrap, fit, residual_draws
from cpm_jax.scaling.laws import Interval, Resample
from cpm_jax.scaling.runs import Run, but_seed, check_equal_tokens, finished

Setting = Literal["learning_rate", "batch_tokens"]


class Optimum(NamedTuple):
    """The best setting of one size and number of tokens.

    Attributes:
        num_params: N.
        tokens: D.
        value: the minimum of a parabola in log(setting) through the best of the grid and its neighbours.
        loss: there.
        at_edge: whether the best of the grid is its first or last: the optimum may lie outside, and `value` is the
            grid's own.
        one_step_off: by how much the loss is higher one grid step away, on the worse side that is known.
    """

    num_params: int
    tokens: int
    value: float
    loss: float
    at_edge: bool
    one_step_off: float


def optimum_on_grid(values: Sequence[float], losses: Sequence[float]) -> tuple[float, float, bool, float]:
    """The minimum of losses over a grid of a positive setting, between its points.

    Args:
        values: different settings.
        losses: of the same length.

    Returns:
        value, loss, at_edge and one_step_off of an `Optimum`.

    Raises:
        FitError: fewer than three settings.
    """
    order = np.argsort(values)
    x, y = np.log(np.asarray(values, float)[order]), np.asarray(losses, float)[order]
    if len(np.unique(x)) < 3 or len(np.unique(x)) < len(x):
        raise FitError(f"the settings {sorted(values)} are not three or more different ones")
    best = int(np.argmin(y))
    if best in (0, len(x) - 1):
        neighbour = y[1] if best == 0 else y[-2]
        return float(np.exp(x[best])), float(y[best]), True, float(neighbour - y[best])
    near = slice(best - 1, best + 2)
    a, b, c = np.polyfit(x[near] - x[best], y[near], 2)
    shift = -b / (2 * a) if a > 0 else 0.0
    low = c - b * b / (4 * a) if a > 0 else y[best]
    return float(np.exp(x[best] + shift)), float(low), False, float(max(y[near]) - y[best])


def optimum_on_surface(
    learning_rates: Sequence[float], batches: Sequence[float], losses: Sequence[float], *, within: float = 0.01
) -> tuple[float, float, float]:
    """The minimum of losses over learning rate and batch together, between the points of a grid.

    A quadratic in both logarithms is fitted to the runs near the best one: a single best point of a flat surface moves
    by grid steps with the noise of one run.

    Args:
        learning_rates: of the runs.
        batches: of the same runs.
        losses: of the same runs.
        within: how far above the least loss a run still counts, in parts of it.

    Returns:
        Learning rate, batch and loss of the minimum.

    Raises:
        FitError: fewer than eight runs are near, or they do not enclose a minimum.
    """
    y = np.asarray(losses, float)
    best = int(np.argmin(y))
    near = y <= y[best] * (1 + within)
    if near.sum() < 8:
        raise FitError(f"{near.sum()} runs are within {within:.1%} of the least loss; a surface needs eight")
    a, b = (np.log(np.asarray(values, float)) for values in (learning_rates, batches))
    a, b = (a - a[best])[near], (b - b[best])[near]
    columns = np.stack([np.ones_like(a), a, b, a * a, a * b, b * b], axis=1)
    found = np.linalg.lstsq(columns, y[near], rcond=None)[0]
    curvature = np.array([[2 * found[3], found[4]], [found[4], 2 * found[5]]])
    if np.linalg.eigvalsh(curvature).min() <= 0:
        raise FitError("the runs near the least loss do not enclose a minimum: widen the grid")
    at = np.linalg.solve(curvature, -found[1:3])
    if not (a.min() <= at[0] <= a.max() and b.min() <= at[1] <= b.max()):
        raise FitError("the minimum lies outside of the runs near the least loss: widen the grid")
    loss = float(found[0] + found[1:3] @ at + at @ curvature @ at / 2)
    return float(learning_rates[best] * np.exp(at[0])), float(batches[best] * np.exp(at[1])), loss


def find_optima(runs: Sequence[Run], setting: Setting = "learning_rate") -> list[Optimum]:
    """The best setting of each group of runs of one size.

    Seeds count with their mean loss. Where other settings were swept too, each value counts with the best of them.

    Args:
        runs: a sweep; those that are not done are left out.
        setting: the field of a run that was swept.

    Raises:
        FitError: no size has three settings.
        InputError: runs of one size differ in tokens.
    """
    by_size: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for run in finished(runs).runs:
        tokens = round(run.tokens, -int(np.floor(np.log10(run.tokens))) + 1)  # two digits: batches need not divide D
        by_size[run.num_params, tokens].append(run)
    found = []
    for (num_params, tokens), same in sorted(by_size.items()):
        losses: dict[float, dict[Hashable, list[float]]] = defaultdict(lambda: defaultdict(list))
        for run in same:
            losses[float(getattr(run, setting))][but_seed(run)].append(float(run.loss or np.nan))
        if len(losses) < 3:
            continue
        check_equal_tokens(same, f"the search for the best {setting}")
        best = {value: min(float(np.mean(seeds)) for seeds in others.values()) for value, others in losses.items()}
        found.append(Optimum(num_params, tokens, *optimum_on_grid(list(best), list(best.values()))))
    if not found:
        raise FitError(f"no size has runs at three values of {setting} and one number of tokens")
    return found


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient · Π xᵢ^exponentᵢ, fitted to log y by Huber's loss.

    Attributes:
        coefficient: the factor.
        exponents: by variable.
        points: that it was fitted to, with their variables relative to `centre`.
        centre: mean logarithm of each variable.
        best: the fit.
        samples: the bootstrap's parameters.
    """

    coefficient: float
    exponents: dict[str, float]
    points: LogSum
    centre: Float[np.ndarray, " variables"]
    best: Fit
    samples: Float[np.ndarray, "samples params"]

    def predict(self, **variables: float) -> float:
        """y, given each variable by name."""
        return float(np.exp(self._row(variables) @ self.best.theta))

    def interval(self, level: float = 0.9, **variables: float) -> Interval:
        """y with its interval, the scatter of a single point in it.

        Raises:
            FitError: the law was fitted without a bootstrap.
        """
        if not len(self.samples):
            raise FitError("the law has no bootstrap: fit it with samples > 0")
        noise = residual_draws(self.points, self.best.theta, np.random.default_rng(0), len(self.samples))
        draws = np.exp(self.samples @ self._row(variables) + noise)
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return Interval(self.predict(**variables), float(low), float(high))

    def exponent_intervals(self, level: float = 0.9) -> dict[str, Interval]:
        """The exponents with their intervals."""
        tails = [(1 - level) / 2, (1 + level) / 2]
        ends = {name: np.quantile(self.samples[:, 1 + i], tails) for i, name in enumerate(self.exponents)}
        return {name: Interval(self.exponents[name], float(low), float(high)) for name, (low, high) in ends.items()}

    def _row(self, variables: Mapping[str, float]) -> Float[np.ndarray, " params"]:
        if variables.keys() != self.exponents.keys():
            raise FitError(f"the law has the variables {list(self.exponents)}, not {list(variables)}")
        logs = np.log([variables[name] for name in self.exponents])
        return np.append(1.0, logs - self.centre)


def fit_power_law(
    y: Sequence[float] | np.ndarray,
    variables: Mapping[str, Sequence[float] | np.ndarray],
    *,
    delta: float = 0.05,
    samples: int = 200,
    resample: Resample = "residuals",
    seed: int = 0,
) -> PowerLaw:
    """Fits a power law, such as StepLaw's for the learning rate, c·N^a·D^b (Li et al. 2025, arXiv:2503.04715, eq. 1).

    Args:
        y: what it is of: best learning rates, best batch sizes.
        variables: by name, of y's length.
        delta: of Huber's loss on log y; 0.05 is 5%.
        samples: fits of the bootstrap.
        resample: what it draws.
        seed: of it.

    Raises:
        FitError: too few points, a value that is not finite and positive, a variable that does not vary, or variables
            that vary together, so that their exponents cannot be told apart.
    """
    columns = np.array([np.asarray(values, float) for values in variables.values()]).reshape(len(variables), -1).T
    measured = np.asarray(y, float)
    if columns.shape[0] != len(measured) or len(measured) < columns.shape[1] + 2:
        raise FitError(
            f"{len(measured)} points and {columns.shape[1]} variables of {columns.shape[0]} values: a power law needs "
            "values of each variable at each point, and at least two points more than variables"
        )
    for name, values in {"y": measured, **dict(zip(variables, columns.T, strict=True))}.items():
        if not np.all(np.isfinite(values) & (values > 0)):
            raise FitError(f"{name} = {values[~(np.isfinite(values) & (values > 0))][0]}: must be finite and above 0")
    logs = np.log(columns)
    centre = logs.mean(axis=0)
    design = np.concatenate([np.ones((len(measured), 1)), logs - centre], axis=1)
    scale = (logs - centre).std(axis=0)
    for name, spread in zip(variables, scale, strict=True):
        if spread < 0.005:
            raise FitError(f"{name} is about {np.exp(logs[0, list(variables).index(name)]):.4g} in all points")
    if np.linalg.cond((logs - centre) / scale) > 1e3:
        raise FitError(f"{', '.join(variables)} vary together in these points; take more of them, or fewer variables")
    points = LogSum(design[:, None, :], np.zeros((len(measured), 1)), np.log(measured))
    start = np.linalg.lstsq(design, points.log_y, rcond=None)[0]
    best = fit(points, [start], delta=delta)

    def refit(drawn: LogSum, start: Float[np.ndarray, " params"]) -> Float[np.ndarray, " params"]:
        return fit(drawn, [start], delta=delta, max_iterations=300).theta

    def valid(indices: Int[np.ndarray, " n"]) -> bool:
        return np.linalg.matrix_rank(design[indices]) == design.shape[1]

    drawn = bootstrap(points, best, refit, resample=resample, samples=samples, seed=seed, valid=valid)
    exponents = dict(zip(variables, map(float, best.theta[1:]), strict=True))
    return PowerLaw(float(np.exp(best.theta[0] - centre @ best.theta[1:])), exponents, points, centre, best, drawn)


class CriticalBatch(NamedTuple):
    """How steps fall with the batch to one loss: steps = min_steps + min_tokens / batch.

    Attributes:
        min_steps: of an endless batch.
        min_tokens: of a batch of nearly nothing.
        critical_batch_tokens: min_tokens / min_steps: twice the least steps and twice the least tokens.
    """

    min_steps: float
    min_tokens: float
    critical_batch_tokens: float


def fit_critical_batch(batch_tokens: Sequence[float], steps: Sequence[float], *, delta: float = 0.02) -> CriticalBatch:
    """The critical batch size of runs to one loss (McCandlish et al. 2018, arXiv:1812.06162, eq. 2.11).

    (steps / min_steps - 1) · (tokens / min_tokens - 1) = 1, which is steps = min_steps + min_tokens / batch.

    Args:
        batch_tokens: tokens of a batch.
        steps: that it took to the loss, as `steps_to_loss` finds them.
        delta: of Huber's loss on log steps.

    Raises:
        FitError: fewer than three batch sizes, or values that are not finite and above 0.
    """
    batch, measured = np.asarray(batch_tokens, float), np.asarray(steps, float)
    if len(np.unique(batch)) < 3:
        raise FitError(f"batch_tokens = {sorted(set(batch_tokens))}: at least three different batch sizes are needed")
    if not np.all(np.isfinite(batch) & (batch > 0) & np.isfinite(measured) & (measured > 0)):
        raise FitError(f"batch_tokens = {batch.tolist()}, steps = {measured.tolist()}: must be finite and above 0")
    design, offset = np.zeros((len(batch), 2, 2)), np.zeros((len(batch), 2))
    design[:, 0, 0] = design[:, 1, 1] = 1
    offset[:, 1] = -np.log(batch)
    points = LogSum(design, offset, np.log(measured))
    logs = np.log(measured)
    starts = [np.array([logs.min() + shift, (logs + np.log(batch)).min() + shift]) for shift in (-3.0, -1.0, -0.3, 0.0)]
    theta = fit(points, starts, delta=delta).theta
    low, tokens = map(float, np.exp(theta))
    return CriticalBatch(low, tokens, tokens / low)


def steps_to_loss(steps: Sequence[float], losses: Sequence[float], target: float) -> float:
    """The step at which a curve of held-out losses first reaches a loss, between its points.

    Raises:
        FitError: it never does.
    """
    curve = np.minimum.accumulate(np.asarray(losses, float))
    below = np.flatnonzero(curve <= target)
    if not len(below):
        raise FitError(f"the loss {target} is not reached: the lowest is {curve.min():.4f}")
    at = int(below[0])
    if at == 0:
        return float(steps[0])
    share = (curve[at - 1] - target) / (curve[at - 1] - curve[at])
    return float(np.exp(np.log(steps[at - 1]) + share * np.log(steps[at] / steps[at - 1])))


def gradient_noise_scale(
    small_batch: float, large_batch: float, small_norm_squared: float, large_norm_squared: float
) -> float:
    """The simple noise scale tr(Σ)/|G|², in the unit of the batches (McCandlish et al. 2018, appendix A.1).

    Args:
        small_batch: size of a batch.
        large_batch: of a larger one.
        small_norm_squared: mean squared norm of the gradients of small batches.
        large_norm_squared: of large ones, at the same parameters.

    Raises:
        FitError: the batches do not differ, or the norms leave no gradient or no noise (too few were averaged).
    """
    if not 0 < small_batch < large_batch:
        raise FitError(f"small_batch = {small_batch}, large_batch = {large_batch}: the second must be the larger")
    signal = (large_batch * large_norm_squared - small_batch * small_norm_squared) / (large_batch - small_batch)
    noise = (small_norm_squared - large_norm_squared) / (1 / small_batch - 1 / large_batch)
    if signal <= 0 or noise < 0:
        raise FitError(
            f"squared norms {small_norm_squared:.4g} and {large_norm_squared:.4g} give |G|² = {signal:.4g} and tr(Σ) = "
            f"{noise:.4g}; average over more batches"
        )
    return noise / signal
