"""Schedules against closed forms, and against optax where it has the schedule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.training.schedules import Phase, ScheduleConfig, cosine, make_schedule, mimo, wsd


def values(config, steps):
    """Learning rates at `steps`, traced and vectorised as a train step would."""
    return np.asarray(jax.jit(jax.vmap(make_schedule(config)))(jnp.asarray(steps)))


def test_wsd_exponential_is_minicpms_formula():
    peak, warmup, train, decay, ratio = 1e-2, 100, 1000, 200, 1 / 16
    half_life = decay / math.log2(1 / ratio)

    def expected(step):
        if step < warmup:
            return peak * step / warmup
        if step < train - decay:
            return peak
        return peak * 0.5 ** ((min(step, train) - (train - decay)) / half_life)

    steps = range(0, 1100)
    config = wsd(peak_lr=peak, train_steps=train, warmup_steps=warmup, decay_steps=decay, final_lr_ratio=ratio)
    np.testing.assert_allclose(values(config, list(steps)), [expected(s) for s in steps], rtol=1e-5, atol=1e-9)
    assert config.total_steps == train
    assert config.decay_share == 0.2
    assert wsd(peak, train, warmup, 0).decay_share == 0.0


@pytest.mark.parametrize(
    ("shape", "decay"),
    [
        ("linear", lambda f: 1 - f),
        ("sqrt", lambda f: 1 - math.sqrt(f)),
        ("cosine", lambda f: (1 + math.cos(math.pi * f)) / 2),
    ],
)
def test_wsd_decay_shapes(shape, decay):
    config = wsd(peak_lr=1.0, train_steps=150, warmup_steps=10, decay_steps=100, decay_shape=shape, final_lr_ratio=0.25)
    expected = [0.25 + 0.75 * decay(i / 100) for i in range(101)]
    np.testing.assert_allclose(values(config, list(range(50, 151))), expected, rtol=2e-6)


def test_cosine_equals_optax():
    ours = values(cosine(peak_lr=3e-4, train_steps=500, warmup_steps=50, final_lr_ratio=0.1), list(range(600)))
    optax_schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-4, 50, 500, end_value=3e-5)
    np.testing.assert_allclose(ours, [optax_schedule(s) for s in range(600)], rtol=1e-5, atol=1e-10)


def test_exponential_phase_equals_optax():
    config = ScheduleConfig(phases=(Phase(steps=100, end=0.01, shape="exponential", start=1.0),))
    reference = optax.exponential_decay(1.0, transition_steps=100, decay_rate=0.01, end_value=0.01)
    np.testing.assert_allclose(values(config, list(range(150))), [reference(s) for s in range(150)], rtol=1e-5)


def test_mimo_reaches_the_papers_values_at_the_papers_tokens():
    tokens_per_step = 2560 * 8192
    assert tokens_per_step == 640 * 32768
    config = mimo(train_steps=1134110)
    assert config.total_steps == 1134110
    at = {
        42e9: 0.5 * 1.07e-4,
        84e9: 1.07e-4,
        10.284e12: 1.07e-4,
        (10.284 + 3.75) * 1e12: (1.07e-4 + 3e-5) / 2,
        17.784e12: 3e-5,
        (17.784 + 5.5) * 1e12: 3e-5,
        (17.784 + 5.75) * 1e12: 2e-5,
        (17.784 + 6) * 1e12: 1e-5,
    }
    steps = [tokens / tokens_per_step for tokens in at]
    # Steps are whole numbers: half a step each for the phase and for the point asked, of 2002 steps in 42B tokens.
    np.testing.assert_allclose(values(config, [round(s) for s in steps]), list(at.values()), rtol=1 / 2002)
    # In proportion: a run a thousand times shorter, of whose 4 steps of warm-up the middle is the second.
    short = values(mimo(train_steps=1134), [2, *(round(s / 1000) for s in steps[1:])])
    np.testing.assert_allclose(short, list(at.values()), rtol=0.01)


def test_later_stage_warms_up_again_from_its_first_step():
    stage = ScheduleConfig(
        phases=(Phase(steps=10, end=1.0, shape="linear"), Phase(steps=90, end=0.0, shape="linear")), first_step=1000
    )
    np.testing.assert_allclose(values(stage, [0, 1000, 1005, 1010, 1055, 1100, 2000]), [0, 0, 0.5, 1, 0.5, 0, 0])
    one_run = ScheduleConfig(
        phases=(
            Phase(steps=5, end=1.0),
            Phase(steps=5, end=0.1, shape="linear"),
            Phase(steps=10, end=0.5, shape="linear", start=0.0),
        )
    )
    np.testing.assert_allclose(values(one_run, [0, 4, 5, 9, 10, 15, 20]), [1, 1, 1, 0.28, 0, 0.25, 0.5], rtol=1e-6)


def test_steps_stay_distinct_in_a_long_run():
    config = wsd(peak_lr=1.0, train_steps=40_000_000, warmup_steps=10, decay_steps=1000, decay_shape="linear")
    decay = values(config, list(range(39_999_000, 40_000_000)))
    assert (np.diff(decay) < 0).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: wsd(peak_lr=1.0, train_steps=10, warmup_steps=8, decay_steps=4), r"wsd.train_steps = 10: .*8 \+ 4"),
        (lambda: wsd(peak_lr="1", train_steps=10, warmup_steps=8, decay_steps=4), r"wsd.peak_lr = '1'"),
        (lambda: wsd(peak_lr=-1.0, train_steps=10, warmup_steps=1, decay_steps=4), r"wsd.peak_lr = -1.0: .*greater"),
        (
            lambda: wsd(peak_lr=1.0, train_steps=10, warmup_steps=1, decay_steps=4, decay_shape="exp"),
            r"wsd.decay_shape = 'exp': .*'exponential'",
        ),
        (
            lambda: wsd(peak_lr=1.0, train_steps=10, warmup_steps=1, decay_steps=4, final_lr_ratio=0.0),
            r"Phase.end = 0.0: an exponential phase",
        ),
        (lambda: cosine(peak_lr=1.0, train_steps=10, warmup_steps=11), r"cosine.warmup_steps = 11"),
        (lambda: ScheduleConfig(phases=()), r"ScheduleConfig.phases has no steps"),
    ],
)
def test_impossible_schedules_are_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
