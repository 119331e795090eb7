"""What block-sparse attention costs a TPU: FLOPs of its matrix products and bytes from and to HBM, by its grids.

How many blocks a tile of queries reads is up to the data. Where nothing else is said it is taken as measured.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.block_sparse_attention.arg_specs import ArgSpec
from kernels_pallas.block_sparse_attention.tuned_block_sizes import (
    GROUP_KEYS,
    RANGE_BYTES,
    RANGE_GROUP_KEYS,
    TILE,
)
from kernels_pallas.block_sparse_attention.union_walk import blocks_per_group

# Blocks of the union of a tile's 32 queries over those of one query, by the share of all blocks that a query chooses:
# SmolLM2 on prose, mean of its layers (they are from 1.4 to 2.4, and to 3.7), by `benchmarks/sparse_roofline.py`.
UNION_RATIOS = ((24 / 128, 1.80), (6 / 128, 2.20))


def union_ratio(num_selected: int, num_blocks: int) -> float:
    """The measured ratio at a share of chosen blocks; in between and above that of the next smaller share."""
    share = num_selected / num_blocks
    return next((ratio for measured, ratio in UNION_RATIOS if measured <= share), UNION_RATIOS[-1][1])


def forward_cost(spec: ArgSpec, ratio: float | None = None, share: float = 1.0) -> pl.CostEstimate:
    """Costs of the forward kernel: a tile reads the blocks of its union in groups, and its tables.

    The tables of block numbers are read twice: this tile's, and the next one's.

    Args:
        spec: the call, for whole rows.
        ratio: blocks of a tile's union over those of one query; None takes the measured one.
        share: of a row's queries that the call has, wherever they lie: what they cost on average.
    """
    blocks, heads, row = (
        _read_blocks(spec, ratio, blocks_per_group(GROUP_KEYS, spec.block_size)),
        _kv_heads(spec),
        _row_bytes(spec),
    )
    scores = heads * _rows(spec) * blocks * spec.block_size
    read = heads * (blocks * spec.block_size * 2 * row + _table_bytes(spec, 3))
    return pl.CostEstimate(
        flops=round(share * 4 * scores * spec.head_dim),
        transcendentals=round(share * scores),
        bytes_accessed=round(share * (read + _query_rows(spec) * (2 * row + 4))),
    )


def backward_cost(spec: ArgSpec, ratio: float | None = None, share: float = 1.0) -> pl.CostEstimate:
    """Costs of the backward kernel: five products, with the keys in ranges that stay in vector memory.

    All queries from a range on are read once for each range, with the float32 sums of their dq so far: each range
    after the first reads what all write. Queries that are a part of a row only are read for every range.

    Args:
        spec: the call, for whole rows.
        ratio: as in `forward_cost`.
        share: as there.
    """
    heads, row = _kv_heads(spec), _row_bytes(spec)
    keys = range_bytes(jnp.dtype(spec.dtype).itemsize) // (2 * row)
    keys = min(max(keys // spec.block_size, 1) * spec.block_size, spec.seq_len)
    num_ranges = -(-spec.seq_len // keys)
    # A tile's entries of one range fill whole groups but for the last: half a group more for each range that it meets.
    met = np.minimum(_tile_ends(spec) / keys + 1, num_ranges)
    blocks = (
        _read_blocks(spec, ratio, 1) + float(met.sum()) * (blocks_per_group(RANGE_GROUP_KEYS, spec.block_size) - 1) / 2
    )
    passes = (num_ranges + 1) / 2 if share == 1 else num_ranges
    scores = heads * _rows(spec) * blocks * spec.block_size
    queries = _query_rows(spec)
    of_queries = passes * (queries * (2 * row + 8) + heads * _table_bytes(spec, 2))
    of_queries += (2 * passes - 1) * queries * 4 * spec.head_dim
    return pl.CostEstimate(
        flops=round(share * 10 * scores * spec.head_dim),
        transcendentals=round(share * scores),
        bytes_accessed=round(share * of_queries + 4 * heads * spec.seq_len * row),
    )


def range_bytes(itemsize: int) -> int:
    """Bytes of keys and values in a range; queries in float32 take the room of half a range."""
    return RANGE_BYTES if itemsize == 2 else RANGE_BYTES // 2


def _read_blocks(spec: ArgSpec, ratio: float | None, group: int) -> float:
    """Blocks that the tiles of one key/value head read: at most those that exist so far, in whole groups."""
    visible = np.ceil(_tile_ends(spec) / spec.block_size)
    if ratio is None:
        ratio = union_ratio(spec.num_selected, math.ceil(spec.seq_len / spec.block_size))
    union = np.minimum(visible, ratio * np.minimum(visible, spec.num_selected))
    return float((np.ceil(union / group) * group).sum())


def _tile_ends(spec: ArgSpec) -> np.ndarray:
    return np.arange(TILE, spec.seq_len + 1, TILE)


def _table_bytes(spec: ArgSpec, number: int) -> float:
    """Of a head's tables: as long for each tile as its union can be."""
    entries = min(spec.seq_len // spec.block_size, TILE * spec.num_selected) + blocks_per_group(
        GROUP_KEYS, spec.block_size
    )
    return 4.0 * number * entries * spec.seq_len / TILE


def _rows(spec: ArgSpec) -> int:
    """Of a tile: its queries for each head of the group."""
    return TILE * spec.num_heads // spec.num_kv_heads


def _kv_heads(spec: ArgSpec) -> int:
    return spec.batch_size * spec.num_kv_heads


def _query_rows(spec: ArgSpec) -> int:
    return spec.batch_size * spec.num_heads * spec.seq_len


def _row_bytes(spec: ArgSpec) -> int:
    return spec.head_dim * jnp.dtype(spec.dtype).itemsize
