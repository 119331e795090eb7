"""Kernels in int8 against the same product in float64, and against a model of the weights that they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.inference.decode_loop import DecodeState, extend
from cpm_jax.inference.generate import unstack_on_cpu
from cpm_jax.inference.sampling import SamplingConfig, sequence_keys
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, bind, init_params
from cpm_jax.modeling.int8 import Int8Kernel, int8_matmul, quantize_kernel, quantize_layers
from cpm_jax.modeling.kv_cache import init_cache


def dequantized(leaf: jax.Array | Int8Kernel) -> jax.Array:
    if not isinstance(leaf, Int8Kernel):
        return leaf
    return leaf.codes.astype(jnp.float32) * leaf.scales[..., None, :].astype(jnp.float32)


def plain(params: Params) -> Params:
    """The parameters that codes and scales stand for, in float32: exact, a code has 8 bits and a scale as many."""
    return jax.tree.map(dequantized, params, is_leaf=lambda leaf: isinstance(leaf, Int8Kernel))


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(tiny_config, attention_bias=True)


@pytest.fixture
def params(config: ModelConfig) -> Params:
    return init_params(config, jax.random.key(0))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2.0**-22), ("bfloat16", 2.0**-8)])
def test_the_product_is_that_of_the_weights_that_the_codes_stand_for(dtype: str, bound: float) -> None:
    rng = np.random.default_rng(0)
    kernel = quantize_kernel(jnp.asarray(rng.standard_normal((96, 40)) * np.logspace(-3, 3, 40), jnp.float32))
    x = jnp.asarray(rng.standard_normal((5, 3, 96)), dtype)
    out = int8_matmul(x, kernel)
    assert out.dtype == dtype
    weights = np.asarray(dequantized(kernel), np.float64)
    expected = np.asarray(x, np.float64) @ weights
    # One rounding of the result, and float32's of the sums.
    largest = np.abs(np.asarray(x, np.float64)) @ np.abs(weights)
    assert (np.abs(np.asarray(out, np.float64) - expected) <= bound * np.abs(expected) + 2.0**-20 * largest).all()


def test_a_model_in_int8_is_the_model_of_its_codes(config: ModelConfig, params: Params) -> None:
    quantized = quantize_layers(config, params)
    assert isinstance(quantized["layers"]["mlp"]["down_proj"]["kernel"], Int8Kernel)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    positions = np.broadcast_to(np.arange(9), tokens.shape)

    @jax.jit
    def logits(params: Params) -> jax.Array:
        model = bind(config, params)
        return model.logits(model(tokens, positions, jnp.ones_like(tokens)))

    @jax.jit
    def decoded(params: Params) -> jax.Array:
        model = bind(config, params)
        return model.logits(model.decode(tokens, positions, init_cache(config, 2, 16))[0])

    expected = logits(plain(quantized))
    np.testing.assert_allclose(logits(quantized), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(decoded(unstack_on_cpu(quantized)), expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - logits(params)).max() > 1e-3  # it is not the model of the weights before


def test_bytes_of_the_layers(config: ModelConfig, params: Params) -> None:
    def kernel_bytes(params: Params) -> int:
        flat = jax.tree_util.tree_leaves_with_path(params["layers"])
        return sum(leaf.nbytes for path, leaf in flat if "kernel" in jax.tree_util.keystr(path))

    outputs = config.num_layers * (64 + 2 * 32 + 64 + 2 * 128 + 64)  # q, k and v, o, gate and up, down
    assert kernel_bytes(quantize_layers(config, params)) == kernel_bytes(params) // 4 + 2 * outputs


def test_a_decoding_loop_holds_no_kernels_in_float(config: ModelConfig) -> None:
    """Codes are the same for every token, but what they stand for is not computed before the loop and kept."""
    config = dataclasses.replace(config, num_layers=4, d_model=256, d_ff=1024)

    def arguments() -> tuple[Params, DecodeState]:
        params = unstack_on_cpu(quantize_layers(config, init_params(config, jax.random.key(0))))
        row, cache = jnp.zeros(1, jnp.int32), init_cache(config, 1, 64)
        return params, DecodeState(cache, row, row, row, row > 0, sequence_keys(0, row), None)

    params, state = jax.eval_shape(arguments)
    settings = {"num_tokens": 8, "config": config, "sampling": SamplingConfig(temperature=0.0)}
    program = extend.lower(params, state, jax.ShapeDtypeStruct((1,), jnp.int32), **settings).compile()
    codes = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]) if leaf.dtype == jnp.int8)
    assert program.memory_analysis().temp_size_in_bytes < 4 * codes / 2


def test_a_model_that_multiplies_in_fp8_is_refused(config: ModelConfig, params: Params) -> None:
    with pytest.raises(ConfigError, match="weight_dtype = 'int8': the model multiplies in FP8"):
        quantize_layers(dataclasses.replace(config, fp8=True), params)
