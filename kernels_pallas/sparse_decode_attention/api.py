"""Attention of a few new queries per sequence over the blocks of a KV cache that were chosen for them."""

import math
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import UnsupportedError, check_sizes, check_types, choose_implementation
from kernels_pallas.sparse_decode_attention import pallas_gpu, pallas_tpu, reference, xla

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
_IMPLEMENTATIONS = {
    "reference": reference.sparse_decode_attention,
    "xla": xla.sparse_decode_attention,
    "pallas_tpu": pallas_tpu.sparse_decode_attention,
    "pallas_gpu": pallas_gpu.sparse_decode_attention,
}


def sparse_decode_attention(
    q: Float[Array, "B T N H"],
    k_cache: Float[Array, "... S H"],
    v_cache: Float[Array, "... S H"],
    block_ids: Int[Array, "B K T I"],
    query_positions: Int[Array, "B T"],
    *,
    block_size: int,
    scale: float | None = None,
    layer: int | Int[Array, ""] | None = None,
    page_table: Int[Array, "B M"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Computes softmax(scale · q kᵀ) v over the cached keys of each query's blocks, up to the query's own position.

    Query head n reads key/value head n // (N/K). Softmax and accumulation are in float32 whatever the types are. What
    is read of the cache are the chosen blocks, whatever its length.

    Args:
        q: queries, usually one for each sequence.
        k_cache: keys, contiguous [B, K, S, H], where slot s of a sequence is its position s; or, with `page_table`, in
            pages [K, P, page_size, H], which are dealt out to sequences.
        v_cache: values, laid out as the keys.
        block_ids: the blocks of each query, as `select_blocks` returns them: distinct numbers, -1 for none. A block
            begins at position block_size · number. Blocks that the cache, or the page table, does not have add nothing.
        query_positions: position of each query, the last one that it sees. A negative one sees nothing, one beyond the
            cache what its last key sees.
        block_size: keys in a block.
        scale: factor on the scores; None takes 1/sqrt(H).
        layer: with it both caches are those of all layers, with a leading axis, and this one is read in place.
        page_table: which page holds positions [page_size · m, page_size · (m + 1)) of each sequence; entries of pages
            beyond a query's position are not looked at. page_size is a multiple of `block_size`.
        implementation: "xla" gathers the chosen blocks; "pallas_tpu" is for TPU, "pallas_gpu" for a GPU; "reference"
            masks all scores. None takes the kernel of the platform that the program is for where it supports the
            arguments, else "xla", and logs its choice once.

    Returns:
        The attended values, in the type of `q`; zeros for a query that sees no key.

    Raises:
        ValueError: for shapes that do not fit together, pages that do not hold whole blocks, more block numbers than
            blocks of the cache or of the pages of a sequence, and an `implementation` that does not exist or cannot
            run.
    """
    slots = _check_arguments(q, k_cache, v_cache, block_ids, query_positions, block_size, layer, page_table)
    # Else a kernel would read behind the cache, or by the table of another sequence.
    block_ids = jnp.where(block_ids * block_size < slots, block_ids, -1)
    query_positions = jnp.minimum(query_positions, slots - 1)
    unsupported = {
        "pallas_tpu": pallas_tpu.unsupported_reason(q, block_ids, block_size),
        "pallas_gpu": pallas_gpu.unsupported_reason(q, k_cache, block_size),
    }
    name = choose_implementation("sparse_decode_attention", implementation, get_args(Implementation), unsupported)
    if layer is None:
        k_cache, v_cache, layer = k_cache[None], v_cache[None], 0
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    run = _IMPLEMENTATIONS[name]
    return run(q, k_cache, v_cache, block_ids, query_positions, layer, page_table, block_size, scale)


def _check_arguments(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_ids: Array,
    query_positions: Array,
    block_size: int,
    layer: int | Array | None,
    page_table: Array | None,
) -> int:
    """Checks the arguments; returns how many keys a sequence has room for."""

    def refuse(what: str) -> None:
        raise UnsupportedError(f"sparse_decode_attention: {what}")

    if not isinstance(block_size, int) or block_size < 1:
        refuse(f"block_size = {block_size}: must be an int of at least 1")
    axes = "" if layer is None else "L, "
    layout = f"[{axes}B, K, S, H]" if page_table is None else f"[{axes}K, P, page_size, H]"
    if q.ndim != 4 or k_cache.ndim != 4 + (layer is not None) or k_cache.shape != v_cache.shape:
        refuse(
            f"q, k_cache, v_cache have shapes {q.shape}, {k_cache.shape}, {v_cache.shape}: must be [B, T, N, H], "
            f"{layout} and the shape of k_cache"
        )
    check_sizes("sparse_decode_attention", q=q.shape, k_cache=k_cache.shape)
    if isinstance(layer, int) and not 0 <= layer < k_cache.shape[0]:
        refuse(f"layer = {layer}: must be from 0 to {k_cache.shape[0] - 1}, the layers of k_cache")
    batch, length, heads, size = q.shape
    kv_heads = k_cache.shape[-4 if page_table is not None else -3]
    if k_cache.shape[-1] != size or heads % kv_heads or (page_table is None and k_cache.shape[-4] != batch):
        refuse(
            f"q has shape {q.shape} and k_cache has {k_cache.shape}: must be [B, T, N, H] and {layout}, N a multiple "
            "of K"
        )
    if block_ids.ndim != 4 or block_ids.shape[:3] != (batch, kv_heads, length):
        refuse(f"block_ids has shape {block_ids.shape}: must be [B, K, T, I] = {(batch, kv_heads, length)} and I")
    if query_positions.shape != (batch, length):
        refuse(f"query_positions has shape {query_positions.shape}: must be [B, T] = {(batch, length)}")
    if page_table is not None and (page_table.ndim != 2 or page_table.shape[0] != batch):
        refuse(f"page_table has shape {page_table.shape}: must be [B, M], with B = {batch}")
    if page_table is not None and k_cache.shape[-2] % block_size:
        refuse(f"pages of {k_cache.shape[-2]} keys: must be a multiple of block_size = {block_size}")
    slots = k_cache.shape[-2] * (1 if page_table is None else page_table.shape[1])
    num_blocks = math.ceil(slots / block_size)
    # The length of a cache that `select_blocks` infers from its kernels may be a block more than there is.
    if block_ids.shape[3] > num_blocks + 1:
        held = f"{slots} keys" if page_table is None else f"the {page_table.shape[1]} pages of page_table"
        refuse(
            f"block_ids has shape {block_ids.shape}: I must be at most {num_blocks + 1}, one more than the blocks of "
            f"{block_size} keys in {held}"
        )
    check_sizes("sparse_decode_attention", block_ids=block_ids.shape)
    integers = {"block_ids": block_ids, "query_positions": query_positions, "page_table": page_table}
    check_types("sparse_decode_attention", {"q": q, "k_cache": k_cache, "v_cache": v_cache}, integers)
    return slots
