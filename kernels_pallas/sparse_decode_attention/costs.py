"""What sparse decoding costs a TPU: FLOPs of its matrix products and bytes from and to HBM, by its grid and blocks."""

import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.sparse_decode_attention.arg_specs import ArgSpec
from kernels_pallas.sparse_decode_attention.tuned_block_sizes import STEP_KEYS


def blocks_per_step(block_size: int, num_listed: int) -> int:
    """Blocks that one step of the grid takes, where lists have so many entries."""
    return max(1, min(STEP_KEYS // block_size, num_listed))


def decode_cost(spec: ArgSpec) -> pl.CostEstimate:
    """Costs of one call with full lists: each query and key/value head reads its own blocks, in whole steps.

    The last step's entries without a block fetch one all the same, and multiply nothing.
    """
    listed = min(spec.num_selected, math.ceil(spec.cache_len / spec.block_size))
    per_step = blocks_per_step(spec.block_size, listed)
    fetched = math.ceil(listed / per_step) * per_step
    keys = min(spec.block_size, spec.cache_len)
    lists, queries = (spec.batch_size * spec.num_queries * heads for heads in (spec.num_kv_heads, spec.num_heads))
    scores, row = queries * listed * keys, spec.head_dim * jnp.dtype(spec.dtype).itemsize
    return pl.CostEstimate(
        flops=4 * scores * spec.head_dim,
        transcendentals=scores,
        bytes_accessed=lists * fetched * (keys * 2 * row + 4) + queries * 2 * row,
    )
