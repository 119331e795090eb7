"""A checkpoint saved on one mesh is restored on another bit for bit, and training goes on along the same curve."""

import dataclasses

import jax
import numpy as np
import pytest

from cpm_jax.checkpoints.manager import Checkpointer, restore_params
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.modeling import decoder
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import Phase, ScheduleConfig
from cpm_jax.training.train_state import abstract_state, init_state
from cpm_jax.training.train_step import make_train_step, put_batch

pytestmark = pytest.mark.multidevice

STEPS, SAVED = 6, 3
SCHEDULE = ScheduleConfig(phases=(Phase(steps=1, end=0.01),))


@pytest.fixture(scope="module")
def meshes():
    """Of 1, 4 and 8 devices."""
    return {
        "one": make_mesh(MeshConfig(), jax.devices()[:1]),
        "four": make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4]),
        "eight": make_mesh(MeshConfig(fsdp=4, tensor=2)),
        "eight_other": make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, context=2)),
    }


@pytest.fixture
def config(tiny_config):
    return dataclasses.replace(tiny_config, num_nextn_predict_layers=1)


def batch(step):
    rng = np.random.default_rng(step)
    rows, length = 8, 32
    tokens = rng.integers(0, 128, (rows, length + 1)).astype(np.int32)
    shape = (rows, length)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), shape),
        "source_ids": np.zeros(rows, np.int32),
    }


def train(config, mesh, state, first, last):
    """The state after step `last`, and the losses from step `first` on."""
    step, losses = make_train_step(config, optimizer(config), mesh=mesh), []
    for number in range(first, last):
        state, metrics = step(state, put_batch(batch(number), mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


def optimizer(config):
    return make_optimizer(OptimizerConfig(), SCHEDULE, config)


@pytest.mark.parametrize(
    ("saved_on", "restored_on"),
    [("eight", "one"), ("eight", "four"), ("eight", "eight_other"), ("one", "eight")],
)
def test_restored_on_another_mesh(config, meshes, tmp_path, saved_on, restored_on):
    state = init_state(config, optimizer(config), jax.random.key(0), meshes[saved_on])
    state, before = train(config, meshes[saved_on], state, 0, SAVED)
    saved = jax.tree.map(np.asarray, state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(SAVED, state, {"step": SAVED})
    _, unbroken = train(config, meshes[saved_on], state, SAVED, STEPS)

    abstract = abstract_state(config, optimizer(config), meshes[restored_on])
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore_latest(abstract).state
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    jax.tree.map(
        lambda leaf, wanted: pytest.fail("layout") if leaf.sharding != wanted.sharding else None, restored, abstract
    )
    _, after = train(config, meshes[restored_on], restored, SAVED, STEPS)
    np.testing.assert_allclose(after, unbroken, rtol=1e-5)
    assert len(set(before + after)) == STEPS  # it does learn something each step


def test_parameters_alone_onto_a_mesh(config, meshes, tmp_path):
    state = init_state(config, optimizer(config), jax.random.key(0))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, {"step": 0})
    params, _ = restore_params(tmp_path, decoder.abstract_params(config, meshes["eight"]))
    jax.tree.map(np.testing.assert_array_equal, params, state.params)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
