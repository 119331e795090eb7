"""Attention over chosen blocks, or all: a program walks the list of one query and key/value head.

The heads that share keys are the rows of each product, filled up to what a tensor core takes (as in the published CUDA
kernels, infllmv2_cuda_impl). Where there are few queries, as in decoding, a list is divided among several programs, and
their parts are joined by their log-sum-exps (FlashDecoding).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from export.torch_runtime.triton_kernels.int4_matmul import LEAST, PROGRAMS, stages

MASKED = tl.constexpr(-1e30)  # below every score, and finite, so that differences are
DENSE_BLOCK = 64  # keys of a block where all are seen


@triton.jit
def sparse_attention_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    ids_ptr,
    positions_ptr,
    out_ptr,
    lse_ptr,
    scale,
    length,
    kv_heads,
    places,
    num_ids,
    ids_per_split,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    SIZE: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Rows of one query and key/value head, over the blocks of one split: their softmax's output and log-sum-exp."""
    # Neighbouring queries next to each other, as they read much the same blocks.
    t, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, kv_head = head // kv_heads, head % kv_heads
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    row_mask, dim_mask = rows < GROUP, dims < SIZE
    position = tl.load(positions_ptr + t)
    q_rows = ((batch * length + t) * kv_heads + kv_head) * GROUP + rows
    mask = row_mask[:, None] & dim_mask[None, :]
    q = tl.load(q_ptr + q_rows[:, None] * SIZE + dims[None, :], mask=mask, other=0.0)
    start = head.to(tl.int64) * places
    ids_ptr += (head * length + t) * num_ids
    maximum = tl.full((ROWS,), MASKED, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIMS), tl.float32)
    last = tl.minimum((split + 1) * ids_per_split, num_ids)
    for i in range(split * ids_per_split * TILES, last * TILES):
        block = tl.load(ids_ptr + i // TILES)
        slots = (tl.maximum(block, 0) * TILES + i % TILES) * TILE + tl.arange(0, TILE)
        visible = slots <= tl.where(block >= 0, position, -1)
        place = (start + slots)[:, None] * SIZE + dims[None, :]
        read = visible[:, None] & dim_mask[None, :]
        k = tl.load(keys_ptr + place, mask=read, other=0.0)
        v = tl.load(values_ptr + place, mask=read, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, MASKED)
        now = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.where(visible[None, :], tl.exp(scores - now[:, None]), 0.0)
        shrink = tl.exp(maximum - now)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = now
    seen = total > 0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    out_rows = split.to(tl.int64) * (tl.num_programs(1) * length * GROUP) + q_rows
    tl.store(out_ptr + out_rows[:, None] * SIZE + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    lse = tl.where(seen, maximum + tl.log(tl.where(seen, total, 1.0)), -float("inf"))
    tl.store(lse_ptr + out_rows, lse, mask=row_mask)


def tile(block_size: int, size: int) -> int:
    """Keys of a block that are in memory at once: whole blocks of 64 keys of 128 dimensions, and of others no more.

    Raises:
        ValueError: blocks that no tile divides.
    """
    keys = min(block_size & -block_size, max(LEAST, 64 * 128 // triton.next_power_of_2(max(size, 128))))
    if keys < LEAST:
        raise ValueError(
            f"block_size = {block_size}: the sparse kernel takes multiples of {LEAST}; use kernels 'torch'"
        )
    return keys


def sparse_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_ids: Tensor, positions: Tensor, scale: float, block_size: int
) -> Tensor:
    """As `infllm.attend_to_blocks`, of any number of queries.

    Args:
        q: [B, T, N, H].
        keys: [B, K, S, H], a part of a contiguous cache along S.
        values: likewise, of a cache of the same shape.
        block_ids: [B, K, T, I], -1 where a query has fewer.
        positions: of the queries [T].
        scale: factor on the scores.
        block_size: keys in a block, a multiple of 16.

    Returns:
        [B, T, N, H].

    Raises:
        ValueError: blocks of another size.
    """
    (batch, length, heads, size), kv_heads, num_ids = q.shape, keys.shape[1], block_ids.shape[3]
    group, keys_at_once = heads // kv_heads, tile(block_size, size)
    splits = max(1, min(num_ids, PROGRAMS // (batch * kv_heads * length)))
    kind = q.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, *q.shape, dtype=kind, device=q.device)
    lse = torch.empty(splits, batch, length, heads, dtype=torch.float32, device=q.device)
    sparse_attention_kernel[(length, batch * kv_heads, splits)](
        q.contiguous(),
        keys,
        values,
        block_ids.contiguous(),
        positions,
        out,
        lse,
        scale,
        length,
        kv_heads,
        keys.stride(1) // size,
        num_ids,
        triton.cdiv(num_ids, splits),
        GROUP=group,
        ROWS=max(LEAST, triton.next_power_of_2(group)),
        TILE=keys_at_once,
        TILES=block_size // keys_at_once,
        SIZE=size,
        DIMS=max(LEAST, triton.next_power_of_2(size)),
        num_stages=stages(keys.dtype),
    )
    if splits == 1:
        return out[0]
    return (lse.softmax(dim=0).unsqueeze(-1) * out).sum(dim=0).to(q.dtype)


def dense_attention(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """As `layers.attend_to_all`, with the keys divided among programs.

    Args:
        q: [B, T, N, H].
        keys: [B, K, S, H], a part of a contiguous cache along S.
        values: likewise, of a cache of the same shape.
        positions: of the queries [T].
        scale: factor on the scores.

    Returns:
        [B, T, N, H].
    """
    # The last block may reach beyond the slots, but no query does.
    every_block = torch.arange(triton.cdiv(keys.shape[2], DENSE_BLOCK), device=q.device)
    ids = every_block.expand(q.shape[0], keys.shape[1], q.shape[1], -1)
    return sparse_attention(q, keys, values, ids, positions, scale, DENSE_BLOCK)
