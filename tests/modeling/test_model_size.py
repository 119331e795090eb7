"""Counts against published totals, against real arrays, and against XLA's own count of operations."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.modeling import block
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.decoder import bind, init_params
from cpm_jax.modeling.model_size import count_params, train_flops_per_token, train_state_bytes, visible_keys

GIN_CONFIGS = Path(__file__).resolve().parents[2] / "gin_configs"
ReadModel = Callable[[str, str], ModelConfig]
SIZES = sorted(path.stem for path in (GIN_CONFIGS / "size").glob("*.gin"))


# Totals as published: model cards and reports to the digits they give; that of SmolLM2 is exact.
@pytest.mark.parametrize(
    ("arch", "size", "published", "tolerance"),
    [
        ("minicpm4", "minicpm4_0p5b", 434e6, 0.5e6),
        ("minicpm4", "minicpm4_8b", 8.19e9, 0.01e9),
        ("minicpm4_128k", "minicpm4_8b", 8.19e9, 0.01e9),
        ("mimo", "mimo_7b", 7.8e9, 0.05e9),
        ("internlm2", "internlm2_1p8b", 1.89e9, 0.005e9),
        ("internlm2", "internlm2_7b", 7.74e9, 0.005e9),
        ("internlm2", "internlm2_20b", 19.86e9, 0.005e9),
        ("llama", "smollm2_135m", 134_515_008, 0),
    ],
)
def test_published_totals(read_model: ReadModel, arch: str, size: str, published: float, tolerance: float) -> None:
    assert abs(count_params(read_model(arch, size)).total - published) <= tolerance


def test_mimo_without_its_mtp_layer_is_7_6b(read_model: ReadModel) -> None:
    counts = count_params(read_model("mimo", "mimo_7b"))
    assert round((counts.total - counts.mtp) / 1e9, 1) == 7.6


@pytest.mark.parametrize(
    ("size", "named"),
    [("2m", 1.6e6), ("5m", 5e6), ("15m", 15e6), ("36m", 36e6), ("150m", 150e6), ("360m", 360e6), ("700m", 700e6)],
)
def test_small_family_has_the_size_of_its_name_without_embeddings(
    read_model: ReadModel, size: str, named: float
) -> None:
    assert abs(count_params(read_model("minicpm4", size)).non_embedding / named - 1) < 0.02


def test_every_size_is_tested() -> None:
    published = {"minicpm4_0p5b", "minicpm4_8b", "mimo_7b", "internlm2_1p8b", "internlm2_7b", "internlm2_20b"}
    assert set(SIZES) == published | {"smollm2_135m", "2m", "5m", "15m", "36m", "150m", "360m", "700m"}


@pytest.mark.parametrize("tied", [True, False])
def test_counts_equal_the_real_tree(tiny_config: ModelConfig, tied: bool) -> None:
    config = dataclasses.replace(tiny_config, tie_word_embeddings=tied, num_nextn_predict_layers=2, attention_bias=True)
    params = init_params(config, jax.random.key(0))
    counts = count_params(config)
    assert counts.total == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert counts.mtp == sum(leaf.size for leaf in jax.tree.leaves(params["mtp_layers"]))
    assert counts.embedding == config.vocab_size * config.d_model * (1 if tied else 2)
    state = train_state_bytes(config)
    assert state.params == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert state.total == 4 * state.params


def test_flops_are_those_of_the_compiled_program(tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA counts the whole T×T of the reference attention, hence a second causal half; the rest is small change.

    The reference, because XLA counts the body of a loop once and the blockwise attention is made of loops.
    """
    reference = functools.partial(block.dot_product_attention, implementation="reference")
    monkeypatch.setattr(block, "dot_product_attention", reference)
    config = dataclasses.replace(
        tiny_config, vocab_size=2048, d_model=256, d_ff=1024, num_nextn_predict_layers=1, scan_layers=False
    )
    tokens = jnp.zeros((1, 256), jnp.int32)
    positions, segment_ids = jnp.arange(256)[None], jnp.ones_like(tokens)

    def loss(params: dict) -> jax.Array:
        model = bind(config, params)
        hidden = model(tokens, positions, segment_ids)
        ahead = model.mtp(hidden, tokens, positions, segment_ids, 0)
        return (model.logits(hidden) ** 2).sum() + (model.logits(ahead) ** 2).sum()

    params = init_params(config, jax.random.key(0))
    counted = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"] / tokens.size
    masked_half = 6 * 3 * config.num_heads * config.head_size * 256
    assert counted == pytest.approx(train_flops_per_token(config, 256) + masked_half, rel=0.02)


def test_sparse_attention_needs_its_blocks_and_their_choice() -> None:
    """96 blocks of 64 keys of 32K tokens, and 2·N·H for the kernels that lie before a query: no backward pass."""
    dense = ModelConfig(
        vocab_size=128, num_layers=3, d_model=64, num_heads=4, num_kv_heads=2, d_ff=128, max_position_embeddings=32_768
    )
    sparse = dataclasses.replace(dense, sparse_config=SparseConfig())
    positions = np.arange(32_768)
    visible = np.minimum(positions + 0.5, 6144).mean()
    kernels = positions.mean() * (1 / 16 + 1 / 64)
    assert visible_keys(sparse, 32_768) == pytest.approx(visible, rel=1e-6)
    difference = train_flops_per_token(dense, 32_768) - train_flops_per_token(sparse, 32_768)
    assert difference == pytest.approx(3 * 64 * (12 * (16_384 - visible) - 2 * kernels), rel=1e-4)
    # Exact scores are normalised by the fine kernels.
    exact = dataclasses.replace(dense, sparse_config=SparseConfig(lse_approximation=False))
    more = train_flops_per_token(exact, 32_768) - train_flops_per_token(sparse, 32_768)
    assert more == pytest.approx(3 * 64 * 2 * positions.mean() * (1 / 16 - 1 / 64), rel=1e-4)
    assert train_flops_per_token(sparse, 8192) == train_flops_per_token(dense, 8192)
