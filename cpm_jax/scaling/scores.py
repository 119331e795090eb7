"""From a loss to a score: ScalingBench's sigmoid with intervals, and which of two measures orders models better.

| form | score over loss L | source |
|---|---|---|
| `sigmoid` | floor + (ceiling - floor) / (1 + exp(γ (L - middle))) | Densing Law, arXiv:2412.04315 |
| `exponential` | floor + k · exp(-γ L) | Gadre et al., arXiv:2403.08540, of error = 1 - score |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats
from scipy.optimize import least_squares
from scipy.special import expit

from cpm_jax.scaling.fitting import FitError
from cpm_jax.scaling.laws import Interval

ScoreForm = Literal["sigmoid", "exponential"]
_NAMES: dict[str, tuple[str, ...]] = {
    "sigmoid": ("floor", "ceiling", "gamma", "middle"),
    "exponential": ("floor", "k", "gamma"),
}


@dataclass(frozen=True)
class ScoreLaw:
    """A fitted map from loss to score.

    Attributes:
        form: which.
        coefficients: by name.
        losses: that it was fitted to.
        scores: of the same runs.
        theta: the coefficients in their order.
        samples: those of the bootstrap's fits.
    """

    form: ScoreForm
    coefficients: dict[str, float]
    losses: Float[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    theta: Float[np.ndarray, " params"]
    samples: Float[np.ndarray, "samples params"]

    def predict(self, loss: float) -> float:
        """The score at a loss."""
        return float(_score(self.form, self.theta, np.asarray(loss)))

    def interval(
        self, loss: float | Float[np.ndarray, " draws"], *, level: float = 0.9, new_run: bool = True
    ) -> Interval:
        """The score at a loss, or at a loss that is itself uncertain.

        Args:
            loss: of a model; or draws of it (`LossLaw.draws`), whose spread is then in the interval too.
            level: share of the draws within.
            new_run: whether the scatter of single models about the law is in it.

        Raises:
            FitError: the law was fitted without a bootstrap.
        """
        if not len(self.samples):
            raise FitError("the law has no bootstrap: fit it with samples > 0")
        rng = np.random.default_rng(0)
        given = np.atleast_1d(np.asarray(loss, float))
        at = given if len(given) > 1 else np.repeat(given, len(self.samples))
        thetas = self.samples[rng.integers(0, len(self.samples), len(at))] if len(given) > 1 else self.samples
        draws = np.array([float(_score(self.form, theta, value)) for theta, value in zip(thetas, at, strict=True)])
        if new_run:
            spare = max(1, len(self.losses) - len(self.theta))
            residuals = self.scores - _score(self.form, self.theta, self.losses)
            draws = draws + rng.choice(residuals, len(draws)) * np.sqrt(len(self.losses) / spare)
        low, high = np.quantile(np.clip(draws, 0, 1), [(1 - level) / 2, (1 + level) / 2])
        return Interval(self.predict(float(np.median(given))), float(low), float(high))


def fit_scores(
    losses: Sequence[float] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    form: ScoreForm = "sigmoid",
    *,
    floor: float | None = None,
    ceiling: float | None = None,
    samples: int = 200,
    seed: int = 0,
) -> ScoreLaw:
    """Fits a map from loss to score by SciPy's least squares, from several starts.

    Args:
        losses: of runs, on the benchmark.
        scores: of the same runs, in [0, 1].
        form: see the table above.
        floor: score of guessing, where it is known: models that all guess cannot tell it from a low ceiling.
        ceiling: best score that is possible, where it is known; of the form `sigmoid`.
        samples: fits of the bootstrap, which draws the residuals.
        seed: of it.

    Raises:
        FitError: too few runs, values that are no losses or scores, or losses or scores that do not vary.
    """
    x, y = np.asarray(losses, float), np.asarray(scores, float)
    fixed = {"floor": floor, "ceiling": ceiling if form == "sigmoid" else None}
    free = [name for name in _NAMES[form] if fixed.get(name) is None]
    if x.shape != y.shape or x.ndim != 1 or len(x) < len(free) + 1:
        raise FitError(
            f"{len(x)} losses and {len(y)} scores: the form {form} has {len(free)} free coefficients and needs at "
            f"least {len(free) + 1} of both; give the floor, or the ceiling, where they are known"
        )
    if not np.all(np.isfinite(x)) or not np.all((y >= 0) & (y <= 1)):
        raise FitError("losses must be finite, and scores in [0, 1]; leave out runs without them")
    if np.ptp(x) < 1e-6:
        raise FitError(f"all losses are {x[0]:.4f}: a map needs models that differ")
    if np.ptp(y) == 0:
        raise FitError(f"all scores are {y[0]:.4f}: a map needs models of which some do better than others")
    theta = _least_squares(form, x, y, fixed, _score_starts(form, x, y))
    rng = np.random.default_rng(seed)
    residuals = y - _score(form, theta, x)
    wider = (residuals - residuals.mean()) * np.sqrt(len(x) / max(1, len(x) - len(free)))
    drawn = []
    for _ in range(samples):
        again = _score(form, theta, x) + rng.choice(wider, len(x))
        drawn.append(_least_squares(form, x, again, fixed, [theta]))
    coefficients = dict(zip(_NAMES[form], map(float, theta), strict=True))
    return ScoreLaw(form, coefficients, x, y, theta, np.array(drawn).reshape(samples, len(theta)))


class HeldOutScore(NamedTuple):
    """A larger model's score beside what the smaller ones predict at its loss.

    Attributes:
        loss: of the larger model.
        score: measured.
        predicted: with its interval.
    """

    loss: float
    score: float
    predicted: Interval

    @property
    def covered(self) -> bool:
        """Whether the interval has the measured score in it."""
        return self.predicted.low <= self.score <= self.predicted.high


def check_scores(
    law: ScoreLaw, losses: Sequence[float], scores: Sequence[float], level: float = 0.9
) -> list[HeldOutScore]:
    """Holds a law of smaller models against larger ones."""
    return [
        HeldOutScore(float(loss), float(score), law.interval(float(loss), level=level))
        for loss, score in zip(losses, scores, strict=True)
    ]


class PairedDifference(NamedTuple):
    """Two recipes over the same cells.

    Attributes:
        mean: of first - second.
        relative: mean, in parts of the second's mean.
        low: lower end of the mean's t interval.
        high: upper end.
        p_value: of a paired t test.
        first_lower: cells in which the first is lower.
        cells: how many.
    """

    mean: float
    relative: float
    low: float
    high: float
    p_value: float
    first_lower: int
    cells: int


def paired_difference(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> PairedDifference:
    """Compares two recipes cell by cell.

    Raises:
        FitError: fewer than two cells, or of different number.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape or len(a) < 2:
        raise FitError(f"{len(a)} and {len(b)} cells: give the same two or more of both")
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(level)
    mean = float((a - b).mean())
    return PairedDifference(
        mean, mean / float(b.mean()), float(low), float(high), float(test.pvalue), int((a < b).sum()), len(a)
    )


def rank_correlation(small: Sequence[float], large: Sequence[float]) -> float:
    """Spearman's correlation of a measure of small models with the large models' ordering; NaN where one is constant.

    Raises:
        FitError: fewer than three pairs.
    """
    if len(small) != len(large) or len(small) < 3:
        raise FitError(f"{len(small)} and {len(large)} models: an order needs three or more pairs")
    if len(set(small)) == 1 or len(set(large)) == 1:
        return float("nan")
    return float(stats.spearmanr(small, large).statistic)


def noise_ratio(by_recipe: Sequence[Sequence[float]]) -> float:
    """Spread over seeds within recipes against the spread of the recipes' means: below 1 a measure tells them apart.

    Args:
        by_recipe: the measure of each seed, recipe by recipe.

    Raises:
        FitError: fewer than two recipes, or one of a single seed.
    """
    if len(by_recipe) < 2 or min(map(len, by_recipe)) < 2:
        raise FitError("the noise ratio needs two recipes or more, of two seeds or more each")
    within = float(np.sqrt(np.mean([np.var(values, ddof=1) for values in by_recipe])))
    between = float(np.std([np.mean(values) for values in by_recipe], ddof=1))
    return within / between if between else float("inf")


def _score(form: ScoreForm, theta: Float[np.ndarray, " params"], loss: np.ndarray) -> np.ndarray:
    if form == "sigmoid":
        floor, ceiling, gamma, middle = theta
        return floor + (ceiling - floor) * expit(-gamma * (loss - middle))
    floor, k, gamma = theta
    return floor + k * np.exp(-gamma * loss)


def _score_starts(form: ScoreForm, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    spread = np.ptp(x)
    if form == "exponential":
        return [np.array([max(y.min() - 0.02, 0.0), 1.0, gamma]) for gamma in (0.3, 1.0, 3.0)]
    ceilings = (min(1.0, y.max() + 0.02), min(1.0, y.max() + 0.3), 1.0)
    middles = (float(np.median(x)), float(x.min()), float(x.min() - spread))
    return [
        np.array([max(y.min() - 0.02, 0.0), ceiling, gamma / spread, middle])
        for ceiling in ceilings
        for gamma in (2.0, 8.0)
        for middle in middles
    ]


def _least_squares(
    form: ScoreForm,
    x: np.ndarray,
    y: np.ndarray,
    fixed: dict[str, float | None],
    starts: Sequence[np.ndarray],
) -> np.ndarray:
    names, spread = _NAMES[form], np.ptp(x)
    if form == "sigmoid":
        low = np.array([0.0, 0.0, 0.02 / spread, x.min() - 10 * spread])
        high = np.array([1.0, 1.0, 200.0 / spread, x.max() + 2 * spread])
    else:
        low, high = np.array([-2.0, 0.0, 0.01]), np.array([1.0, np.inf, 50.0])
    free = np.array([fixed.get(name) is None for name in names])
    constant = np.array([0.0 if fixed.get(name) is None else float(fixed[name] or 0.0) for name in names])

    def full(part: np.ndarray) -> np.ndarray:
        theta = constant.copy()
        theta[free] = part
        return theta

    ends = []
    for start in starts:
        inside = np.clip(start[free], low[free] + 1e-9, high[free] - 1e-9)
        ends.append(
            least_squares(
                lambda part: _score(form, full(part), x) - y,
                inside,
                bounds=(low[free], high[free]),
                x_scale="jac",
                max_nfev=2000,
            )
        )
    return full(min(ends, key=lambda end: end.cost).x)
