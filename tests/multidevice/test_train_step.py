"""Training and evaluation steps on a mesh of 8 devices, forced by XLA_FLAGS as `make test` does.

That loss and gradients equal those of one device is in test_gradients.py.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cpm_jax.common.config import ConfigError
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.modeling.config import SparseConfig
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import Phase, ScheduleConfig
from cpm_jax.training.train_state import abstract_state, init_state
from cpm_jax.training.train_step import (
    BATCH_AXES,
    batch_sharding,
    check_batch_size,
    make_eval_step,
    make_train_step,
    put_batch,
)

pytestmark = pytest.mark.multidevice


@pytest.fixture
def config(tiny_config):
    return dataclasses.replace(tiny_config, attention_bias=True)


@pytest.fixture
def optimizer(config):
    return make_optimizer(OptimizerConfig(), ScheduleConfig(phases=(Phase(steps=1, end=0.01),)), config)


@pytest.fixture
def batch():
    """Rows of two documents and padding, with different numbers of loss tokens."""
    rng = np.random.default_rng(0)
    rows, length = 16, 32
    tokens = rng.integers(0, 128, (rows, length + 1)).astype(np.int32)
    ends = np.sort(rng.integers(4, length, (rows, 2)), axis=1)
    at = np.arange(length)
    segments = np.where(at < ends[:, :1], 1, np.where(at < ends[:, 1:], 2, 0)).astype(np.int32)
    starts = np.where(segments == 2, ends[:, :1], 0)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": (segments == np.pad(segments[:, 1:], ((0, 0), (0, 1)))).astype(np.float32) * (segments > 0),
        "segment_ids": segments,
        "positions": (at - starts).astype(np.int32),
        "source_ids": (np.arange(rows) % 2).astype(np.int32),
    }


def assert_close(a, b):
    """To 1e-5 of the largest element of each array."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(x).max(initial=0)), a, b)


def test_there_are_eight_devices():
    assert jax.device_count() == 8, "set XLA_FLAGS=--xla_force_host_platform_device_count=8"


def test_the_state_keeps_its_layout(config, optimizer, batch):
    """So that the second step does not compile again."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = init_state(config, optimizer, jax.random.key(0), mesh)
    jax.tree.map(np.testing.assert_array_equal, init_state(config, optimizer, jax.random.key(0)).params, state.params)
    state, _ = make_train_step(config, optimizer, num_sources=2, mesh=mesh)(state, put_batch(batch, mesh))
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s.sharding, x.ndim) or pytest.fail(str(x.sharding)),
        state,
        abstract_state(config, optimizer, mesh),
    )


def collectives(config, optimizer, mesh, rows, length):
    """What the program of a training step exchanges, a line each."""
    shardings = batch_sharding(mesh)
    batch = {
        key: jax.ShapeDtypeStruct(
            (rows, length)[: len(axes)], np.float32 if key == "loss_weights" else np.int32, sharding=shardings[key]
        )
        for key, axes in BATCH_AXES.items()
    }
    step = make_train_step(config, optimizer, mesh=mesh)
    program = step.lower(abstract_state(config, optimizer, mesh), batch).compile().as_text()
    return [line for line in program.splitlines() if re.search(r"(all-(to-all|gather|reduce)|reduce-scatter)\(", line)]


def test_context_exchanges_tokens_for_heads(config, optimizer):
    """Attention needs whole rows: no device gathers them, nor computes what another does."""
    config = dataclasses.replace(config, num_kv_heads=4)  # with fewer, keys and values are gathered
    rows, length = 4, 64
    found = collectives(config, optimizer, make_mesh(MeshConfig(fsdp=2, context=4)), rows, length)
    exchanged = [line for line in found if "all-to-all(" in line and "self_attn" in line]
    assert len(exchanged) >= 8  # q, k, v and the output, and their gradients
    whole_rows = re.compile(rf"= \(?f32\[{rows // 2},{length},(\d+,)?\d+\]")
    assert [line for line in found if whole_rows.search(line) and "replica_groups={{0},{1}" not in line] == []


def test_queries_of_sparse_attention_stay_where_they_are(config, optimizer):
    """Only keys and values are gathered, and their gradients brought back; selection gathers keys besides."""
    sizes = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "window_size": 8, "topk": 2, "dense_len": -1}
    config = dataclasses.replace(config, sparse_config=SparseConfig(**sizes))
    assert config.num_kv_heads < config.num_heads
    found = collectives(config, optimizer, make_mesh(MeshConfig(fsdp=2, context=4)), 4, 64)
    assert [line for line in found if "all-to-all(" in line] == []
    whole = [line for line in found if "self_attn" in line and re.search(r"= \(?f32\[2,64,", line)]
    assert {re.search(r"f32\[2,64,(\d+),", line)[1] for line in whole} == {str(config.num_kv_heads)}
    assert len([line for line in whole if "all-gather(" in line]) >= 2


def test_parameters_and_moments_are_divided(config, optimizer):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    state = init_state(config, optimizer, jax.random.key(0), mesh)
    for tree in (state.params, state.opt_state[1].mu, state.opt_state[1].nu):
        kernel = tree["layers"]["mlp"]["up_proj"]["kernel"]
        assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
        assert kernel.addressable_shards[0].data.size == kernel.size // 8
    assert state.step.sharding.spec == PartitionSpec()


def test_evaluation_equals_that_of_one_device(config, optimizer, batch):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    alone = init_state(config, optimizer, jax.random.key(0))
    shared = init_state(config, optimizer, jax.random.key(0), mesh)
    assert_close(
        make_eval_step(config, num_sources=2)(alone.params, batch),
        make_eval_step(config, num_sources=2, mesh=mesh)(shared.params, put_batch(batch, mesh)),
    )


def test_sizes_that_do_not_fit_the_mesh_are_named(config, optimizer):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    odd = dataclasses.replace(config, vocab_size=130)
    with pytest.raises(ConfigError, match=r"embed_tokens/embedding.*'vocab' of size 130.*into 4 parts"):
        init_state(odd, optimizer, jax.random.key(0), mesh)
    with pytest.raises(ConfigError, match=r"batch_size = 6: must be a multiple of .* 2 x 1 x 2 = 4"):
        check_batch_size(6, 32, mesh, num_microbatches=2)
    with pytest.raises(ConfigError, match=r"seq_len = 33: must be a multiple of MeshConfig.context = 2"):
        check_batch_size(8, 33, make_mesh(MeshConfig(fsdp=4, context=2)))
