"""Which record of which component is the n-th example of a training run: pure arithmetic, no data is read.

Examples are numbered through the whole run. A stage mixes components by weights; the order within it repeats every
PERIOD examples, so that the place of any example follows from its number alone, however far into the run.
"""

import bisect
import functools
import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from pydantic import NonNegativeFloat, NonNegativeInt

from cpm_jax.common.config import ConfigError, config_dataclass, config_function

PERIOD = 10_000


@config_dataclass
class Component:
    """A part of a mixture.

    Attributes:
        name: what metrics call it.
        path: a dataset folder that `prepare` wrote.
    """

    name: str
    path: str


@config_dataclass
class Stage:
    """Weights that hold from a step on.

    Attributes:
        start_step: first global step of the stage.
        weights: of each component, in their order; only their ratios count. Taken to 1/10000 of their sum.
    """

    start_step: NonNegativeInt
    weights: tuple[NonNegativeFloat, ...]


@config_dataclass
class MixtureConfig:
    """What to train on.

    Attributes:
        components: the parts; their order gives `source_ids`.
        stages: in order of time, the first from step 0; () mixes all the time in proportion to the numbers of records.
    """

    components: tuple[Component, ...]
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        names = [component.name for component in self.components]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"MixtureConfig.components = {names}: give at least one, each with a name of its own",
                field="MixtureConfig.components",
            )
        starts = [stage.start_step for stage in self.stages]
        if starts and (starts[0] != 0 or any(a >= b for a, b in pairwise(starts))):
            raise ConfigError(
                f"MixtureConfig.stages start at steps {starts}: the first must start at 0 and each later than the one "
                "before",
                field="MixtureConfig.stages",
            )
        for stage in self.stages:
            if len(stage.weights) != len(names):
                raise ConfigError(
                    f"Stage.weights = {stage.weights} has {len(stage.weights)} values for {len(names)} components "
                    f"({', '.join(names)})",
                    field="Stage.weights",
                )
            whole_weights(stage.weights)


@config_function
def from_folders(paths: str | tuple[str, ...] | list[str]) -> MixtureConfig:
    """A mixture of dataset folders in proportion to their numbers of records, named after the folders.

    Args:
        paths: one folder that `prepare` wrote, or several.
    """
    paths = (paths,) if isinstance(paths, str) else tuple(paths)
    return MixtureConfig(components=tuple(Component(name=Path(path).resolve().name, path=path) for path in paths))


@functools.lru_cache
def whole_weights(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Scales weights to whole numbers that sum to PERIOD, by largest remainder.

    Raises:
        ConfigError: if they sum to 0 or are not finite, or one above 0 would become 0.
    """
    if not all(map(math.isfinite, weights)) or sum(weights) <= 0:
        raise ConfigError(f"Stage.weights = {weights}: must be finite and sum to more than 0", field="Stage.weights")
    # The decimals that were written, not the binary fractions next to them: 0.1 is a tenth.
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [PERIOD * weight / sum(exact) for weight in exact]
    whole = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(weights)), key=lambda i: whole[i] - quotas[i])
    for i in by_remainder[: PERIOD - sum(whole)]:
        whole[i] += 1
    for weight, count in zip(weights, whole, strict=True):
        if weight > 0 and count == 0:
            raise ConfigError(
                f"Stage.weights = {weights}: {weight} is less than 1/{PERIOD} of the sum; leave the component out "
                "with weight 0, or give it more",
                field="Stage.weights",
            )
    return tuple(whole)


@functools.lru_cache
def period_order(counts: tuple[int, ...]) -> Int[np.ndarray, "PERIOD"]:
    """The component of each example of a period in which component i has counts[i] examples.

    After any number n of examples each component has had its share n · counts[i] / PERIOD to within less than one
    example (R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980).
    """
    # At the end of a period all are even again, so that a common divisor of the counts makes a shorter one.
    length = PERIOD // math.gcd(*counts)
    active = np.flatnonzero(counts)
    shares = np.asarray(counts, np.int64)[active] * length // PERIOD
    spread = max(2 * (len(active) - 1), 1)
    taken = np.zeros_like(shares)
    order = np.empty(length, np.int32)
    for n in range(1, length + 1):
        # Everything times spread · length, to stay in whole numbers. A component may be taken once it is owed
        # 1 / spread; of those the one goes first that would soonest be owed 1 - 1 / spread more than it has.
        owed = spread * (n * shares - taken * length)
        deadline = ((spread - 1) * length - owed) / shares
        chosen = np.argmin(np.where(owed >= length, deadline, np.inf))
        taken[chosen] += 1
        order[n - 1] = active[chosen]
    return np.tile(order, PERIOD // length)


class Place(NamedTuple):
    """Where an example comes from: the `position`-th example taken from `component` in the whole run."""

    component: int
    position: int


class _Period:
    """One period of a stage: which component each example takes, and how many each had taken before."""

    def __init__(self, weights: tuple[float, ...]):
        self.counts = np.asarray(whole_weights(weights), np.int64)
        self.order = period_order(whole_weights(weights))
        self.rank = np.empty(PERIOD, np.int64)
        for component in range(len(weights)):
            mine = self.order == component
            self.rank[mine] = np.arange(np.count_nonzero(mine))

    def taken(self, examples: int) -> Int[np.ndarray, " C"]:
        """Examples of each component among the first `examples`."""
        periods, rest = divmod(examples, PERIOD)
        return periods * self.counts + np.bincount(self.order[:rest], minlength=len(self.counts))


class ExampleOrder:
    """The order of examples of a run; a function of the stages and the batch size alone.

    A component goes on where it was when a stage begins: over all stages its positions are 0, 1, 2, … without gap
    or repetition.
    """

    def __init__(self, stages: tuple[Stage, ...], batch_size: int):
        """Prepares the tables.

        Args:
            stages: as in `MixtureConfig`, at least one.
            batch_size: examples per global step.
        """
        self._starts = [stage.start_step * batch_size for stage in stages]
        self._periods = [_Period(stage.weights) for stage in stages]
        self._taken_before = [np.zeros(len(stages[0].weights), np.int64)]
        for i, (start, end) in enumerate(pairwise(self._starts)):
            self._taken_before.append(self._taken_before[i] + self._periods[i].taken(end - start))

    def place(self, example: int) -> Place:
        """Where the example of that number comes from."""
        stage = bisect.bisect_right(self._starts, example) - 1
        period = self._periods[stage]
        periods, rest = divmod(example - self._starts[stage], PERIOD)
        component = int(period.order[rest])
        in_stage = periods * period.counts[component] + period.rank[rest]
        return Place(component, int(self._taken_before[stage][component] + in_stage))

    def taken(self, examples: int) -> Int[np.ndarray, " C"]:
        """How many examples of each component are among the first `examples` of the run."""
        stage = max(bisect.bisect_left(self._starts, examples) - 1, 0)
        return self._taken_before[stage] + self._periods[stage].taken(examples - self._starts[stage])
