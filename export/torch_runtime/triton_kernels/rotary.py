"""Rotary embedding of queries and keys in one pass, from where the projection wrote them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8  # of a program


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    cos_sin_ptr,
    q_out_ptr,
    k_out_ptr,
    q_stride,
    k_stride,
    length,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Some heads of one token; those of keys are counted after those of queries."""
    token = tl.program_id(0).to(tl.int64)
    head, pair = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, PAIRS)
    kv_head, within = head - NUM_HEADS, (pair < HALF)[None, :]
    of_q = (head < NUM_HEADS)[:, None] & within
    of_k = ((kv_head >= 0) & (kv_head < NUM_KV_HEADS))[:, None] & within
    q_place = head[:, None] * (2 * HALF) + pair[None, :]
    k_place = kv_head[:, None] * (2 * HALF) + pair[None, :]
    q, k = q_ptr + token * q_stride + q_place, k_ptr + token * k_stride + k_place
    # One of the two is 0.
    first = tl.load(q, mask=of_q, other=0.0).to(tl.float32) + tl.load(k, mask=of_k, other=0.0).to(tl.float32)
    second = tl.load(q + HALF, mask=of_q, other=0.0).to(tl.float32)
    second += tl.load(k + HALF, mask=of_k, other=0.0).to(tl.float32)
    angle = cos_sin_ptr + token % length * (2 * HALF) + pair
    cos = tl.load(angle, mask=pair < HALF, other=0.0)[None, :]
    sin = tl.load(angle + HALF, mask=pair < HALF, other=0.0)[None, :]
    low = (first * cos - second * sin).to(q_ptr.dtype.element_ty)
    high = (second * cos + first * sin).to(q_ptr.dtype.element_ty)
    q_out = q_out_ptr + token * (NUM_HEADS * 2 * HALF) + q_place
    k_out = k_out_ptr + token * (NUM_KV_HEADS * 2 * HALF) + k_place
    tl.store(q_out, low, mask=of_q)
    tl.store(q_out + HALF, high, mask=of_q)
    tl.store(k_out, low, mask=of_k)
    tl.store(k_out + HALF, high, mask=of_k)


def rotate(q: Tensor, k: Tensor, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rope.rotate`.

    Args:
        q: [B, T, N, H], whose heads lie together, as do the tokens of all sequences: a part of a projection's outputs.
        k: likewise [B, T, K, H].
        cos_sin: rows of `rope.rotary_table` [T, 2, H/2].

    Returns:
        Both, contiguous, of the type of q.
    """
    (batch, length, heads, size), kv_heads = q.shape, k.shape[2]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    rotary_kernel[(batch * length, triton.cdiv(heads + kv_heads, HEADS))](
        q,
        k,
        cos_sin,
        q_out,
        k_out,
        q.stride(1),
        k.stride(1),
        length,
        NUM_HEADS=heads,
        NUM_KV_HEADS=kv_heads,
        HALF=size // 2,
        PAIRS=triton.next_power_of_2(size // 2),
        HEADS=HEADS,
    )
    return q_out, k_out
