"""Scores by which blocks are chosen, without the scores of kernels ever in memory.

Two passes over the semantic kernels, each program for one query and key/value head, whose heads are the rows of its
products: the normaliser of every head's softmax, then for some blocks the largest sum over heads of the kernels that
touch them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from export.torch_runtime.config import SparseConfig
from export.torch_runtime.triton_kernels.int4_matmul import LEAST
from export.torch_runtime.triton_kernels.sparse_attention import MASKED

KERNELS, BLOCKS = 64, 16  # in a tile of the first pass, of the second


@triton.jit
def normaliser_kernel(
    q_ptr,
    kernels_ptr,
    positions_ptr,
    out_ptr,
    scale,
    length,
    kv_heads,
    num_kernels,
    places,
    kernel_size,
    kernel_stride,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    KERNELS: tl.constexpr,
):
    """The log-sum-exp of each head's scores over the kernels that a query sees; -inf where it sees none."""
    t, head = tl.program_id(0), tl.program_id(1)
    batch, kv_head = head // kv_heads, head % kv_heads
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    row_mask, dim_mask = rows < GROUP, dims < SIZE
    position = tl.load(positions_ptr + t)
    q_rows = ((batch * length + t) * kv_heads + kv_head) * GROUP + rows
    q = tl.load(q_ptr + q_rows[:, None] * SIZE + dims[None, :], mask=row_mask[:, None] & dim_mask[None, :], other=0.0)
    kernels_ptr += head.to(tl.int64) * places * SIZE
    maximum = tl.full((ROWS,), MASKED, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, num_kernels, KERNELS):
        numbers = first + tl.arange(0, KERNELS)
        visible = (numbers * kernel_stride + kernel_size <= position + 1) & (numbers < num_kernels)
        read = visible[:, None] & dim_mask[None, :]
        kernels = tl.load(kernels_ptr + numbers[:, None] * SIZE + dims[None, :], mask=read, other=0.0)
        scores = tl.dot(q, tl.trans(kernels), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, MASKED)
        now = tl.maximum(maximum, tl.max(scores, axis=1))
        weights = tl.where(visible[None, :], tl.exp(scores - now[:, None]), 0.0)
        total = total * tl.exp(maximum - now) + tl.sum(weights, axis=1)
        maximum = now
    seen = total > 0
    tl.store(
        out_ptr + q_rows, tl.where(seen, maximum + tl.log(tl.where(seen, total, 1.0)), -float("inf")), mask=row_mask
    )


@triton.jit
def block_scores_kernel(
    q_ptr,
    kernels_ptr,
    normaliser_ptr,
    positions_ptr,
    out_ptr,
    scale,
    length,
    kv_heads,
    num_kernels,
    places,
    num_blocks,
    kernel_size,
    kernel_stride,
    PER_BLOCK: tl.constexpr,
    BEFORE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Some blocks of one query: of the kernels that touch each the largest weight, summed over heads."""
    t, head = tl.program_id(0), tl.program_id(1)
    blocks = tl.program_id(2) * BLOCKS + tl.arange(0, BLOCKS)
    batch, kv_head = head // kv_heads, head % kv_heads
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    row_mask, dim_mask = rows < GROUP, dims < SIZE
    position = tl.load(positions_ptr + t)
    q_rows = ((batch * length + t) * kv_heads + kv_head) * GROUP + rows
    q = tl.load(q_ptr + q_rows[:, None] * SIZE + dims[None, :], mask=row_mask[:, None] & dim_mask[None, :], other=0.0)
    normaliser = tl.load(normaliser_ptr + q_rows, mask=row_mask, other=-float("inf"))
    some = normaliser > -float("inf")
    normaliser = tl.where(some, normaliser, 0.0)
    kernels_ptr += head.to(tl.int64) * places * SIZE
    best = tl.zeros((BLOCKS,), tl.float32)
    for offset in tl.static_range(-BEFORE, PER_BLOCK):
        numbers = blocks * PER_BLOCK + offset
        visible = (numbers * kernel_stride + kernel_size <= position + 1) & (numbers >= 0) & (numbers < num_kernels)
        read = visible[:, None] & dim_mask[None, :]
        kernels = tl.load(kernels_ptr + numbers[:, None] * SIZE + dims[None, :], mask=read, other=0.0)
        scores = tl.dot(q, tl.trans(kernels), input_precision="ieee") * scale
        counted = visible[None, :] & some[:, None]
        weights = tl.where(counted, tl.exp(tl.where(counted, scores - normaliser[:, None], 0.0)), 0.0)
        best = tl.maximum(best, tl.sum(weights, axis=0))
    place = (head.to(tl.int64) * length + t) * num_blocks + blocks
    tl.store(out_ptr + place, best, mask=blocks < num_blocks)


def block_scores(
    q: Tensor,
    kernels: Tensor,
    coarse: Tensor | None,
    positions: Tensor,
    num_slots: int,
    scale: float,
    sparse: SparseConfig,
) -> Tensor:
    """As `infllm.block_scores`; `kernels` and `coarse` are parts of contiguous tensors along their third dimension."""
    (batch, length, heads, size), kv_heads = q.shape, kernels.shape[1]
    group = heads // kv_heads
    shared = {
        "GROUP": group,
        "ROWS": max(LEAST, triton.next_power_of_2(group)),
        "SIZE": size,
        "DIMS": max(LEAST, triton.next_power_of_2(size)),
    }
    q = q.contiguous()
    grid = length, batch * kv_heads
    of, sizes = (kernels, (sparse.kernel_size, sparse.kernel_stride)) if coarse is None else (coarse, sparse.coarse)
    normaliser = torch.empty(batch, length, heads, dtype=torch.float32, device=q.device)
    normaliser_kernel[grid](
        q,
        of,
        positions,
        normaliser,
        scale,
        length,
        kv_heads,
        of.shape[2],
        of.stride(1) // size,
        *sizes,
        **shared,
        KERNELS=KERNELS,
    )
    num_blocks = -(-num_slots // sparse.block_size)
    out = torch.empty(batch, kv_heads, length, num_blocks, dtype=torch.float32, device=q.device)
    block_scores_kernel[(*grid, triton.cdiv(num_blocks, BLOCKS))](
        q,
        kernels,
        normaliser,
        positions,
        out,
        scale,
        length,
        kv_heads,
        kernels.shape[2],
        kernels.stride(1) // size,
        num_blocks,
        sparse.kernel_size,
        sparse.kernel_stride,
        PER_BLOCK=sparse.block_size // sparse.kernel_stride,
        BEFORE=-(-sparse.kernel_size // sparse.kernel_stride) - 1,
        **shared,
        BLOCKS=BLOCKS,
    )
    return out
