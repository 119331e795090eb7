"""A rotated and a smoothed model compute what they computed before."""

import dataclasses

import jax
import numpy as np
import pytest
import scipy.linalg

from cpm_jax.common.config import ConfigError
from cpm_jax.modeling.decoder import init_params
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.layer import GROUPS, embed, run_layer
from cpm_jax.quantization.rotation import orthogonal_matrix, rotate
from cpm_jax.quantization.smoothing import search_scales, smooth_layer


@pytest.mark.parametrize("size", [1, 64, 96, 576])
def test_the_matrix_is_orthogonal(size):
    matrix = orthogonal_matrix(size, seed=3)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)


def test_powers_of_two_are_hadamard_and_others_have_an_odd_block():
    hadamard = scipy.linalg.hadamard(64) / 8
    np.testing.assert_allclose(np.abs(orthogonal_matrix(64, seed=0)), np.abs(hadamard))
    np.testing.assert_array_equal(orthogonal_matrix(64, 0) * np.sign(orthogonal_matrix(64, 0)[:, :1]), hadamard)
    blocks = np.abs(orthogonal_matrix(96, seed=0)).reshape(32, 3, 32, 3)
    np.testing.assert_allclose(blocks, np.broadcast_to(blocks[:1, :, :1], blocks.shape), atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "attention_bias": False, "scan_layers": False}])
def test_a_rotated_model_has_the_same_logits(changes, config, params, tokens, logits):
    if changes:
        config = dataclasses.replace(config, **changes)
        params = jax.tree.map(lambda leaf: leaf * 1.1, init_params(config, jax.random.key(5)))
    before = logits(config, params, tokens)
    rotated, rotated_config = rotate(params, config, seed=0)
    assert not rotated_config.tie_word_embeddings
    after = logits(rotated_config, rotated, tokens)
    assert float(abs(after - before).max()) < 1e-4 * float(abs(before).max())
    # It is another model all the same.
    ours, theirs = params["layers"]["mlp"]["up_proj"]["kernel"], rotated["layers"]["mlp"]["up_proj"]["kernel"]
    assert np.abs(np.asarray(ours) - theirs).max() > 0.1


def test_a_massive_channel_is_spread(config, params, tokens):
    table = params["embed_tokens"]["embedding"].at[:, 7].set(30.0)
    massive = {**params, "embed_tokens": {"embedding": table}}
    rotated, rotated_config = rotate(massive, config, seed=0)
    before = embed(config, table, tokens)
    after = embed(rotated_config, rotated["embed_tokens"]["embedding"], tokens)
    assert float(abs(after).max()) < 0.5 * float(abs(before).max())
    np.testing.assert_allclose((after**2).sum(-1), (before**2).sum(-1), rtol=1e-4)


def test_mtp_layers_cannot_follow(config, params):
    with pytest.raises(ConfigError, match="num_nextn_predict_layers = 1: MTP layers read the scaled output"):
        rotate(params, dataclasses.replace(config, num_nextn_predict_layers=1), 0)


def test_a_smoothed_model_has_the_same_logits(config, params, tokens, logits):
    """With scales that matter: the inputs of each group are made to differ."""
    layers = jax.tree.map(np.array, params["layers"])
    for name in ("input_layernorm", "post_attention_layernorm"):
        layers[name]["scale"] *= np.exp(np.random.default_rng(0).standard_normal(config.d_model)).astype(np.float32)
    spread = {**params, "layers": layers}
    before = logits(config, spread, tokens)
    stream = embed(config, params["embed_tokens"]["embedding"], tokens)
    smoothed = jax.tree.map(np.array, layers)
    exponents = []
    for index in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, index=index: leaf[index], smoothed)
        on_device = jax.tree.map(jax.numpy.array, layer)
        stream, statistics = run_layer(config, on_device, stream, groups=(0, 1, 2, 3))
        exponents.append(smooth_layer(layer, config, QuantizationConfig(group_size=32), statistics))
    after = logits(config, {**spread, "layers": smoothed}, tokens)
    assert float(abs(after - before).max()) < 1e-4 * float(abs(before).max())
    assert all(set(found) == {names[0] for names in GROUPS} for found in exponents)
    assert max(max(found.values()) for found in exponents) > 0
    assert np.abs(smoothed["mlp"]["gate_proj"]["kernel"] / layers["mlp"]["gate_proj"]["kernel"] - 1).max() > 0.1


def test_the_search_finds_the_exponent_with_the_least_error():
    """By the outputs themselves, for inputs of which a few are large."""
    rng = np.random.default_rng(1)
    inputs = (rng.standard_normal((400, 64)) * np.where(rng.random(64) < 0.1, 30.0, 1.0)).astype(np.float32)
    kernels = [rng.standard_normal((64, 16)).astype(np.float32) for _ in range(2)]
    magnitudes = np.abs(inputs).mean(0)
    found, exponent = search_scales(
        kernels, inputs.T @ inputs, jax.numpy.asarray(magnitudes), group_size=32, bits=4, steps=10
    )
    kernel = np.concatenate(kernels, axis=1)

    def error(power):
        scales = magnitudes**power
        scaled = (kernel * scales[:, None]).reshape(2, 32, -1)
        steps = (2 * np.abs(scaled).max(1, keepdims=True) / 15).astype(np.float16).astype(np.float32)
        weights = (np.clip(np.round(scaled / steps), -8, 7) * steps).reshape(64, -1) / scales[:, None]
        return np.sum((inputs @ (weights - kernel)) ** 2)

    errors = [error(step / 10) for step in range(10)]
    # The scales' normalisation moves the float16 rounding of the steps, so near ties may fall either way.
    assert errors[round(10 * float(exponent))] < 1.02 * min(errors)
    assert min(errors) < 0.7 * errors[0]
    np.testing.assert_allclose(np.ptp(np.log(found) - float(exponent) * np.log(magnitudes)), 0, atol=1e-4)
