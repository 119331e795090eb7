"""GPTQ against the elimination that it is derived from, in float64, and in closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.gptq import inverse_factor, output_error, quantize_gptq, second_moments
from cpm_jax.quantization.symmetric import dequantize, group_scales, quantize_nearest

K, N, GROUP = 96, 24, 32


def problem(seed, tokens=300, massive=False):
    """Weights, and inputs that are correlated and of different sizes; `massive` first tokens in a few channels."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((K, K)) * np.exp(rng.standard_normal(K))
    inputs = rng.standard_normal((tokens, K)) @ mixing
    if massive:
        inputs[0, :3] *= 1000
    return rng.standard_normal((K, N)).astype(np.float32), inputs.astype(np.float32)


def eliminate(kernel, hessian, scales, damping, bits=4):
    """Algorithm 1 of the paper without its Cholesky factor: OBQ's update, and H⁻¹ with each input eliminated."""
    weights, limit = kernel.astype(np.float64), 1 << (bits - 1)
    inverse = np.linalg.inv(hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian)))
    quantized = np.zeros_like(weights)
    for i in range(len(weights)):
        step = scales[i // (len(weights) // len(scales))]
        quantized[i] = step * np.clip(np.round(weights[i] / step), -limit, limit - 1)
        weights -= np.outer(inverse[:, i], (weights[i] - quantized[i]) / inverse[i, i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return quantized


# 40 leaves a part of a block, 128 is more than there is.
@pytest.mark.parametrize(("group_size", "block_size"), [(GROUP, 32), (GROUP, 40), (K, 128)])
def test_equals_elimination_in_float64(group_size, block_size):
    kernel, inputs = problem(0)
    hessian = inputs.astype(np.float64).T @ inputs
    scales = np.asarray(group_scales(jnp.asarray(kernel), group_size, 4), np.float64)
    codes, ours = quantize_gptq(
        kernel, jnp.asarray(hessian, jnp.float32), group_size=group_size, bits=4, damping=0.01, block_size=block_size
    )
    np.testing.assert_array_equal(ours, scales)
    np.testing.assert_allclose(dequantize(codes, ours), eliminate(kernel, hessian, scales, 0.01), atol=1e-4)


@pytest.mark.parametrize("bits", [3, 8])
def test_other_widths_of_codes(bits):
    kernel, inputs = problem(1)
    hessian = inputs.astype(np.float64).T @ inputs
    codes, scales = quantize_gptq(kernel, jnp.asarray(hessian, jnp.float32), group_size=GROUP, bits=bits)
    expected = eliminate(kernel, hessian, np.asarray(scales, np.float64), 0.01, bits)
    np.testing.assert_allclose(dequantize(codes, scales), expected, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_the_error_on_the_calibration_data_is_below_that_of_rounding(seed):
    kernel, inputs = problem(seed)
    hessian = second_moments(jnp.asarray(inputs)[None], 0)
    errors = [
        np.sum((inputs @ (np.asarray(dequantize(*quantized)) - kernel)) ** 2)
        for quantized in (
            quantize_gptq(kernel, hessian, group_size=GROUP, bits=4),
            quantize_nearest(kernel, group_size=GROUP, bits=4),
        )
    ]
    assert errors[0] < 0.7 * errors[1]
    share = output_error(kernel, dequantize(*quantize_gptq(kernel, hessian, group_size=GROUP, bits=4)), hessian)
    np.testing.assert_allclose(share, errors[0] / np.sum((inputs @ kernel) ** 2), rtol=1e-3)


def test_independent_inputs_leave_nothing_to_make_up_for():
    kernel, _ = problem(3)
    codes, scales = quantize_gptq(kernel, jnp.eye(K), group_size=GROUP, bits=4)
    nearest, expected = quantize_nearest(kernel, group_size=GROUP, bits=4)
    np.testing.assert_array_equal(codes, nearest)
    np.testing.assert_array_equal(scales, expected)


def test_an_input_that_is_always_zero_gets_zero_weights():
    kernel, inputs = problem(4)
    inputs[:, [5, 70]] = 0
    codes, scales = quantize_gptq(kernel, second_moments(jnp.asarray(inputs)[None], 0), group_size=GROUP, bits=4)
    assert not np.asarray(codes)[[5, 70]].any()
    assert np.isfinite(scales).all()
    assert (np.abs(np.asarray(codes)).sum(axis=1) > 0).sum() == K - 2


def test_a_hessian_without_a_factor_is_said():
    kernel, _ = problem(3)
    hessian = jnp.eye(K).at[3, 3].set(-5.0)
    _, scales = quantize_gptq(kernel, hessian, group_size=GROUP, bits=4)
    assert np.isnan(scales).all()


def test_first_tokens_of_every_sequence_are_left_out():
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((3, 10, K)).astype(np.float32)
    valid = inputs[:, 4:].reshape(-1, K)
    np.testing.assert_allclose(second_moments(jnp.asarray(inputs), 4), valid.T @ valid, rtol=1e-4, atol=1e-4)


def test_massive_first_tokens_spoil_the_hessian_and_p_gptq_does_without_them():
    kernel, inputs = problem(6, massive=True)
    rest = inputs[4:].astype(np.float64)

    def error(skip):
        hessian = second_moments(jnp.asarray(inputs)[None], skip)
        weights = dequantize(*quantize_gptq(kernel, hessian, group_size=GROUP, bits=4))
        return np.sum((rest @ (np.asarray(weights, np.float64) - kernel)) ** 2)

    assert error(4) < 0.5 * error(0)


@pytest.mark.parametrize("massive", [False, True])
def test_the_factor_in_float32(massive):
    """With massive activations too: the damping, which grows with them, bounds the condition."""
    _, inputs = problem(7, massive=massive)
    hessian = inputs.astype(np.float64).T @ inputs
    ours = np.asarray(inverse_factor(jnp.asarray(hessian, jnp.float32), 0.01), np.float64)
    damped = hessian + 0.01 * np.mean(np.diag(hessian)) * np.eye(K)
    expected = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())
    assert not np.tril(ours, -1).any()


def test_codes_are_the_nearest_and_zeros_stay():
    kernel, _ = problem(8)
    kernel[:GROUP, 0] = 0
    codes, scales = quantize_nearest(kernel, group_size=GROUP, bits=4)
    assert not np.asarray(codes)[:GROUP, 0].any()
    assert (np.asarray(codes).min(), np.asarray(codes).max()) == (-8, 7)
    scales = np.asarray(scales)
    np.testing.assert_array_equal(scales, scales.astype(np.float16))
    steps = np.abs(np.asarray(dequantize(codes, scales)) - kernel) / np.repeat(scales, GROUP, axis=0)
    # Half a step, but for the positive end of a group, which the largest code falls short of; and float16's rounding.
    assert steps[np.asarray(codes) < 7].max() <= 0.5 + 8 * 2**-11
    assert steps.max() <= 0.5 + 8 * 2**-11


def test_a_group_size_that_does_not_divide():
    message = (
        r"QuantizationConfig.group_size = 128: does not divide the 576 inputs of self_attn/q_proj; choose 64, 32, 16, "
        r"-1"
    )
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig().group_size_of(576, "self_attn/q_proj")
    assert QuantizationConfig(group_size=-1).group_size_of(576, "x") == 576
    with pytest.raises(ConfigError, match="group_size = 0: must be positive, or -1"):
        QuantizationConfig(group_size=0)
