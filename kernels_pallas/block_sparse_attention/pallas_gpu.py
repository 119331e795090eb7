"""Block-sparse causal attention on a GPU: the forward pass through Triton, gradients in plain JAX.

A row of a batch is a cache: the kernel of sparse decoding walks the blocks of each query, with the
documents of a packed row as a mask. Gradients walk the transposed index as in `xla.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention import xla
from kernels_pallas.sparse_decode_attention.pallas_gpu import unsupported_reason, walk_blocks

__all__ = ["block_sparse_attention", "unsupported_reason"]


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_ids: Int[Array, "B K T I"],
    segment_ids: Int[Array, "B S"] | None,
    block_size: int,
    scale: float,
    query_positions: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """See `kernels_pallas.block_sparse_attention.api.block_sparse_attention`; returns the output and the log-sum-exp.

    `interpret` runs the kernel's program step by step on any device, for tests.
    """
    if query_positions is None:
        query_positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    return _attention(block_size, scale, interpret, q, k, v, block_ids, query_positions, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(block_size: int, scale: float, interpret: bool, *args: Any) -> tuple[Array, Array]:
    return _attention_fwd(block_size, scale, interpret, *args)[0]


def _attention_fwd(block_size: int, scale: float, interpret: bool, *args: Any) -> tuple[tuple[Array, Array], tuple]:
    q, k, v, block_ids, positions, segment_ids = args
    k_cache, v_cache = (x.transpose(0, 2, 1, 3)[None] for x in (k, v))  # [1, B, K, S, H]
    segments = None
    if segment_ids is not None:
        segments = jnp.take_along_axis(segment_ids, jnp.maximum(positions, 0), axis=1), segment_ids
    out, lse = walk_blocks(
        q,
        k_cache,
        v_cache,
        block_ids,
        positions,
        segment_ids=segments,
        block_size=block_size,
        scale=scale,
        interpret=interpret,
    )
    return (out, lse), (*args, out, lse)


def _attention_bwd(block_size: int, scale: float, interpret: bool, residuals: tuple, gradients: tuple) -> tuple:
    return xla.backward(block_size, scale, residuals, gradients)


_attention.defvjp(_attention_fwd, _attention_bwd)
