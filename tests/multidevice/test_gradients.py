"""Loss and gradients on 8 forced devices equal those of one, for every mesh axis alone and mixed.

Every mesh meets dense and packed rows, accumulation, MTP, scanned and unrolled layers, tied and untied heads, and more
parts than key and value heads; each combination is one compiled step, so that all of them take about two minutes.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import Phase, ScheduleConfig
from cpm_jax.training.train_state import init_state
from cpm_jax.training.train_step import make_train_step, put_batch

pytestmark = pytest.mark.multidevice

ROWS, LENGTH, VOCAB_SIZE = 16, 32, 128
OPTIMIZER = OptimizerConfig(max_grad_norm=None)

DENSE = ModelConfig(
    vocab_size=VOCAB_SIZE,
    num_layers=2,
    d_model=64,
    num_heads=8,
    num_kv_heads=8,
    d_ff=128,
    max_position_embeddings=256,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=32,
    initializer_range=0.1,
    dtype="float32",
)
# Two key and value heads: fewer than tensor parts where those are 4 or 8.
GROUPED = dataclasses.replace(DENSE, num_kv_heads=2, tie_word_embeddings=True, scan_layers=False)
MTP = dataclasses.replace(GROUPED, num_nextn_predict_layers=2, tie_word_embeddings=False, attention_bias=True)
# Of 8 blocks of 4 tokens a query sees 3.
SPARSE = SparseConfig(kernel_size=2, kernel_stride=1, block_size=4, window_size=4, topk=2, dense_len=-1)
# name: model, whether rows hold several documents and padding, micro-batches
CASES = {
    "dense": (DENSE, False, 1),
    "packed_unrolled_tied": (GROUPED, True, 1),
    "packed_accumulated_remat": (dataclasses.replace(DENSE, num_kv_heads=1, remat="full"), True, 2),
    "packed_sparse_remat": (dataclasses.replace(GROUPED, sparse_config=SPARSE, remat="full"), True, 1),
    "packed_mtp_bias": (MTP, True, 1),
    "packed_mtp_accumulated_tied": (
        dataclasses.replace(MTP, num_nextn_predict_layers=1, tie_word_embeddings=True, scan_layers=True),
        True,
        2,
    ),
}


def make_batch(packed):
    """Rows of one document each; or of two documents and padding, with different numbers of loss tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB_SIZE, (ROWS, LENGTH + 1)).astype(np.int32)
    at = np.arange(LENGTH)
    segments, starts = np.ones((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), int)
    if packed:
        ends = np.sort(rng.integers(4, LENGTH, (ROWS, 2)), axis=1)
        segments = np.where(at < ends[:, :1], 1, np.where(at < ends[:, 1:], 2, 0)).astype(np.int32)
        starts = np.where(segments == 2, ends[:, :1], 0)
    same = segments == np.pad(segments[:, 1:], ((0, 0), (0, 1)), constant_values=0 if packed else 1)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": same.astype(np.float32) * (segments > 0),
        "segment_ids": segments,
        "positions": (at - starts).astype(np.int32),
        "source_ids": (np.arange(ROWS) % 2).astype(np.int32),
    }


def loss_and_gradients(case, mesh=None):
    """Metrics of a step, and its gradients: Adam's first moment after one step is (1 - b1) times the gradient."""
    config, packed, num_microbatches = CASES[case]
    optimizer = make_optimizer(OPTIMIZER, ScheduleConfig(phases=(Phase(steps=1, end=0.01),)), config)
    state = init_state(config, optimizer, jax.random.key(0), mesh)
    # The unsharded step takes the batch at once: accumulation has to give the same.
    step = make_train_step(
        config, optimizer, num_sources=2, num_microbatches=num_microbatches if mesh else 1, mesh=mesh
    )
    batch = make_batch(packed)
    state, metrics = step(state, put_batch(batch, mesh) if mesh else batch)
    gradients = jax.tree.map(lambda moment: np.asarray(moment) / (1 - OPTIMIZER.b1), state.opt_state[1].mu)
    return {key: np.asarray(value) for key, value in metrics.items()}, gradients


on_one_device = functools.cache(loss_and_gradients)


def check(mesh_config, case):
    metrics, gradients = loss_and_gradients(case, make_mesh(mesh_config))
    expected_metrics, expected = on_one_device(case)
    for name in ("loss", "ntp_loss", "mtp_loss", "source_loss", "grad_norm", "tokens", "loss_tokens"):
        if name in expected_metrics:
            np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, err_msg=name)
    for path, gradient in jax.tree_util.tree_leaves_with_path(expected):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        got = functools.reduce(lambda tree, key: tree[key.key], path, gradients)
        largest = np.abs(gradient).max()
        assert largest > 0, name
        np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-5 * largest, err_msg=name)


MESHES = {
    "data": MeshConfig(data=8, fsdp=1),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(fsdp=1, tensor=8),
    "context": MeshConfig(fsdp=1, context=8),
    "data_fsdp_tensor": MeshConfig(data=2, fsdp=2, tensor=2),
    "fsdp_tensor_context": MeshConfig(fsdp=2, tensor=2, context=2),
    "data_tensor_context": MeshConfig(data=2, fsdp=1, tensor=2, context=2),
    "data_fsdp_context": MeshConfig(data=2, fsdp=2, context=2),
    "fsdp_tensor": MeshConfig(fsdp=2, tensor=4),
    "tensor_context": MeshConfig(fsdp=1, tensor=4, context=2),
}
ALONE = ("data", "fsdp", "tensor", "context")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("axis", ALONE)
def test_axis_alone(axis, case):
    check(MESHES[axis], case)


@pytest.mark.parametrize("mesh", [name for name in MESHES if name not in ALONE])
def test_axes_mixed(mesh):
    check(MESHES[mesh], "packed_unrolled_tied")


@pytest.mark.parametrize("mesh", ["data_fsdp_tensor", "fsdp_tensor_context", "tensor_context"])
def test_sparse_attention_on_axes_mixed(mesh):
    check(MESHES[mesh], "packed_sparse_remat")


@pytest.mark.parametrize("mesh", ["data_fsdp_tensor", "fsdp_tensor_context"])
def test_all_at_once(mesh):
    check(MESHES[mesh], "packed_mtp_accumulated_tied")
