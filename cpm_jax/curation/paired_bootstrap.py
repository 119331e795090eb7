"""Is one candidate better than another: their paired difference over items and seeds, its interval and its test.

Two candidates are measured on the same items after trainings with the same seeds. Both the items (which documents were
held out) and the seeds (the order of the data) are draws, crossed with each other: each seed meets every item. Items
and seeds are drawn again with replacement, independently (the pigeonhole bootstrap; A. B. Owen, "The pigeonhole
bootstrap", Annals of Applied Statistics 1, 2007), with the seeds' part corrected by S / (S - 1), which gives the
standard error.

Three or five seeds are too few for percentiles of such draws. Interval and test are Student's, with Cochran and Cox's
critical value: that of the items' and that of the seeds' degrees of freedom, weighted by their parts of the variance
(W. G. Cochran, "Approximate significance levels of the Behrens-Fisher test", Biometrics 20, 1964). In simulations of
equal candidates Satterthwaite's degrees of freedom found up to 8% different with three seeds and 12% with two; this
finds at most 5% and 6%. Where several candidates are compared, their seeds tell together how much seeds matter
(`seed_spread`): of many pairs some agree over three seeds by chance, and would be believed too much.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.stats
from jaxtyping import Float

BOOTSTRAPS = 10_000
SIGNIFICANCE = 0.05
POWER = 0.8
MAX_SEEDS = 10_000
_LEAST_LOG_P = -34.0  # 2e-15: no smaller p-value is told from 0
_CHUNK = 200  # draws at a time: each has a count for every item


class SeedSpread(NamedTuple):
    """How much the difference of two candidates varies between seeds.

    Attributes:
        variance: of one seed's difference.
        freedom: degrees of freedom that it is known with.
    """

    variance: float
    freedom: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired difference of two candidates, mean over tasks.

    Attributes:
        value: the first minus the second.
        standard_error: of the value, over items and seeds.
        interval: 95% interval of the value.
        p_value: two-sided, of no difference.
        seed_freedom: degrees of freedom of the seeds' part.
        item_variance: part of the squared standard error that more items would lower.
        seed_variance: part that more seeds would lower.
        items: number of items, over all tasks.
        seeds: number of seeds.
    """

    value: float
    standard_error: float
    interval: tuple[float, float]
    p_value: float
    seed_freedom: int
    item_variance: float
    seed_variance: float
    items: int
    seeds: int


def paired_difference(
    first: Sequence[Float[np.ndarray, "s n"]],
    second: Sequence[Float[np.ndarray, "s n"]],
    weights: Sequence[Float[np.ndarray, " n"]],
    *,
    spread: SeedSpread | None = None,
    draws: int = BOOTSTRAPS,
    seed: int = 0,
) -> Difference:
    """The difference of two candidates and its uncertainty.

    A candidate's figure is the mean over tasks and seeds of Σ values / Σ weights over the items of a task: a mean
    where weights are 1, bits per byte where values are bits and weights bytes.

    Args:
        first: for each task, the first candidate's values by seed and item.
        second: the same of the second candidate.
        weights: for each task, the weights of its items.
        spread: of the seeds over all candidates that are compared; it counts where it is larger than that of the two.
        draws: bootstrap draws.
        seed: of the draws: the same input gives the same result.
    """
    rng = np.random.default_rng(seed)
    differences = [a - b for a, b in zip(first, second, strict=True)]
    num_seeds, num_items = differences[0].shape[0], sum(len(w) for w in weights)
    by_seed = np.mean([d.sum(1) / w.sum() for d, w in zip(differences, weights, strict=True)], axis=0)
    value = float(by_seed.mean())
    over_items, over_both = [], []
    correction = math.sqrt(num_seeds / (num_seeds - 1)) if num_seeds > 1 else 0.0
    for start in range(0, draws, _CHUNK):
        count = min(_CHUNK, draws - start)
        drawn = np.zeros((count, num_seeds))
        for d, w in zip(differences, weights, strict=True):
            times = rng.multinomial(len(w), np.full(len(w), 1 / len(w)), count)
            drawn += (times @ d.T) / (times @ w)[:, None] / len(differences)
        seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), count) / num_seeds
        mean = drawn.mean(1)
        over_items.append(mean)
        over_both.append(mean + correction * ((seeds * drawn).sum(1) - mean))
    item_variance = float(np.var(np.concatenate(over_items)))
    error = float(np.std(np.concatenate(over_both)))
    seed_variance = float(np.var(by_seed, ddof=1) / num_seeds) if num_seeds > 1 else 0.0
    seed_freedom = max(1, num_seeds - 1)
    if spread is not None and spread.variance / num_seeds > seed_variance:
        error = math.sqrt(error**2 - seed_variance + spread.variance / num_seeds)
        seed_variance, seed_freedom = spread.variance / num_seeds, spread.freedom
    half = _critical(1 - SIGNIFICANCE / 2, item_variance, seed_variance, num_items, seed_freedom) * error
    return Difference(
        value=value,
        standard_error=error,
        interval=(value - half, value + half),
        p_value=_p_value(value, error, item_variance, seed_variance, num_items, seed_freedom),
        seed_freedom=seed_freedom,
        item_variance=item_variance,
        seed_variance=seed_variance,
        items=num_items,
        seeds=num_seeds,
    )


def seed_spread(figures: Float[np.ndarray, "c s"]) -> SeedSpread | None:
    """How much seeds matter for differences of candidates, from all candidates together.

    Args:
        figures: of each candidate and seed. What a seed does to all candidates alike is no part of a difference.

    Returns:
        The variance of a difference of two candidates between seeds; None where there is one seed or one candidate.
    """
    candidates, seeds = figures.shape
    freedom = (candidates - 1) * (seeds - 1)
    if not freedom:
        return None
    rest = figures - figures.mean(0) - figures.mean(1, keepdims=True) + figures.mean()
    return SeedSpread(2 * float((rest**2).sum()) / freedom, freedom)


def _critical(probability: float, item_variance: float, seed_variance: float, items: int, seed_freedom: int) -> float:
    """Cochran and Cox's quantile of a difference whose variance is a sum of two estimated ones."""
    by_items, by_seeds = (scipy.stats.t.ppf(probability, freedom) for freedom in (max(1, items - 1), seed_freedom))
    total = item_variance + seed_variance
    return float((item_variance * by_items + seed_variance * by_seeds) / total) if total else float(by_items)


def _p_value(
    value: float, error: float, item_variance: float, seed_variance: float, items: int, seed_freedom: int
) -> float:
    """The level at which the critical value is what was found."""
    if not error:
        return float(value == 0)
    found = abs(value) / error

    def beyond(log_p: float) -> float:
        return _critical(-np.expm1(log_p - math.log(2)), item_variance, seed_variance, items, seed_freedom) - found

    if beyond(_LEAST_LOG_P) <= 0:
        return math.exp(_LEAST_LOG_P)
    return math.exp(scipy.optimize.brentq(beyond, _LEAST_LOG_P, 0.0))


def seeds_needed(found: Difference, effect: float | None = None) -> int | None:
    """How many seeds would tell a difference apart with 80% power, the items staying as they are.

    Args:
        found: what was measured.
        effect: the true difference; None takes the one that was found.

    Returns:
        The number of seeds; None where no number of seeds is enough, because the items alone leave too much open.
    """
    effect = abs(found.value if effect is None else effect)
    one_seed = found.seed_variance * found.seeds
    # The smallest number that is enough: the error falls with it, so it may be searched by halving.
    low, high = 1, MAX_SEEDS
    if not _tells(effect, found, one_seed, high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _tells(effect, found, one_seed, middle) else (middle + 1, high)
    return low


def _tells(effect: float, found: Difference, one_seed: float, seeds: int) -> bool:
    if seeds < 2 and one_seed:
        return False  # one seed alone does not show how much seeds differ
    seed_variance = one_seed / seeds
    freedom = max(found.seed_freedom, seeds - 1)
    error = math.sqrt(found.item_variance + seed_variance)
    needed = sum(
        _critical(probability, found.item_variance, seed_variance, found.items, freedom)
        for probability in (1 - SIGNIFICANCE / 2, POWER)
    )
    return effect > needed * error
