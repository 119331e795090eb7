"""Law of data mixtures: the loss over the shares of domains, and the shares that it suggests.

Ye et al. 2024 (arXiv:2403.16952, eq. 1): L(r) = c + k · exp(Σ t_j r_j). As the shares sum to 1, k is no parameter of
its own: L(r) = c + exp(Σ s_j r_j) with s_j = t_j + log k is fitted, one parameter for each domain and one for c. A loss
over several held-out sets is a weighted sum of one law each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize

from cpm_jax.scaling.fitting import DELTA, Fit, FitError, LogSum, bootstrap, fit, residual_draws
from cpm_jax.scaling.laws import Interval, Resample


@dataclass(frozen=True)
class MixtureLaw:
    """The loss on one held-out set over the shares of domains.

    Attributes:
        domains: names, in the order of the shares.
        constant: c, the loss that no share changes.
        slopes: s_j by domain; a domain helps the more the lower its slope is.
        points: that it was fitted to.
        best: the fit: log c, then the slopes.
        samples: the bootstrap's parameters.
    """

    domains: tuple[str, ...]
    constant: float
    slopes: dict[str, float]
    points: LogSum
    best: Fit
    samples: Float[np.ndarray, "samples params"]

    def predict(self, shares: Sequence[float] | Mapping[str, float]) -> float:
        """The loss of a mixture, in nats per token."""
        return float(_loss(self.best.theta, as_shares(self.domains, shares)))

    def interval(self, shares: Sequence[float] | Mapping[str, float], level: float = 0.9) -> Interval:
        """The loss of a run on a mixture, with its interval.

        Raises:
            FitError: the law was fitted without a bootstrap.
        """
        if not len(self.samples):
            raise FitError("the law has no bootstrap: fit it with samples > 0")
        row = as_shares(self.domains, shares)
        noise = residual_draws(self.points, self.best.theta, np.random.default_rng(0), len(self.samples))
        draws = np.array([_loss(theta, row) for theta in self.samples]) * np.exp(noise)
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
        return Interval(self.predict(shares), float(low), float(high))


class Suggestion(NamedTuple):
    """The mixture of the lowest predicted loss.

    Attributes:
        shares: by domain, each with the interval over the bootstrap's fits.
        loss: of the mixture, with the interval of the law (not of a single run).
        gain: over the best mixture that was measured, in the same unit, by the law; above 0 is better.
        probability: share of the bootstrap's fits by which the suggestion is better than that mixture.
    """

    shares: dict[str, Interval]
    loss: Interval
    gain: Interval
    probability: float


def as_shares(domains: Sequence[str], shares: Sequence[float] | Mapping[str, float]) -> Float[np.ndarray, " domains"]:
    """Shares as an array in the order of the domains.

    Raises:
        FitError: they name other domains, are negative, or do not sum to 1.
    """
    if isinstance(shares, Mapping):
        if set(shares) != set(domains):
            raise FitError(f"the shares are of {sorted(shares)}, the law of {sorted(domains)}")
        shares = [shares[name] for name in domains]
    row = np.asarray(shares, float)
    if row.shape != (len(domains),) or not np.all(np.isfinite(row)) or row.min() < 0 or abs(row.sum() - 1) > 1e-3:
        raise FitError(f"shares {row.tolist()}: must be {len(domains)} numbers of at least 0 that sum to 1")
    return row / row.sum()


def fit_mixture(
    domains: Sequence[str],
    mixtures: Sequence[Sequence[float] | Mapping[str, float]],
    losses: Sequence[float],
    *,
    samples: int = 200,
    resample: Resample = "residuals",
    delta: float = DELTA,
    seed: int = 0,
) -> MixtureLaw:
    """Fits the law to runs of one model and one number of tokens that differ in their mixture.

    Args:
        domains: names.
        mixtures: shares of each run.
        losses: held-out loss of each, in nats per token.
        samples: fits of the bootstrap.
        resample: what it draws.
        delta: of Huber's loss on log loss.
        seed: of the bootstrap.

    Raises:
        FitError: too few runs, shares that are none, or mixtures that do not vary in every direction.
    """
    rows = np.array([as_shares(domains, shares) for shares in mixtures]).reshape(-1, len(domains))
    y = np.asarray(losses, float)
    if len(domains) < 2 or len(rows) != len(y) or len(y) < len(domains) + 2:
        raise FitError(
            f"{len(rows)} mixtures, {len(y)} losses, {len(domains)} domains: the law has {len(domains) + 1} parameters "
            f"and needs two domains or more, a loss for each mixture, and at least {len(domains) + 2} of them"
        )
    if not np.all(np.isfinite(y) & (y > 0)):
        raise FitError(f"loss {y[~(np.isfinite(y) & (y > 0))][0]}: must be finite and above 0; leave such runs out")
    if np.linalg.matrix_rank(rows, tol=1e-3) < len(domains):
        raise FitError(f"the mixtures vary in fewer directions than there are domains: {', '.join(domains)}")
    design = np.zeros((len(y), 2, len(domains) + 1))
    design[:, 0, 0], design[:, 1, 1:] = 1, rows
    points = LogSum(design, np.zeros((len(y), 2)), np.log(y))
    bounds = [(float(points.log_y.min()) - 7, float(points.log_y.min())), *[(-60.0, 60.0)] * len(domains)]
    starts = []
    for share in (0.02, 0.4, 0.7, 0.9, 0.97):
        constant = share * y.min()
        slopes = np.linalg.lstsq(rows, np.log(y - constant), rcond=None)[0]
        starts.append(np.append(np.log(constant), slopes))
    best = fit(points, starts, bounds=bounds, delta=delta)

    def refit(drawn: LogSum, start: Float[np.ndarray, " params"]) -> Float[np.ndarray, " params"]:
        return fit(drawn, [start, *starts[1::2]], bounds=bounds, delta=delta, max_iterations=300).theta

    def valid(indices: Int[np.ndarray, " n"]) -> bool:
        return len(np.unique(indices)) > len(domains) + 1 and np.linalg.matrix_rank(rows[indices], 1e-3) == len(domains)

    drawn = bootstrap(points, best, refit, resample=resample, samples=samples, seed=seed, valid=valid)
    slopes_of = dict(zip(domains, map(float, best.theta[1:]), strict=True))
    return MixtureLaw(tuple(domains), float(np.exp(best.theta[0])), slopes_of, points, best, drawn)


def suggest_mixture(
    laws: Sequence[MixtureLaw],
    weights: Sequence[float] | None = None,
    *,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    level: float = 0.9,
) -> Suggestion:
    """The mixture of the lowest weighted loss over held-out sets, and how sure that is.

    One law alone is lowest at a corner: all of the domain that helps it most. With several held-out sets, or with
    bounds (a domain has only so much text), the optimum lies inside.

    Args:
        laws: one for each held-out set, of the same domains and the same runs in the same order.
        weights: of the sets; None weighs them alike.
        bounds: least and greatest share by domain; others are free. Stay near what was measured: the law knows no more.
        level: of the intervals.

    Raises:
        FitError: the laws are of different domains, or the bounds leave no mixture.
    """
    if not laws or len({law.domains for law in laws}) > 1 or len({len(law.samples) for law in laws}) > 1:
        raise FitError("suggest_mixture.laws: give at least one, all of the same domains and bootstrap samples")
    domains = laws[0].domains
    shares = np.ones(len(laws)) if weights is None else np.asarray(weights, float)
    if shares.shape != (len(laws),) or not np.all(shares >= 0) or not 0 < shares.sum() < np.inf:
        raise FitError(f"suggest_mixture.weights = {weights}: give one of at least 0 for each of {len(laws)} laws")
    shares = shares / shares.sum()
    limits = [(bounds or {}).get(name, (0.0, 1.0)) for name in domains]
    if unknown := set(bounds or {}) - set(domains):
        raise FitError(f"suggest_mixture.bounds names {sorted(unknown)}; the domains are {list(domains)}")
    low, high = np.array(limits, float).T
    if low.min() < 0 or np.any(low > high) or low.sum() > 1 or high.sum() < 1:
        raise FitError(
            f"suggest_mixture.bounds = {dict(zip(domains, limits, strict=True))} leave no shares that sum to 1"
        )
    best = _minimum([law.best.theta for law in laws], shares, limits)
    measured = laws[0].points.design[:, 1, 1:]
    total = [sum(w * _loss(law.best.theta, row) for w, law in zip(shares, laws, strict=True)) for row in measured]
    reference = measured[int(np.argmin(total))]
    optima, losses, gains = [], [], []
    for index in range(len(laws[0].samples)):
        thetas = [law.samples[index] for law in laws]
        optima.append(_minimum(thetas, shares, limits))
        here = sum(w * _loss(theta, best) for w, theta in zip(shares, thetas, strict=True))
        there = sum(w * _loss(theta, reference) for w, theta in zip(shares, thetas, strict=True))
        losses.append(here)
        gains.append(there - here)
    loss = float(sum(w * _loss(law.best.theta, best) for w, law in zip(shares, laws, strict=True)))
    tails = [(1 - level) / 2, (1 + level) / 2]

    def interval(value: float, draws: Sequence[float]) -> Interval:
        low, high = np.quantile(draws, tails) if len(draws) else (np.nan, np.nan)
        return Interval(float(value), float(low), float(high))

    return Suggestion(
        {name: interval(best[i], [optimum[i] for optimum in optima]) for i, name in enumerate(domains)},
        interval(loss, losses),
        interval(min(total) - loss, gains),
        float(np.mean(np.array(gains) > 0)) if gains else float("nan"),
    )


def _loss(theta: Float[np.ndarray, " params"], shares: Float[np.ndarray, " domains"]) -> float:
    return float(np.exp(theta[0]) + np.exp(theta[1:] @ shares))


def _minimum(
    thetas: Sequence[Float[np.ndarray, " params"]],
    weights: Float[np.ndarray, " sets"],
    limits: Sequence[tuple[float, float]],
) -> Float[np.ndarray, " domains"]:
    """The shares of the lowest weighted loss. The sum of exponentials is convex, so one start is enough."""
    slopes = np.array([theta[1:] for theta in thetas])

    def objective(shares: Float[np.ndarray, " domains"]) -> tuple[float, Float[np.ndarray, " domains"]]:
        terms = weights * np.exp(slopes @ shares)
        return float(terms.sum()), terms @ slopes

    low, high = np.array(limits).T
    start = low + (1 - low.sum()) * (high - low) / (high - low).sum() if (high > low).any() else low
    found = minimize(
        objective,
        start,
        jac=True,
        method="SLSQP",
        bounds=limits,
        constraints={"type": "eq", "fun": lambda s: s.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    shares = np.clip(found.x, low, high)
    return shares / shares.sum()
