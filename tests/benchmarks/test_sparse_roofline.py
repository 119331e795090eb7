"""What the roofline says beyond the kernels' own costs, and what it measures on a model."""

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from benchmarks import sparse_roofline
from benchmarks.results import Benchmark
from cpm_jax.planning.chips import CHIPS
from kernels_pallas.attention.arg_specs import ArgSpec as SplashSpec
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.block_sparse_attention.arg_specs import ARG_SPECS

LONG = ARG_SPECS["minicpm4_8b_128k"]


def test_splash_attentions_fused_backward_multiplies_the_causal_half_five_times():
    half = LONG.num_heads * LONG.head_dim * LONG.seq_len**2 / 2
    spec = SplashSpec(1, LONG.seq_len, LONG.num_heads, LONG.num_kv_heads, LONG.head_dim)
    fused = sparse_roofline.splash_fused_backward(spec)
    assert sum(kernel.flops for kernel in fused) == pytest.approx(10 * half, rel=0.01)


def test_a_kernel_takes_the_longer_of_its_two_times():
    chip = CHIPS["v5p"]
    assert sparse_roofline.seconds(pl.CostEstimate(459 * 10**12, 0, 0), chip) == 1
    assert sparse_roofline.seconds(pl.CostEstimate(459 * 10**12, 0, 2 * 2765 * 10**9), chip) == 2


def test_every_shape_chip_and_pass_has_a_row():
    bench = Benchmark("sparse_roofline", command="test")
    sparse_roofline.add_rows(bench, {32 * 1024: 1.0, 128 * 1024: 1.0})
    assert len(bench.rows) == 6 * 4 * (1 + len(CHIPS))
    goals = [row for row in bench.rows if row.goal]
    assert {row.goal for row in goals} == {1.5, 4.0}
    assert all("minicpm4_8b" in row.metric for row in goals)


def test_union_of_a_real_models_lists(tiny_loaded):
    budget = BlockSelection(kernel_size=4, kernel_stride=2, block_size=8, window_size=16, topk=2)
    everything = BlockSelection(kernel_size=4, kernel_stride=2, block_size=8, window_size=16, topk=64)
    tokens = np.arange(256) % tiny_loaded.config.vocab_size
    ratios, shares = sparse_roofline.overlaps(tiny_loaded, tokens, [budget, everything])
    assert ratios.shape == shares.shape == (tiny_loaded.config.num_layers, 2)
    # The last quarter's local blocks and the first one are chosen whatever the scores are: 8 + 1 + 1 of 32.
    assert (shares[:, 0] >= 10 / 32).all()
    np.testing.assert_array_equal(shares[:, 1], 1)
    # A tile of 32 queries spans four blocks: the local ones move on with them, five in all of at most four listed.
    assert (ratios[:, 0] >= 5 / 4).all()
    # Where every visible block is chosen, the union is what the tile's last query sees.
    visible = np.arange(128, 256) // 8 + 1
    np.testing.assert_allclose(ratios[:, 1], visible.reshape(-1, 32).max(axis=1).mean() / visible.mean(), rtol=1e-5)


@pytest.fixture
def tiny_loaded():
    from cpm_jax.inference.load import LoadedModel
    from cpm_jax.modeling.config import ModelConfig
    from cpm_jax.modeling.decoder import init_params

    config = ModelConfig(vocab_size=64, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=48)
    return LoadedModel(config, init_params(config, jax.random.key(0)), None, 0, None)
