"""Exact attention of each query over the blocks of keys chosen for it: the second half of InfLLM v2."""

import math
from typing import Literal, get_args, overload

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention import pallas_gpu, pallas_tpu, reference, xla
from kernels_pallas.dispatch import UnsupportedError, check_sizes, check_types, choose_implementation

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
_IMPLEMENTATIONS = {
    "reference": reference.block_sparse_attention,
    "xla": xla.block_sparse_attention,
    "pallas_tpu": pallas_tpu.block_sparse_attention,
    "pallas_gpu": pallas_gpu.block_sparse_attention,
}


@overload
def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_ids: Int[Array, "B K T I"],
    *,
    block_size: int,
    scale: float | None = None,
    query_positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    return_lse: Literal[False] = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]: ...


@overload
def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_ids: Int[Array, "B K T I"],
    *,
    block_size: int,
    scale: float | None = None,
    query_positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    return_lse: Literal[True],
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]: ...


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_ids: Int[Array, "B K T I"],
    *,
    block_size: int,
    scale: float | None = None,
    query_positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Computes softmax(scale · q kᵀ) v over the keys of each query's blocks that are not after it.

    Query head n reads key/value head n // (N/K). Softmax and accumulation are in float32 whatever the inputs are.

    Args:
        q: queries.
        k: keys.
        v: values.
        block_ids: the blocks of each query, as `select_blocks` returns them: distinct numbers in ascending order in
            [0, ceil(S / block_size)), then -1. Blocks after the query's own are allowed and add nothing.
        block_size: keys in a block.
        scale: factor on the scores; None takes 1/sqrt(H).
        query_positions: where each query lies among the keys, the last key that it sees; None for a whole row, where
            query t is key t. A negative position sees nothing, one beyond the keys what the last key sees. With
            positions a list may name blocks that do not exist; they add nothing.
        segment_ids: document of each key; a query sees only keys of the document at its position.
        return_lse: whether to return the log-sum-exp of each query's scaled scores too, in float32.
        implementation: "xla" computes little beyond what was chosen, in memory linear in T, on any device;
            "pallas_tpu" is for TPU, "pallas_gpu" for a GPU;
            "reference" materialises all scores. None takes the kernel of the platform that the program is for where it
            supports the arguments, else "xla", and logs its choice once.

    Returns:
        The attended values, in the type of `q`; zeros for a query whose blocks hold no key that it may see (its
        log-sum-exp is -inf). Gradients flow through both.

    Raises:
        ValueError: for shapes that do not fit together, more block numbers than blocks of a row, and an
            `implementation` that does not exist or cannot run.
    """
    _check_arguments(q, k, v, block_ids, query_positions, segment_ids, block_size)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    unsupported = {
        "pallas_tpu": pallas_tpu.unsupported_reason(q, block_size),
        "pallas_gpu": pallas_gpu.unsupported_reason(q, k, block_size),
    }
    name = choose_implementation("block_sparse_attention", implementation, get_args(Implementation), unsupported)
    if query_positions is not None:
        query_positions = jnp.minimum(query_positions, k.shape[1] - 1)
    out, lse = _IMPLEMENTATIONS[name](q, k, v, block_ids, segment_ids, block_size, scale, query_positions)
    return (out, lse) if return_lse else out


def _check_arguments(
    q: Array,
    k: Array,
    v: Array,
    block_ids: Array,
    query_positions: Array | None,
    segment_ids: Array | None,
    block_size: int,
) -> None:
    def refuse(what: str) -> None:
        raise UnsupportedError(f"block_sparse_attention: {what}")

    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        refuse(
            f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}: must be [B, T, N, H], [B, S, K, H] and the shape "
            "of k"
        )
    check_sizes("block_sparse_attention", q=q.shape, k=k.shape)
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        refuse(
            f"q has shape {q.shape} and k has {k.shape}: batch and head width must be equal, and the number of query "
            "heads a multiple of the number of key heads"
        )
    if query_positions is None and q.shape[1] != k.shape[1]:
        refuse(f"q has shape {q.shape} and k has {k.shape}: lengths must be equal without query_positions")
    if query_positions is not None and query_positions.shape != q.shape[:2]:
        refuse(f"query_positions has shape {query_positions.shape}: must be [B, T] = {q.shape[:2]}")
    if not isinstance(block_size, int) or block_size < 1:
        refuse(f"block_size = {block_size}: must be an int of at least 1")
    lists = q.shape[0], k.shape[2], q.shape[1]
    # The length of a cache that `select_blocks` infers from its kernels may be a block more than there is.
    blocks = math.ceil(k.shape[1] / block_size) + (query_positions is not None)
    if block_ids.ndim != 4 or block_ids.shape[:3] != lists or block_ids.shape[3] > blocks:
        refuse(
            f"block_ids has shape {block_ids.shape}: must be [B, K, T, I] = {lists} and I at most the {blocks} blocks "
            f"of {block_size} keys"
        )
    if segment_ids is not None and segment_ids.shape != k.shape[:2]:
        refuse(f"segment_ids has shape {segment_ids.shape}: must be [B, S] = {k.shape[:2]}")
    check_sizes("block_sparse_attention", block_ids=block_ids.shape)
    integers = {"block_ids": block_ids, "query_positions": query_positions, "segment_ids": segment_ids}
    check_types("block_sparse_attention", {"q": q, "k": k, "v": v}, integers)
