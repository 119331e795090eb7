"""Ternary weights against the formula in numpy and the straight-through estimator in PyTorch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cpm_jax.common.config import ConfigError
from cpm_jax.modeling.config import ModelConfig, TernaryConfig
from cpm_jax.modeling.decoder import Params, bind, init_params
from cpm_jax.modeling.kv_cache import init_cache
from cpm_jax.modeling.ternary import SMALLEST_SCALE, fake_quantize, materialize


def by_formula(kernel: np.ndarray, group_size: int) -> np.ndarray:
    """s = max(mean |w|, smallest), rounded to float16; clip(round(w / s), -1, 1) · s: matrix by matrix, in float64."""
    out = np.empty(kernel.shape)
    inputs, outputs = kernel.shape
    rows = inputs if group_size < 1 else group_size
    columns = outputs if group_size == 0 else 1
    for i in range(0, inputs, rows):
        for j in range(0, outputs, columns):
            group = kernel[i : i + rows, j : j + columns].astype(np.float64)
            scale = float(np.float16(max(np.abs(group).mean(), SMALLEST_SCALE)))
            out[i : i + rows, j : j + columns] = np.clip(np.round(group / scale), -1, 1) * scale
    return out


def kernel_of(inputs: int, outputs: int) -> np.ndarray:
    """Weights whose columns differ in size by orders of magnitude, so that another group's scale shows."""
    rng = np.random.default_rng(0)
    return (rng.normal(size=(inputs, outputs)) * np.exp(2 * rng.normal(size=(inputs, outputs)))).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "group_size"), [((48, 7), 16), ((48, 7), 48), ((33, 5), -1), ((33, 5), 0), ((6, 1), 1)]
)
def test_values_are_those_of_the_formula(shape, group_size):
    kernel = kernel_of(*shape)
    got = np.asarray(jax.jit(fake_quantize, static_argnums=1)(kernel, group_size))
    np.testing.assert_array_equal(got, by_formula(kernel, group_size).astype(np.float32))
    scales = np.unique(np.abs(got))
    np.testing.assert_array_equal(scales, scales.astype(np.float16))  # packed files lose nothing
    stack = np.stack([kernel, 3 * kernel])
    np.testing.assert_array_equal(
        fake_quantize(jnp.asarray(stack), group_size), [by_formula(layer, group_size) for layer in stack]
    )


def test_small_groups_and_zeros():
    kernel = np.zeros((8, 2), np.float32)
    np.testing.assert_array_equal(fake_quantize(jnp.asarray(kernel), 4), kernel)
    kernel[:4, 0] = 1e-9
    np.testing.assert_array_equal(fake_quantize(jnp.asarray(kernel), 4), 0)


def test_the_gradient_is_that_of_a_straight_through_estimator():
    kernel, rng = kernel_of(32, 6), np.random.default_rng(1)
    x, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 32), (5, 6)))
    y, vjp = jax.vjp(lambda x, w: x @ fake_quantize(w, 16), x, kernel)
    dx, dw = vjp(dy)

    their_x, weight = (torch.tensor(array, requires_grad=True) for array in (x, kernel))
    groups = weight.reshape(2, 16, 6)
    scale = groups.abs().mean(dim=1, keepdim=True).clamp(min=SMALLEST_SCALE).half().float()
    rounded = ((groups / scale).round().clamp(-1, 1) * scale).reshape(32, 6)
    theirs = their_x @ (weight + (rounded - weight).detach())
    theirs.backward(torch.tensor(dy))
    for ours, other in ((y, theirs.detach()), (dx, their_x.grad), (dw, weight.grad)):
        np.testing.assert_allclose(ours, other.numpy(), rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@functools.lru_cache
def make(config: ModelConfig) -> tuple[Params, ModelConfig, Params]:
    """Parameters, and the ordinary model that they stand for."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    return params, *materialize(config, params)


@pytest.fixture
def ternary(tiny_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(tiny_config, ternary=TernaryConfig(group_size=32), num_nextn_predict_layers=1)


def test_what_is_ternary(ternary):
    params, plain, rounded = make(ternary)
    assert plain == dataclasses.replace(ternary, ternary=None)
    assert materialize(plain, params) == (plain, params)
    changed = set()
    for (path, before), after in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(rounded), strict=True
    ):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        if not np.array_equal(before, after):
            changed.add(path[0].key + "/" + path[-2].key)
            expected = [by_formula(layer, 32) for layer in np.asarray(before)]
            # A mean that lies between two float16 numbers may be rounded either way.
            np.testing.assert_allclose(after, expected, rtol=2**-10)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert changed == {f"{stack}/{name}" for stack in ("layers", "mtp_layers") for name in linear} | {
        "mtp_layers/input_proj"
    }


def test_the_model_computes_with_the_rounded_values_with_and_without_a_cache(ternary):
    params, plain, rounded = make(ternary)
    tokens = np.random.default_rng(0).integers(0, ternary.vocab_size, (2, 9))
    positions = np.broadcast_to(np.arange(9), tokens.shape)
    ones = np.ones_like(tokens)

    full = jax.jit(lambda p: bind(ternary, p)(tokens, positions, ones))(params)
    as_plain = jax.jit(lambda p: bind(plain, p)(tokens, positions, ones))
    np.testing.assert_allclose(as_plain(rounded), full, rtol=1e-6, atol=1e-6)
    assert np.abs(as_plain(params) - full).max() > 0.1

    decode = jax.jit(lambda p, t, at, cache: bind(ternary, p).decode(t, at, cache))
    cache = init_cache(ternary, 2, 12)
    for span in (slice(0, 8), slice(8, 9)):
        hidden, cache = decode(params, tokens[:, span], positions[:, span], cache)
        np.testing.assert_allclose(hidden, full[:, span], rtol=1e-5, atol=2e-5)


def test_what_does_not_fit_is_refused_by_name(tiny_config):
    def refused(match: str, group_size: int = 32, **changes: object) -> None:
        with pytest.raises(ConfigError, match=match):
            dataclasses.replace(tiny_config, ternary=TernaryConfig(group_size=group_size), **changes)

    refused(r"group_size = 48: must divide .* d_model = 64, num_heads x head_dim = 64, d_ff = 128; -1 is", 48)
    refused(r"group_size = 64: .* does not divide d_ff = 96;", 64, d_ff=96)
    refused("group_size = -2: must be positive, 0 for one scale for each matrix, or -1", -2)
    refused("ModelConfig.fp8 = True: FP8 would round the scales", fp8=True)
    with pytest.raises(ValueError, match="group_size = 5: does not divide the 8 inputs"):
        fake_quantize(jnp.ones((8, 2)), 5)
    with pytest.raises(ConfigError, match=r"ModelConfig.ternary = .*a GGUF file holds weights as they are multiplied"):
        dataclasses.replace(tiny_config, ternary=TernaryConfig(group_size=32)).refuse_ternary("a GGUF file")
