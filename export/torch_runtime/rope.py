"""Rotary embedding: plain (arXiv 2104.09864), LongRoPE (arXiv 2402.13753), YaRN (arXiv 2309.00071), and others' rules.

Which frequencies a sequence is rotated at depends on the length of its cache, not on how much of it is filled: all keys
that meet in one softmax are rotated alike.
"""

import math

import torch
from torch import Tensor

from export.torch_runtime.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, length: int) -> Tensor:
    """Radians per position of each pair of dimensions, float64 [H/2].

    Args:
        rope: how they are changed for long sequences.
        head_dim: H.
        length: of the cache, in tokens; decides between LongRoPE's lists, and the base of dynamic NTK.
    """
    half, original = head_dim // 2, rope.original_max_position_embeddings
    exponents = torch.arange(half, dtype=torch.float64) / half
    plain = rope.theta**-exponents
    match rope.rope_type:
        case "linear":
            return plain / rope.factor
        case "longrope":
            factors = rope.long_factor if length > original else rope.short_factor
            return plain / torch.tensor(factors, dtype=torch.float64)
        case "dynamic":
            stretch = rope.factor * max(length / original, 1.0) - (rope.factor - 1)
            return (rope.theta * stretch ** (half / (half - 1))) ** -exponents
        case "yarn":
            kept = 1 - _yarn_ramp(rope, half)
        case "llama3":
            turns = original * plain / (2 * math.pi)
            kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        case _:
            return plain
    kept = kept.clamp(0, 1)
    return plain * kept + plain / rope.factor * (1 - kept)


def _yarn_ramp(rope: RopeConfig, half: int) -> Tensor:
    """Share of interpolation of each pair of dimensions before clipping, linear in the index of the pair."""

    def pair(turns: float) -> float:
        """The pair of dimensions that turns so often within the original length."""
        wavelength = rope.original_max_position_embeddings / turns
        return half * math.log(wavelength / (2 * math.pi)) / math.log(rope.theta)

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    return (torch.arange(half, dtype=torch.float64) - low) / max(high - low, 0.001)


def rotary_table(
    rope: RopeConfig, head_dim: int, length: int, device: torch.device | str, num_positions: int | None = None
) -> Tensor:
    """Cosines and sines of all positions, float32 [length, 2, H/2], times the attention factor.

    Angles are made in float64: in float32 those of position 131,072 would be off by 0.008 radians.

    Args:
        rope: how fast pairs of dimensions turn.
        head_dim: H.
        length: of the sequence, which decides about frequencies.
        device: where to.
        num_positions: how many there are, where they are not as many as the sequence has.
    """
    frequencies = inverse_frequencies(rope, head_dim, length)
    angles = torch.outer(torch.arange(num_positions or length, dtype=torch.float64), frequencies)
    table = torch.stack([angles.cos(), angles.sin()], dim=1) * rope.attention_factor
    return table.float().to(device)


def rotate(q: Tensor, k: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates each pair (x[i], x[i + H/2]) of queries and keys in float32.

    Args:
        q: [B, T, N, H].
        k: [B, T, K, H].
        cos_sin: rows of `rotary_table` [T, 2, H/2].

    Returns:
        Both, of the types that they came in.
    """
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]

    def rotated(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    return rotated(q), rotated(k)
