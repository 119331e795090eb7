"""Efficient verification of data: which of several candidate sets makes a model better, and how sure that is.

The procedure is Ultra-FineWeb's (MiniCPM4 report, §2.2): a model that was trained to the end of its
stable phase is annealed once for every candidate, on a mixture of 30% candidate and 70% of the default mix, and the
annealed models are compared. This module has what that needs besides a trainer and an evaluation: the mixture, the
comparison of all pairs, and the verdict. `experiments/verify.py` trains and evaluates.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from jaxtyping import Float

from cpm_jax.common.statistics import holm
from cpm_jax.curation.paired_bootstrap import SIGNIFICANCE, Difference, paired_difference, seed_spread, seeds_needed
from cpm_jax.data.mixture import Component, MixtureConfig, Stage

DEFAULT = "default"  # the default mix alone, which every candidate is also compared with
_CANDIDATE = "candidate"


@dataclasses.dataclass(frozen=True)
class Unit:
    """How figures are written.

    Attributes:
        name: of a difference.
        higher_is_better: which way a figure is good.
        scale: by which figures are multiplied.
        digits: after the point.
    """

    name: str
    higher_is_better: bool
    scale: float
    digits: int


BITS_PER_BYTE = Unit("bits per byte", higher_is_better=False, scale=1.0, digits=4)
POINTS = Unit("points", higher_is_better=True, scale=100.0, digits=2)


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What was measured of every candidate.

    Attributes:
        unit: of the figures.
        weights: for each task, the weights of its items.
        values: for each candidate and task, the value of each seed and item; a figure is Σ values / Σ weights.
    """

    unit: Unit
    weights: Mapping[str, Float[np.ndarray, " n"]]
    values: Mapping[str, Mapping[str, Float[np.ndarray, "s n"]]]

    def figure(self, candidate: str, task: str | None = None) -> float:
        """A candidate's figure, mean over seeds; of one task, or the mean of all."""
        if task is None:
            return float(np.mean([self.figure(candidate, name) for name in self.weights]))
        return float(self.unit.scale * self.values[candidate][task].sum(1).mean() / self.weights[task].sum())

    def ranking(self) -> list[str]:
        """The candidates, the best first."""
        return sorted(self.values, key=self.figure, reverse=self.unit.higher_is_better)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two candidates, the one with the better figure first.

    Attributes:
        first: the better one.
        second: the other.
        difference: how much better the first is, in the unit of the scores; positive whichever way is good.
        adjusted_p_value: after Holm's correction for the number of pairs.
    """

    first: str
    second: str
    difference: Difference
    adjusted_p_value: float

    @property
    def significant(self) -> bool:
        """Whether the two are told apart."""
        return self.adjusted_p_value < SIGNIFICANCE


def anneal_mixture(paths: Sequence[str], records: Sequence[int], candidate: str, share: float) -> MixtureConfig:
    """The default mix, and a share of a candidate in it.

    The candidate's component has the same name whichever it is: the order of the default data, and that of a candidate
    of the same size, is then the same for all, so that candidates differ by their data alone.

    Args:
        paths: folders of the default mix.
        records: how many training records each has: they are mixed in proportion.
        candidate: folder of the candidate; "" is the default mix alone.
        share: of the candidate.
    """
    components = [Component(f"default{i}", path) for i, path in enumerate(paths)]
    weights = [count / sum(records) for count in records]
    if candidate:
        components.append(Component(_CANDIDATE, candidate))
        weights = [*((1 - share) * weight for weight in weights), share]
    return MixtureConfig(tuple(components), (Stage(0, tuple(weights)),))


def compare_pairs(scores: Scores) -> list[Pair]:
    """Compares every two candidates; the best candidates come first."""
    pairs = list(combinations(scores.ranking(), 2))
    sign = scores.unit.scale * (1 if scores.unit.higher_is_better else -1)
    by_seed = [
        np.mean([table.sum(1) / scores.weights[task].sum() for task, table in tables.items()], axis=0)
        for tables in scores.values.values()
    ]
    spread = seed_spread(scores.unit.scale * np.array(by_seed))
    found = []
    for first, second in pairs:
        a, b = ([sign * scores.values[name][task] for task in scores.weights] for name in (first, second))
        found.append(paired_difference(a, b, list(scores.weights.values()), spread=spread))
    adjusted = holm([difference.p_value for difference in found])
    return [Pair(*names, d, p) for names, d, p in zip(pairs, found, adjusted, strict=True)]


def more_tokens(pair: Pair, tokens_per_cell: int) -> int | None:
    """Tokens that both candidates together would still need to be told apart with 80% power, if what was found is true.

    Returns:
        0 where they are told apart; None where no number of seeds is enough with these items.
    """
    if pair.significant:
        return 0
    needed = seeds_needed(pair.difference)
    if needed is None:
        return None
    return 2 * tokens_per_cell * max(1, needed - pair.difference.seeds)


def sentence(pair: Pair, unit: Unit, tokens_per_cell: int) -> str:
    """What a pair says, for someone who has to decide."""
    d, digits = pair.difference, unit.digits
    low, high = d.interval
    half = (high - low) / 2
    shown = (
        f"{d.value:+.{digits}f} ± {half:.{digits}f} {unit.name} (95% interval {low:+.{digits}f} to "
        f"{high:+.{digits}f}, p = {pair.adjusted_p_value:.2g})"
    )
    if pair.significant:
        return f"{pair.first} is better than {pair.second}: {shown}."
    tokens = more_tokens(pair, tokens_per_cell)
    if tokens is None:
        help_ = "if that is the true difference, no number of seeds would tell them apart on these held-out items"
    else:
        help_ = f"if that is the true difference, about {tokens:,} more tokens of training would tell them apart"
    return f"{pair.first} and {pair.second} are not distinguishable at this budget: {shown}; {help_}."


def verdict(scores: Scores, pairs: Sequence[Pair], tokens_per_cell: int, passes: Mapping[str, float]) -> str:
    """One paragraph: which candidate to take, whether it beats the default mix, and what to be careful about.

    Args:
        scores: what was measured.
        pairs: from `compare_pairs`.
        tokens_per_cell: tokens of one annealing.
        passes: how often the annealing read each candidate.
    """
    candidates = [name for name in scores.ranking() if name != DEFAULT]
    by_names = {frozenset((pair.first, pair.second)): pair for pair in pairs}
    said = []
    if len(candidates) > 1:
        said.append(sentence(by_names[frozenset(candidates[:2])], scores.unit, tokens_per_cell))
    if DEFAULT in scores.values:
        best = by_names[frozenset((candidates[0], DEFAULT))]
        if len(candidates) == 1:
            said.append(sentence(best, scores.unit, tokens_per_cell))
        groups: dict[str, list[str]] = {"improve": [], "harm": [], "unclear": []}
        for name in candidates if len(candidates) > 1 else []:
            pair = by_names[frozenset((name, DEFAULT))]
            kind = "unclear" if not pair.significant else "improve" if pair.first == name else "harm"
            groups[kind].append(name)
        words = {
            "improve": "better than the default mix alone",
            "harm": "worse than the default mix alone",
            "unclear": "not distinguishable from it",
        }
        told = [f"{words[kind]}: {', '.join(names)}" for kind, names in groups.items() if names]
        if told:
            said.append(f"In the mix, {'; '.join(told)}.")
    first = pairs[0].difference
    said.append(
        f"Measured on {first.items:,} held-out items of {len(scores.weights)} sets after {first.seeds} annealings of "
        f"{tokens_per_cell:,} tokens for each candidate."
    )
    if first.seeds == 1:
        said.append("With one seed the interval says nothing of how much seeds differ: add seeds before deciding.")
    if often := [f"{name} ({count:.1f} times)" for name, count in passes.items() if count > 4]:
        said.append(f"Read more than four times, so that repetition may weigh more than quality: {', '.join(often)}.")
    # Seeds that read the same documents do not differ by which documents a candidate happens to have.
    if shared := [name for name, count in passes.items() if count * first.seeds > 1]:
        said.append(
            f"The seeds together read more than there is of {', '.join(shared)}: the verdict is about these documents, "
            "and another sample of the same source may come out otherwise."
        )
    return " ".join(said)
