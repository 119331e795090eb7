"""Learning-rate schedules: a sequence of phases, evaluated as a pure function of the step."""

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cpm_jax.common.config import ConfigError, config_dataclass, config_function

Shape = Literal["linear", "constant", "cosine", "exponential", "sqrt"]
DecayShape = Literal["linear", "cosine", "exponential", "sqrt"]
Schedule = Callable[[int | Int[Array, ""]], Float[Array, ""]]


@config_dataclass
class Phase:
    """One stretch of a schedule, from `start` to `end`. With f the fraction of the phase that has passed:

    - linear: start + (end - start) f
    - constant: end
    - cosine: end + (start - end) (1 + cos πf) / 2
    - exponential: start (end / start)^f, MiniCPM's 0.5^((s - S) / T) with T = steps / log2(start / end)
    - sqrt: end + (start - end) (1 - sqrt f), "1-sqrt" (Hägele et al. 2024, arXiv:2405.18392)

    Attributes:
        steps: length; 0 leaves the phase out.
        end: learning rate that is reached.
        shape: how it is reached.
        start: learning rate at its beginning; None goes on from the end of the phase before (0 for the first). A
            later stage warms up afresh with start = 0.
    """

    steps: NonNegativeInt
    end: NonNegativeFloat
    shape: Shape = "constant"
    start: NonNegativeFloat | None = None


@config_dataclass
class ScheduleConfig:
    """A learning-rate schedule. After its last phase the last value stays.

    Attributes:
        phases: in order of time.
        first_step: global step at which the first phase begins: for a later stage that goes on counting steps.
    """

    phases: tuple[Phase, ...]
    first_step: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if not any(phase.steps for phase in self.phases):
            raise ConfigError(
                "ScheduleConfig.phases has no steps: give at least one Phase with steps > 0", "ScheduleConfig.phases"
            )
        for start, phase in self._with_starts():
            if phase.shape == "exponential" and not (start > 0 and phase.end > 0):
                raise ConfigError(
                    f"Phase.end = {phase.end}: an exponential phase (here from {start}) needs a start and an end "
                    "above 0",
                    field="Phase.end",
                )

    def _with_starts(self) -> list[tuple[float, Phase]]:
        phases = [phase for phase in self.phases if phase.steps]
        previous = [0.0, *(phase.end for phase in phases)]
        return [(p if phase.start is None else phase.start, phase) for p, phase in zip(previous, phases, strict=False)]

    @property
    def total_steps(self) -> int:
        """Step at which the last phase ends."""
        return self.first_step + sum(phase.steps for phase in self.phases)

    @property
    def decay_share(self) -> float:
        """Share of all steps that the last phase takes, where it lowers the learning rate; else 0."""
        start, last = self._with_starts()[-1]
        return last.steps / self.total_steps if last.end < start else 0.0


def _phase_value(start: float, phase: Phase, fraction: Float[Array, ""]) -> Float[Array, ""]:
    end = jnp.float32(phase.end)
    if phase.shape == "linear":
        return start + (end - start) * fraction
    if phase.shape == "cosine":
        return end + (start - end) * 0.5 * (1 + jnp.cos(jnp.pi * fraction))
    if phase.shape == "exponential":
        return start * (end / start) ** fraction
    if phase.shape == "sqrt":
        return end + (start - end) * (1 - jnp.sqrt(fraction))
    return end


def make_schedule(config: ScheduleConfig) -> Schedule:
    """Turns a schedule into a function step -> learning rate (float32 scalar) that works inside and outside jit."""
    phases = config._with_starts()
    edges = list(accumulate((phase.steps for _, phase in phases), initial=config.first_step))

    def schedule(step: int | Int[Array, ""]) -> Float[Array, ""]:
        step = jnp.asarray(step)
        values = [
            # The difference is taken in integers: float32 cannot tell the steps of a long run apart.
            _phase_value(start, phase, jnp.clip((step - first).astype(jnp.float32) / phase.steps, 0.0, 1.0))
            for (start, phase), first in zip(phases, edges, strict=False)
        ]
        return jnp.select([step < edge for edge in edges[1:]], values, default=phases[-1][1].end)

    return schedule


@config_function
def wsd(
    peak_lr: PositiveFloat,
    train_steps: PositiveInt,
    warmup_steps: NonNegativeInt,
    decay_steps: NonNegativeInt,
    decay_shape: DecayShape = "exponential",
    final_lr_ratio: NonNegativeFloat = 0.1,
    first_step: NonNegativeInt = 0,
) -> ScheduleConfig:
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395 §4).

    Args:
        peak_lr: learning rate of the stable phase.
        train_steps: steps in all, those before `first_step` too.
        warmup_steps: steps of linear warm-up from 0.
        decay_steps: steps of decay at the end, some 10% of all.
        decay_shape: MiniCPM decays exponentially.
        final_lr_ratio: final learning rate as a fraction of `peak_lr`.
        first_step: global step at which the warm-up begins: that of the checkpoint which a later stage goes on from.

    Raises:
        ConfigError: if warm-up and decay are longer than the training.
    """
    stable_steps = train_steps - first_step - warmup_steps - decay_steps
    if stable_steps < 0:
        before, at = ("first_step + ", f"{first_step} + ") if first_step else ("", "")
        raise ConfigError(
            f"wsd.train_steps = {train_steps}: must be at least {before}warmup_steps + decay_steps = "
            f"{at}{warmup_steps} + {decay_steps} = {first_step + warmup_steps + decay_steps}",
            field="wsd.train_steps",
        )
    return ScheduleConfig(
        phases=(
            Phase(steps=warmup_steps, end=peak_lr, shape="linear"),
            Phase(steps=stable_steps, end=peak_lr, shape="constant"),
            Phase(steps=decay_steps, end=peak_lr * final_lr_ratio, shape=decay_shape, start=peak_lr),
        ),
        first_step=first_step,
    )


@config_function
def cosine(
    peak_lr: PositiveFloat,
    train_steps: PositiveInt,
    warmup_steps: NonNegativeInt,
    final_lr_ratio: NonNegativeFloat = 0.1,
) -> ScheduleConfig:
    """Linear warm-up from 0, then cosine decay over the rest of the training (InternLM2, Llama).

    Args:
        peak_lr: learning rate after the warm-up.
        train_steps: steps in all.
        warmup_steps: steps of linear warm-up.
        final_lr_ratio: final learning rate as a fraction of `peak_lr`.

    Raises:
        ConfigError: if the warm-up is longer than the training.
    """
    if warmup_steps > train_steps:
        raise ConfigError(
            f"cosine.warmup_steps = {warmup_steps}: must be at most train_steps = {train_steps}",
            field="cosine.warmup_steps",
        )
    return ScheduleConfig(
        phases=(
            Phase(steps=warmup_steps, end=peak_lr, shape="linear"),
            Phase(steps=train_steps - warmup_steps, end=peak_lr * final_lr_ratio, shape="cosine", start=peak_lr),
        )
    )


# MiMo-7B §2.3: tokens of each phase, its end as a fraction of the peak 1.07e-4, its shape.
_MIMO_PHASES: tuple[tuple[float, float, Shape], ...] = (
    (84e9, 1.0, "linear"),
    (10.2e12, 1.0, "constant"),
    (7.5e12, 3e-5 / 1.07e-4, "cosine"),
    (4e12 + 1.5e12, 3e-5 / 1.07e-4, "constant"),
    (0.5e12, 1e-5 / 1.07e-4, "cosine"),
)


@config_function
def mimo(train_steps: PositiveInt, peak_lr: PositiveFloat = 1.07e-4) -> ScheduleConfig:
    """MiMo-7B's schedule over all three stages, in proportion to `train_steps`.

    The paper counts tokens: 84B of warm-up, 10.2T constant, cosine to 3e-5 over 7.5T, constant over stage 2 (4T) and
    the first 1.5T of stage 3, cosine to 1e-5 over 0.5T. A step is 2560 · 8192 = 640 · 32768 = 20,971,520 tokens in
    every stage, so tokens are in proportion to steps, and the paper's own run is train_steps = 1134110. Approximation:
    its batch grows to that size over the first 168B tokens, which here are taken at full size.

    Args:
        train_steps: steps in all; the ends of the phases are rounded to steps.
        peak_lr: learning rate after the warm-up; the others keep their ratio to it.
    """
    total = sum(tokens for tokens, _, _ in _MIMO_PHASES)
    edges = [round(train_steps * t / total) for t in accumulate((tokens for tokens, _, _ in _MIMO_PHASES), initial=0.0)]
    return ScheduleConfig(
        phases=tuple(
            Phase(steps=b - a, end=peak_lr * ratio, shape=shape)
            for (a, b), (_, ratio, shape) in zip(pairwise(edges), _MIMO_PHASES, strict=True)
        )
    )
