"""Robust fits of laws that are sums of powers: Huber's loss on the logarithm, many starts, bootstrap.

Chinchilla's L(N, D), Kaplan's, a power law of several variables, the steps over the batch size, and the exponential law
of data mixtures have one form, a logarithm of a sum of exponentials whose arguments are affine in the parameters:

    log y = γ · log Σ_j exp(offset_j + design_j · θ),  γ = 1 or a parameter of its own

so that one objective with its exact gradient serves them all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import logsumexp

from cpm_jax.common.config import InputError

DELTA = 1e-3  # of Huber's loss on log loss (Hoffmann et al. 2022, arXiv:2203.15556, appendix D.3)
_SHORT, _POLISHED = 40, 5  # iterations of every start, and starts that go on
_BOUND = 60.0  # of parameters without a bound of their own: beyond it exponentials say nothing more


class FitError(InputError):
    """Points that a law cannot be fitted to; says what is missing."""


@dataclass(frozen=True)
class LogSum:
    """Points of a law, as the form above has them.

    Attributes:
        design: of each point, term and parameter.
        offset: what a term has without parameters.
        log_y: logarithm of what was measured.
        outer: whether γ is the last parameter (not in `design`), instead of 1.
        squares: least squares of y itself, as some published fits are, instead of Huber's loss of log y.
    """

    design: Float[np.ndarray, "points terms params"]
    offset: Float[np.ndarray, "points terms"]
    log_y: Float[np.ndarray, " points"]
    outer: bool = False
    squares: bool = False

    @property
    def num_params(self) -> int:
        """Parameters, γ included."""
        return self.design.shape[2] + self.outer

    def take(self, indices: Int[np.ndarray, " chosen"]) -> "LogSum":
        """Some of the points, any of them several times."""
        return replace(self, design=self.design[indices], offset=self.offset[indices], log_y=self.log_y[indices])

    def log_prediction(self, theta: Float[np.ndarray, " all_params"]) -> Float[np.ndarray, " points"]:
        """The law's log y."""
        inner = theta[: self.design.shape[2]]
        total = logsumexp(self.offset + self.design @ inner, axis=1)
        return total * theta[-1] if self.outer else total

    def objective(
        self, theta: Float[np.ndarray, " all_params"], delta: float
    ) -> tuple[float, Float[np.ndarray, " all_params"]]:
        """Huber's loss summed over the points, in units of δ², and its gradient.

        The sum and the units matter: a mean of δ²-sized terms is below an optimiser's tolerance before it is at its
        minimum (Besiroglu et al. 2024, arXiv:2404.10102, found that in the published Chinchilla fit).
        """
        inner = theta[: self.design.shape[2]]
        z = self.offset + self.design @ inner
        top = z.max(axis=1, keepdims=True)
        weights = np.exp(z - top)
        sums = weights.sum(axis=1, keepdims=True)
        total = (top + np.log(sums))[:, 0]
        gradient = np.einsum("nj,njp->np", weights / sums, self.design)
        if self.outer:
            gradient = np.concatenate([theta[-1] * gradient, total[:, None]], axis=1)
            total = total * theta[-1]
        if self.squares:
            predicted = np.exp(total)
            ratio = (predicted - np.exp(self.log_y)) / delta
            return 0.5 * float(ratio @ ratio), (ratio * predicted) @ gradient / delta
        ratio = (total - self.log_y) / delta
        clipped = np.clip(ratio, -1, 1)
        value = clipped * (ratio - 0.5 * clipped)
        return float(value.sum()), clipped @ gradient / delta


class Fit(NamedTuple):
    """The best of many starts.

    Attributes:
        theta: parameters.
        value: of the objective there.
        agreeing: how many of the starts that went to the end came within 1 part in 1,000 of that value.
        starts: how many went to the end.
    """

    theta: Float[np.ndarray, " all_params"]
    value: float
    agreeing: int
    starts: int


def fit(
    points: LogSum,
    starts: Sequence[Float[np.ndarray, " all_params"]],
    *,
    bounds: Sequence[tuple[float, float]] | None = None,
    delta: float = DELTA,
    max_iterations: int = 1000,
) -> Fit:
    """Minimises Huber's loss by SciPy's L-BFGS-B from each start.

    Args:
        points: what is fitted to.
        starts: parameters to start from.
        bounds: lowest and highest value of each parameter; None is ±60.
        delta: where Huber's loss becomes linear, on log y.
        max_iterations: of a start.

    Raises:
        FitError: no start ended at a finite value.
    """
    limits = [(-_BOUND, _BOUND)] * points.num_params if bounds is None else bounds
    low, high = np.array(limits).T

    def descend(start: Float[np.ndarray, " all_params"], iterations: int) -> tuple[float, np.ndarray]:
        options = {"maxiter": iterations, "maxfun": 2 * iterations, "ftol": 1e-12, "gtol": 1e-7, "maxcor": 20}
        inside = np.clip(start, low, high)
        end = minimize(
            points.objective, inside, args=(delta,), jac=True, method="L-BFGS-B", bounds=limits, options=options
        )
        return (float(end.fun) if np.isfinite(end.fun) else np.inf), np.asarray(end.x)

    # Most starts are in one basin: a short descent of each tells the basins apart, and the best few go on to the end.
    short = sorted((descend(start, _SHORT) for start in starts), key=lambda end: end[0])
    ends = [descend(theta, max_iterations) for _, theta in short[:_POLISHED]]
    value, theta = min(ends, key=lambda end: end[0])
    if not np.isfinite(value):
        raise FitError(f"none of {len(starts)} starts of the fit ended at a finite value")
    agreeing = sum(end <= value * 1.001 + 1e-9 for end, _ in ends)
    return Fit(theta, value, agreeing, len(ends))


def residual_draws(
    points: LogSum, theta: Float[np.ndarray, " all_params"], rng: np.random.Generator, size: int
) -> Float[np.ndarray, " size"]:
    """Residuals of log y drawn with replacement, centred, and widened for the parameters that they were fitted with.

    Raises:
        FitError: there are no more points than parameters.
    """
    n, spare = len(points.log_y), len(points.log_y) - points.num_params
    if spare <= 0:
        raise FitError(
            f"{n} points and {points.num_params} parameters: nothing is left to tell the noise by; at least "
            f"{points.num_params + 1} points are needed"
        )
    residuals = points.log_y - points.log_prediction(theta)
    return rng.choice(residuals - residuals.mean(), size) * np.sqrt(n / spare)


def bootstrap(
    points: LogSum,
    best: Fit,
    refit: Callable[[LogSum, Float[np.ndarray, " all_params"]], Float[np.ndarray, " all_params"]],
    *,
    resample: str,
    samples: int,
    seed: int,
    valid: Callable[[Int[np.ndarray, " points"]], bool] = lambda indices: True,
) -> Float[np.ndarray, "samples all_params"]:
    """Parameters of fits to resampled points.

    Args:
        points: the points.
        best: their fit.
        refit: fits points, starting from parameters.
        resample: "points": the points themselves are drawn with replacement, which assumes least and needs many of
            them. "residuals": the points stay where they are, and their residuals are drawn anew; for designed families
            of a few runs.
        samples: how many fits.
        seed: of the draws.
        valid: whether the law can be fitted to drawn points; others are drawn again.

    Raises:
        FitError: of 1,000 draws in a row none was valid.
    """
    rng = np.random.default_rng(seed)
    n = len(points.log_y)
    found = []
    for _ in range(samples):
        if resample == "residuals":
            drawn = replace(
                points, log_y=points.log_prediction(best.theta) + residual_draws(points, best.theta, rng, n)
            )
        else:
            for _ in range(1000):
                indices = rng.integers(0, n, n)
                if valid(indices):
                    break
            else:
                raise FitError("1,000 draws of the points left too few different ones to fit; use resample='residuals'")
            drawn = points.take(indices)
        found.append(refit(drawn, best.theta))
    return np.array(found)
