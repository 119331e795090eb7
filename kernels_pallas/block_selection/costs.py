"""What block selection costs a TPU: FLOPs of its matrix products and bytes from and to HBM, by its grid and blocks."""

import math

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.block_selection.arg_specs import ArgSpec
from kernels_pallas.block_selection.tuned_block_sizes import CHUNK_BLOCKS, COARSE_CHUNK, MAX_TILE, SPAN, TILE_ROWS


def tile_queries(group: int) -> int:
    """Queries of a tile, for so many query heads to a key head."""
    return min(2 ** int(math.log2(TILE_ROWS // group)), MAX_TILE)


def scores_vmem_bytes(
    group: int, num_fine: int, num_normalising: int, width: int, itemsize: int, kernels_per_block: int
) -> int:
    """Vector memory that the kernel of block scores needs, rather a little more than the compiler says.

    Compressed keys of a head, block scores of a tile and its queries are there twice, as one comes while the other is
    used; rows are 128 wide at least. Beside them are the scores of a chunk of kernels, before and after they are added
    over the heads; products of float32 split them once more. Held against what the compiler for v4 reported: 16.1 MiB
    for 128K tokens of MiniCPM4-8B in float32, 18.2 for 320K in bfloat16, and for 256K 21.0 with groups of 3 and 19.4
    with groups of 1; and against what it accepted.

    Args:
        group: query heads to a key head.
        num_fine: semantic kernels.
        num_normalising: kernels that the softmax is normalised by.
        width: of a head.
        itemsize: bytes of a number.
        kernels_per_block: strides of kernels in a block.
    """
    tile, chunk = tile_queries(group), CHUNK_BLOCKS * kernels_per_block
    fine, normalising = int(_rounded_up(num_fine, chunk)), int(_rounded_up(num_normalising, COARSE_CHUNK))
    row = int(_rounded_up(width, CHUNK_BLOCKS)) * itemsize
    twice = (fine + normalising + group * tile) * row + tile * fine // kernels_per_block * 4
    scores = 4 * chunk * tile * (group * (itemsize // 2) + 1)
    return 2 * twice + scores + 3 * 2**18


def scores_cost(spec: ArgSpec, num_queries: int, *, lse_approximation: bool = True) -> pl.CostEstimate:
    """Costs of one call of the kernel of block scores, for queries spread evenly over a row.

    A tile of queries goes over the coarse kernels that its last query may see (over the fine ones where the softmax is
    exact), then over the fine ones, in whole chunks. Kernels are read once a call, scores of all blocks written.
    Calls for all parts of a row together cost what the row does.

    Args:
        spec: the row.
        num_queries: of the call.
        lse_approximation: whether the softmax is normalised by the coarse kernels.
    """
    chosen, tile = spec.selection, tile_queries(spec.num_heads // spec.num_kv_heads)
    fine_chunk = CHUNK_BLOCKS * chosen.kernels_per_block
    last = np.minimum(np.arange(tile, spec.seq_len + tile, tile), spec.seq_len)
    fine = _rounded_up(last / chosen.kernel_stride, fine_chunk)
    stride = chosen.coarse_kernel_stride if lse_approximation else chosen.kernel_stride
    normalising = _rounded_up(last / stride, COARSE_CHUNK)
    seen = float((fine + normalising).mean())
    heads, row = spec.batch_size * spec.num_kv_heads, spec.head_dim * jnp.dtype(spec.dtype).itemsize
    scores = spec.batch_size * spec.num_heads * num_queries * seen
    num_blocks = float(_rounded_up(spec.seq_len / chosen.block_size, CHUNK_BLOCKS))
    kernels = fine.max() + normalising.max()
    read = spec.batch_size * spec.num_heads * num_queries * row + heads * kernels * row
    return pl.CostEstimate(
        flops=round(2 * scores * spec.head_dim),
        transcendentals=round(scores),
        bytes_accessed=round(read + 4 * heads * num_queries * num_blocks),
    )


def selection_costs(spec: ArgSpec) -> list[pl.CostEstimate]:
    """Costs of a whole row: the kernel of block scores over all its spans, and the ranking of what it wrote."""
    span = min(SPAN, spec.seq_len)
    calls = -(-spec.seq_len // span)
    one = scores_cost(spec, span)
    num_blocks = float(_rounded_up(spec.seq_len / spec.selection.block_size, CHUNK_BLOCKS))
    ranked = 4 * spec.batch_size * spec.num_kv_heads * spec.seq_len * (num_blocks + spec.selection.num_selected)
    return [
        pl.CostEstimate(calls * one.flops, calls * one.transcendentals, calls * one.bytes_accessed),
        pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=round(ranked)),
    ]


def _rounded_up(x: np.ndarray | float, multiple: int) -> np.ndarray:
    return np.ceil(np.asarray(x) / multiple) * multiple
