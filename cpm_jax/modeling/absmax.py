"""Integers that stand for floating-point numbers: codes times a scale that the largest magnitude decides (absmax).

A scale is max|x| / (2^(bits-1) - 1), rounded to bfloat16, which takes two bytes, has the range of float32, and whose
product with a code is exact in float32. Codes are round(x / scale): at most half a scale from x, and exact for whole
multiples of it. GPTQ checkpoints take another scale, see `quantization.symmetric`.
"""

import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int8


def quantize_absmax(x: Float[Array, "..."], bits: int, axis: int) -> tuple[Int8[Array, "..."], BFloat16[Array, "..."]]:
    """Rounds values to codes with a scale shared along an axis.

    Args:
        x: the values.
        bits: 8 for codes of -127 … 127, 4 for -7 … 7.
        axis: along which values share a scale.

    Returns:
        Codes in the shape of `x`, and scales without that axis. Values that are not finite make their scale, and with
        it all that share it, not finite either.
    """
    x = x.astype(jnp.float32)
    scales = (jnp.max(jnp.abs(x), axis=axis) / (2 ** (bits - 1) - 1)).astype(jnp.bfloat16)
    scales = jnp.where(scales == 0, 1, scales)  # all zeros
    codes = jnp.round(x / jnp.expand_dims(scales, axis).astype(jnp.float32))
    return codes.astype(jnp.int8), scales


def pack_int4(codes: Int8[Array, "... H"]) -> Int8[Array, "... H/2"]:
    """Codes of 4 bits in half as many bytes: those of the first half of the last dimension in the low four bits."""
    low, high = jnp.split(codes, 2, axis=-1)
    return (low & 0xF) | (high << 4)


def unpack_int4(packed: Int8[Array, "... H/2"]) -> Int8[Array, "... H"]:
    """The codes that `pack_int4` packed."""
    return jnp.concatenate([(packed << 4) >> 4, packed >> 4], axis=-1)  # shifting to the right keeps the sign
