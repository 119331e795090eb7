"""What splash attention costs a TPU: FLOPs of its matrix products and bytes from and to HBM, by its grid and blocks."""

import math
from typing import Literal

import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas.attention.arg_specs import ArgSpec
from kernels_pallas.attention.tuned_block_sizes import LANES, block_size

SplashKernel = Literal["fwd", "dq", "dkv"]
# Products for each pair of blocks: scores and values; scores, dP and dQ; scores, dV, dP and dK.
_PRODUCTS: dict[str, int] = {"fwd": 2, "dq": 3, "dkv": 4}


def causal_pairs(length: int, block_q: int, block_kv: int) -> int:
    """Pairs of a block of queries and one of keys that a causal mask does not empty."""
    return sum(math.ceil((row + 1) * block_q / block_kv) for row in range(length // block_q))


def splash_cost(
    kernel: SplashKernel, *, num_heads: int, length: int, width: int, itemsize: float, block_q: int, block_kv: int
) -> pl.CostEstimate:
    """Costs of one of splash attention's kernels over whole rows with a causal mask.

    Whole blocks are computed. "fwd" and "dq" read a block of keys and values for each pair, "dkv" a block of queries
    and gradients with its two statistics; what is outside is read and written once for each head.

    Args:
        kernel: which one.
        num_heads: query heads, times rows of the batch.
        length: of a row, a multiple of both blocks.
        width: of a head.
        itemsize: bytes of a number of q.
        block_q: queries of a block.
        block_kv: keys of a block.
    """
    pairs, row = causal_pairs(length, block_q, block_kv), width * itemsize
    streamed, outside = {
        "fwd": (block_kv * 2 * row, 2 * row + 4),
        "dq": (block_kv * 2 * row, 3 * row + 8),
        "dkv": (block_q * (2 * row + 8), 4 * row),
    }[kernel]
    scores = num_heads * pairs * block_q * block_kv
    return pl.CostEstimate(
        flops=2 * _PRODUCTS[kernel] * scores * width,
        transcendentals=scores,
        bytes_accessed=int(num_heads * (pairs * streamed + length * outside)),
    )


def forward_cost(spec: ArgSpec) -> pl.CostEstimate:
    """Of the forward kernel as our api calls it."""
    return _cost("fwd", spec)


def backward_costs(spec: ArgSpec) -> list[pl.CostEstimate]:
    """Of the two backward kernels as our api calls them: dq, and dk with dv."""
    return [_cost("dq", spec), _cost("dkv", spec)]


def _cost(kernel: SplashKernel, spec: ArgSpec) -> pl.CostEstimate:
    length = spec.seq_len + -spec.seq_len % LANES
    block = block_size(length)
    return splash_cost(
        kernel,
        num_heads=spec.batch_size * spec.num_heads,
        length=length,
        width=spec.head_dim,
        itemsize=jnp.dtype(spec.dtype).itemsize,
        block_q=block,
        block_kv=block,
    )
