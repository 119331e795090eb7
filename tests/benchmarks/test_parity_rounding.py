"""Activations are rounded as the gguf package rounds the same numbers, and nothing else of the decoder changes."""

import dataclasses

import gguf
import jax
import numpy as np
import pytest

from benchmarks import parity_rounding
from benchmarks.parity_rounding import round_activations, rounded_logits_of
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import init_params
from export.hf_check import logits_of

CONFIG = ModelConfig(
    vocab_size=320,
    num_layers=2,
    d_model=256,
    num_heads=4,
    num_kv_heads=2,
    d_ff=512,
    max_position_embeddings=64,
    initializer_range=0.1,
    scale_emb=12.0,
    dim_model_base=128,
    dtype="float32",
)
IDS = list(range(5, 45))


def test_q8_0_is_that_of_gguf():
    x = np.random.default_rng(0).standard_t(2, (7, 512)).astype(np.float32)
    x[3, 32:64] = 0
    packed = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(round_activations(x, "Q8_0"), expected)


def test_blocks_of_256():
    x = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    found = np.asarray(round_activations(x, "TQ2_0")).reshape(3, 2, 256)
    steps = np.abs(x.reshape(3, 2, 256)).max(-1, keepdims=True) / 127
    assert np.abs(found - x.reshape(3, 2, 256)).max() > 0.4 * steps.min()
    assert (np.abs(found - x.reshape(3, 2, 256)) <= 0.5001 * steps).all()
    np.testing.assert_allclose(found / steps, np.round(found / steps), atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gguf_type", ["Q8_0", "TQ2_0"])
def test_logits(gguf_type, tied, monkeypatch):
    """A little off what is exact, as 8 bits are; without rounding they are the decoder's, which stays as it is."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    params = init_params(config, jax.random.key(0))
    exact = logits_of(config, params, IDS)
    error = np.abs(rounded_logits_of(config, params, IDS, gguf_type) - exact).max() / np.abs(exact).max()
    assert 1e-3 < error < 0.1
    np.testing.assert_array_equal(logits_of(config, params, IDS), exact)
    jax.clear_caches()
    monkeypatch.setattr(parity_rounding, "round_activations", lambda x, gguf_type: x)
    found = rounded_logits_of(config, params, IDS, gguf_type)
    # The head of ternary files takes float16.
    assert np.abs(found - exact).max() / np.abs(exact).max() < (1e-5 if gguf_type == "Q8_0" else 1e-3)
