"""Trials spread over 8 devices are the trials that one device trains."""

import dataclasses

import jax
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.scaling.stacked_program import StackedProgram, Trial
from cpm_jax.training.losses import LossConfig
from cpm_jax.training.optimizer import OptimizerConfig
from cpm_jax.training.schedules import Phase, ScheduleConfig

pytestmark = pytest.mark.multidevice


def batch(seed, rows=2, length=16):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 128, (rows, length + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones((rows, length), np.float32),
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "source_ids": np.zeros(rows, np.int32),
    }


def train(trials, method, devices, shared_batch):
    program = StackedProgram(
        trials, steps=2, loss=LossConfig(), method=method, devices=devices, shared_batch=shared_batch
    )
    states = program.init()
    for number in range(2):
        if shared_batch:
            given = batch(number)
        else:
            each = [batch(10 * trial.seed + number) for trial in trials]
            given = program.put({key: np.stack([b[key] for b in each]) for key in each[0]})
        states, metrics = program.step(states, given)
    sums = program.evaluate(states.params, batch(99))
    assert len(states.step.sharding.device_set) == len(devices)
    return jax.device_get((states, metrics["loss"], sums))


@pytest.fixture
def trials(tiny_config):
    model = dataclasses.replace(tiny_config, num_layers=1)
    rates = np.geomspace(0.001, 0.1, 16)
    return [
        Trial(
            f"{i}", model, OptimizerConfig(weight_decay=0.01 * i), ScheduleConfig((Phase(1, float(rate)),)), seed=i % 3
        )
        for i, rate in enumerate(rates)
    ]


@pytest.mark.parametrize(("method", "shared_batch"), [("map", True), ("map", False), ("vmap", False)])
def test_spread_trials_equal_those_of_one_device(trials, method, shared_batch):
    one = train(trials, method, jax.devices()[:1], shared_batch)
    eight = train(trials, method, jax.devices(), shared_batch)
    if method == "map":
        jax.tree.map(np.testing.assert_array_equal, one, eight)
    else:  # matrix products of 2 trials at once and of 16 may sum in another order
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, eight)


def test_trials_that_do_not_divide_are_refused(trials):
    with pytest.raises(ConfigError, match="15 trials cannot be spread evenly over 8"):
        StackedProgram(trials[:15], steps=2, loss=LossConfig(), devices=jax.devices())
