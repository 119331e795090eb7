"""Is one candidate better than another: their paired difference over items and seeds, its interval and its test.

Two candidates are measured on the same items after trainings with the same seeds. Both the items (which documents were
held out) and the seeds (the order of the data) are draws, crossed with each other: each seed meets every item. Items
and seeds are drawn again with replacement, independently (the pigeonhole bootstrap; A. B. Owen, "The pigeonhole
bootstrap", Annals of Applied Statistics 1, 2007), which for such tables gives a variance that is not too small. Three
or five seeds are too few for percentiles: the bootstrap gives the standard error, with the seeds' part corrected by
S / (S - 1), and the interval and the test are Student's, with Satterthwaite's degrees of freedom.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float

BOOTSTRAPS = 10_000
SIGNIFICANCE = 0.05
POWER = 0.8
MAX_SEEDS = 10_000
_CHUNK = 200  # draws at a time: each has a count for every item


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired difference of two candidates, mean over tasks.

    Attributes:
        value: the first minus the second.
        standard_error: of the value, over items and seeds.
        interval: 95% interval of the value.
        p_value: two-sided, of no difference.
        degrees_of_freedom: of both.
        item_variance: part of the squared standard error that more items would lower.
        seed_variance: part that more seeds would lower.
        items: number of items, over all tasks.
        seeds: number of seeds.
    """

    value: float
    standard_error: float
    interval: tuple[float, float]
    p_value: float
    degrees_of_freedom: float
    item_variance: float
    seed_variance: float
    items: int
    seeds: int


def paired_difference(
    first: Sequence[Float[np.ndarray, "s n"]],
    second: Sequence[Float[np.ndarray, "s n"]],
    weights: Sequence[Float[np.ndarray, " n"]],
    *,
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
    freedom = _degrees_of_freedom(item_variance, seed_variance, num_items, num_seeds)
    half = float(scipy.stats.t.ppf(1 - SIGNIFICANCE / 2, freedom)) * error
    p_value = float(2 * scipy.stats.t.sf(abs(value) / error, freedom)) if error else float(value == 0)
    return Difference(
        value=value,
        standard_error=error,
        interval=(value - half, value + half),
        p_value=p_value,
        degrees_of_freedom=freedom,
        item_variance=item_variance,
        seed_variance=seed_variance,
        items=num_items,
        seeds=num_seeds,
    )


def _degrees_of_freedom(item_variance: float, seed_variance: float, items: int, seeds: int) -> float:
    """Satterthwaite's, of a sum of two variances that are known from `items` and from `seeds` draws."""
    total = item_variance + seed_variance
    if not total:
        return float(max(1, items - 1))
    by_items = item_variance**2 / max(1, items - 1)
    by_seeds = seed_variance**2 / (seeds - 1) if seeds > 1 else 0.0
    return total**2 / (by_items + by_seeds)


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
    freedom = _degrees_of_freedom(found.item_variance, seed_variance, found.items, seeds)
    error = math.sqrt(found.item_variance + seed_variance)
    needed = scipy.stats.t.ppf(1 - SIGNIFICANCE / 2, freedom) + scipy.stats.t.ppf(POWER, freedom)
    return effect > needed * error
