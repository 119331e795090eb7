"""Rotary position embedding: plain RoPE (arXiv 2104.09864) and its extensions to longer sequences.

LongRoPE is arXiv 2402.13753, YaRN arXiv 2309.00071; linear interpolation is arXiv 2306.15595; dynamic NTK and Llama 3's
rule are defined by their implementations in Hugging Face's models.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpm_jax.modeling.config import ModelConfig, RopeConfig


class Rotation(NamedTuple):
    """Cosines and sines to rotate queries and keys by, f32 [B, T, H/2], times the attention factor."""

    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]


def inverse_frequencies(config: ModelConfig, length: int) -> np.ndarray:
    """Radians per position of each pair of dimensions, float64 [H/2].

    Args:
        config: gives theta, head_dim and how they are changed for long sequences.
        length: sequence length that decides between LongRoPE's short and long factors, and the base of dynamic NTK. It
            is the static length (of the row, or of the cache when decoding), so that all keys that meet in one softmax
            are rotated alike.
    """
    rope, half = config.rope, config.head_size // 2
    exponents = np.arange(half, dtype=np.float64) / half
    plain = rope.rope_theta**-exponents
    if rope.is_longrope:
        is_long = length > rope.original_max_position_embeddings
        return plain / np.asarray(rope.long_factor if is_long else rope.short_factor, np.float64)
    match rope.scaling:
        case "linear":
            return plain / rope.factor
        case "dynamic":
            # theta·(s·T/T0 - (s - 1))^(H/(H-2)): the slowest frequency falls as if positions were interpolated.
            stretch = rope.factor * max(length / rope.original_max_position_embeddings, 1.0) - (rope.factor - 1)
            return (rope.rope_theta * stretch ** (half / (half - 1))) ** -exponents
        case "yarn":
            kept = 1 - _yarn_ramp(rope, half)
        case "llama3":
            turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
            kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        case "none":
            return plain
    kept = np.clip(kept, 0, 1)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn_ramp(rope: RopeConfig, half: int) -> np.ndarray:
    """Share of interpolation of each pair of dimensions, before clipping.

    Linear in the index of the pair, as in the code of YaRN's authors and everywhere since; the paper's equations
    (arXiv 2309.00071, §3.2) are linear in the number of turns.
    """

    def dimension(turns: float) -> float:
        """The pair of dimensions that turns so often within the original length."""
        wavelength = rope.original_max_position_embeddings / turns
        return half * math.log(wavelength / (2 * math.pi)) / math.log(rope.rope_theta)

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    return (np.arange(half) - low) / max(high - low, 0.001)


def attention_factor(config: ModelConfig) -> float:
    """The factor on cos and sin.

    LongRoPE: sqrt(1 + ln(s) / ln(original)) with s = max_position / original, at least 1. YaRN: 0.1 ln(factor) + 1.
    """
    rope = config.rope
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.scaling == "yarn":
        return 0.1 * math.log(rope.factor) + 1
    if not rope.is_longrope:
        return 1.0
    scale = config.max_position_embeddings / rope.original_max_position_embeddings
    return math.sqrt(1 + math.log(scale) / math.log(rope.original_max_position_embeddings)) if scale > 1 else 1.0


def rotation(config: ModelConfig, positions: Int[Array, "B T"], length: int) -> Rotation:
    """Cosines and sines of positions times frequencies, exact to float32 rounding at any position below 2^24.

    The product in float32 would be off by 0.008 radians at position 131,072, as 24 bits hold both the whole turns and
    the fraction. Here a frequency is a count of 2^-32 turns: the product with a position in uint32 wraps around just
    where a turn ends, so whole turns cost nothing, and float32 only sees the remaining fraction of a turn.
    """
    frequency = inverse_frequencies(config, length) * (2**32 / (2 * math.pi))
    whole = np.round(frequency)
    turns = positions[..., None].astype(jnp.uint32) * whole.astype(np.uint32)
    rest = positions[..., None].astype(jnp.float32) * (frequency - whole).astype(np.float32)
    # As int32 the fraction of a turn lies in [-1/2, 1/2), where float32 is finest around zero.
    angle = (jax.lax.bitcast_convert_type(turns, jnp.int32).astype(jnp.float32) + rest) * (2 * math.pi / 2**32)
    factor = attention_factor(config)
    return Rotation(jnp.cos(angle) * factor, jnp.sin(angle) * factor)


def apply_rotary(x: Float[Array, "B T N H"], angles: Rotation) -> Float[Array, "B T N H"]:
    """Rotates each pair (x[i], x[i + H/2]), the half-split layout of Hugging Face models, in float32."""
    cos, sin = angles.cos[:, :, None], angles.sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
