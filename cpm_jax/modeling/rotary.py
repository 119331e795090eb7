"""Rotary position embedding: plain RoPE (arXiv 2104.09864) and LongRoPE (arXiv 2402.13753)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cpm_jax.modeling.config import ModelConfig


class Rotation(NamedTuple):
    """Cosines and sines to rotate queries and keys by, f32 [B, T, H/2], times the attention factor."""

    cos: Float[Array, "B T H/2"]
    sin: Float[Array, "B T H/2"]


def inverse_frequencies(config: ModelConfig, length: int) -> np.ndarray:
    """Radians per position of each pair of dimensions, float64 [H/2].

    Args:
        config: gives theta, head_dim and the LongRoPE factors.
        length: sequence length that decides between LongRoPE's short and long factors. It is the static length (of
            the row, or of the cache when decoding), so that all keys that meet in one softmax are rotated alike.
    """
    rope, half = config.rope, config.head_size // 2
    plain = rope.rope_theta ** -(np.arange(half, dtype=np.float64) / half)
    if not rope.is_longrope:
        return plain
    return plain / np.asarray(
        rope.long_factor if length > rope.original_max_position_embeddings else rope.short_factor, np.float64
    )


def attention_factor(config: ModelConfig) -> float:
    """LongRoPE's factor on cos and sin: sqrt(1 + ln(s) / ln(original)) with s = max_position / original, at least 1."""
    rope = config.rope
    if rope.attention_factor is not None:
        return rope.attention_factor
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
