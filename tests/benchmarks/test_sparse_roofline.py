"""What the roofline counts, against closed forms and a loop over tiles."""

import math

import jax
import numpy as np
import pytest

from benchmarks import sparse_roofline
from benchmarks.results import Benchmark
from cpm_jax.planning.chips import CHIPS
from kernels_pallas.block_selection.arg_specs import ARG_SPECS as SELECTION_SPECS
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.block_sparse_attention.arg_specs import ARG_SPECS

LONG = ARG_SPECS["minicpm4_8b_128k"]


def test_splash_attention_multiplies_the_causal_half():
    half = LONG.num_heads * LONG.head_dim * LONG.seq_len**2 / 2
    assert sparse_roofline.splash_forward(LONG).flops == pytest.approx(4 * half, rel=0.01)
    assert sum(kernel.flops for kernel in sparse_roofline.splash_backward(LONG)) == pytest.approx(14 * half, rel=0.01)
    fused = sparse_roofline.splash_fused_backward(LONG)
    assert sum(kernel.flops for kernel in fused) == pytest.approx(10 * half, rel=0.01)


def test_selection_multiplies_fine_and_coarse_kernels():
    # One kernel in 16 tokens and one in 64, for the causal half; whole chunks beyond the queries make it a little more.
    half = LONG.num_heads * LONG.head_dim * LONG.seq_len**2 / 2
    scores, ranking = sparse_roofline.selection(LONG)
    assert scores.flops == pytest.approx(2 * half * (1 / 16 + 1 / 64), rel=0.1)
    assert scores.flops >= 2 * half * (1 / 16 + 1 / 64)
    assert ranking.flops == 0
    spec = SELECTION_SPECS["minicpm4_8b_128k"]
    q, k_compressed, k_coarse, _ = spec.abstract_args()
    block_scores = 4 * spec.num_kv_heads * spec.seq_len * spec.seq_len // BlockSelection().block_size
    once = sum(math.prod(x.shape) * 2 for x in (q, k_compressed, k_coarse)) + block_scores
    assert once < scores.hbm_bytes < 1.5 * once


@pytest.mark.parametrize("ratio", [1.0, 1.7])
def test_sparse_attention_reads_each_union_in_whole_groups(ratio):
    spec = ARG_SPECS["minicpm4_8b_32k"]
    blocks = 0
    for last in range(31, spec.seq_len, 32):
        visible = last // 64 + 1
        blocks += math.ceil(min(visible, ratio * min(visible, 96)) / 8) * 8
    keys = blocks * 64 * spec.num_kv_heads
    entries = 512 + 8
    tables = spec.num_kv_heads * spec.seq_len // 32 * 3 * entries * 4
    rows = spec.seq_len * spec.num_heads * (2 * 128 * 2 + 4)
    forward = sparse_roofline.sparse_forward(spec, ratio)
    assert forward.hbm_bytes == keys * 2 * 128 * 2 + tables + rows
    assert forward.flops == 4 * 32 * 16 * 128 * keys
    # Five products where the forward pass has two, in smaller groups and for one range of keys after another.
    (backward,) = sparse_roofline.sparse_backward(spec, ratio)
    assert 2.4 * forward.flops < backward.flops < 2.8 * forward.flops
    sums = spec.seq_len * spec.num_heads * 128 * 4
    assert backward.hbm_bytes > 2 * sums


def test_a_kernel_takes_the_longer_of_its_two_times():
    chip = CHIPS["v5p"]
    assert sparse_roofline.Kernel(459e12, 0).seconds(chip) == 1
    assert sparse_roofline.Kernel(459e12, 2 * 2.765e12).seconds(chip) == 2


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
    ratios = sparse_roofline.union_ratios(tiny_loaded, tokens, [budget, everything])
    assert ratios.shape == (tiny_loaded.config.num_layers, 2)
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
