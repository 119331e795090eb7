"""Codes and scales against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.modeling.absmax import pack_int4, quantize_absmax, unpack_int4


def dequantized(codes: jax.Array, scales: jax.Array, axis: int) -> np.ndarray:
    return np.asarray(codes, np.float64) * np.expand_dims(np.asarray(scales, np.float64), axis)


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("axis", [-1, 0])
def test_no_value_is_further_than_half_a_scale(bits: int, largest: int, axis: int) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((50, 40)) * 10.0 ** rng.integers(-6, 7, (50, 40))).astype(np.float32)
    codes, scales = quantize_absmax(jnp.asarray(x), bits, axis)
    assert codes.dtype == jnp.int8
    assert scales.dtype == jnp.bfloat16
    assert np.abs(np.asarray(codes)).max(axis).tolist() == [largest] * x.shape[1 + axis]
    # A scale is what the largest value asks for, up to bfloat16's rounding by 2^-9 of it.
    np.testing.assert_allclose(np.asarray(scales, np.float64), np.abs(x).max(axis) / largest, rtol=2.0**-8)
    # Float32's division may put a value that lies half way on the other side.
    bound = np.expand_dims(np.asarray(scales, np.float64) / 2, axis) * (1 + 2.0**-15)
    assert (np.abs(dequantized(codes, scales, axis) - x) <= bound).all()


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_whole_multiples_of_a_scale_are_exact(bits: int, largest: int) -> None:
    steps = np.random.default_rng(0).integers(-largest, largest + 1, (30, 16))
    steps[:, 3] = -largest
    x = steps * np.array([2.0**-20, 0.37109375, 129.0] * 10)[:, None]  # values of bfloat16
    codes, scales = quantize_absmax(jnp.asarray(x, jnp.float32), bits, -1)
    np.testing.assert_array_equal(codes, steps)
    np.testing.assert_array_equal(dequantized(codes, scales, -1), x)


def test_zeros_and_values_that_are_not_finite() -> None:
    x = jnp.array([[0.0, 0.0], [jnp.inf, 1.0], [1.0, jnp.nan], [1.0, -1.0]])
    codes, scales = quantize_absmax(x, 4, -1)
    np.testing.assert_array_equal(np.asarray(codes)[[0, 3]], [[0, 0], [7, -7]])
    assert np.isfinite(np.asarray(scales, np.float32)).tolist() == [True, False, False, True]


def test_every_pair_of_codes_takes_one_byte() -> None:
    pairs = np.stack(np.meshgrid(np.arange(-8, 8), np.arange(-8, 8)), -1).reshape(-1, 2)
    packed = np.asarray(pack_int4(jnp.asarray(pairs, jnp.int8)))
    assert packed.shape == (256, 1)
    np.testing.assert_array_equal(packed[:, 0].view(np.uint8), (pairs[:, 0] & 15) + 16 * (pairs[:, 1] & 15))
    np.testing.assert_array_equal(unpack_int4(jnp.asarray(packed)), pairs)
