"""Symmetric quantisation of a matrix [in, out] by groups of inputs: codes, scales and back.

A group's scale is 2 · max|w| / (2^bits - 1), rounded to float16, which is what checkpoints store. Codes are
round(w / scale), cut to -2^(bits-1) … 2^(bits-1) - 1: a weight at the positive end of its group is at 7.5 steps of 4
bits, and loses half a step. This is the convention of GPTQ checkpoints, with the zero at code 8.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and the largest code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def group_scales(kernel: Float[Array, "K N"], group_size: int, bits: int) -> Float[Array, "K/g N"]:
    """The scale of each group of `group_size` inputs and each output, a float16 value in float32.

    A group of zeros has the scale 1, so that its codes are 0.
    """
    groups = kernel.astype(jnp.float32).reshape(-1, group_size, kernel.shape[1])
    scales = jnp.max(jnp.abs(groups), axis=1) * (2.0 / (2**bits - 1))
    scales = scales.astype(jnp.float16).astype(jnp.float32)
    return jnp.where(scales == 0, 1.0, scales)


def round_to_codes(values: Float[Array, "*shape"], scales: Float[Array, "*shape"], bits: int) -> Float[Array, "*shape"]:
    """The nearest codes, as floating-point numbers."""
    return jnp.clip(jnp.round(values / scales), *code_range(bits))


@functools.partial(jax.jit, static_argnames=("group_size", "bits"))
def quantize_nearest(
    kernel: Float[Array, "K N"], *, group_size: int, bits: int
) -> tuple[Int8[Array, "K N"], Float[Array, "K/g N"]]:
    """Rounds to the nearest codes (RTN).

    Args:
        kernel: weights, inputs first.
        group_size: inputs that share a scale; divides K.
        bits: of a code.

    Returns:
        Codes and scales.
    """
    scales = group_scales(kernel, group_size, bits)
    codes = round_to_codes(kernel.astype(jnp.float32), jnp.repeat(scales, group_size, axis=0), bits)
    return codes.astype(jnp.int8), scales


def dequantize(codes: Int8[Array, "... K N"], scales: Float[Array, "... K/g N"]) -> Float[Array, "... K N"]:
    """The weights that codes and scales stand for, exact in float32; of one layer or of a stack, numpy or jax."""
    group_size = codes.shape[-2] // scales.shape[-2]
    return codes.astype("float32") * scales.repeat(group_size, axis=-2)
