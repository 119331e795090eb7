"""Attention over chosen blocks of a cache written from its definition: pages in order, and a dense mask."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sparse_decode_attention(
    q: Float[Array, "B T N H"],
    k_cache: Float[Array, "L ... H"],
    v_cache: Float[Array, "L ... H"],
    block_ids: Int[Array, "B K T I"],
    query_positions: Int[Array, "B T"],
    layer: int | Int[Array, ""],
    page_table: Int[Array, "B M"] | None,
    block_size: int,
    scale: float,
) -> Float[Array, "B T N H"]:
    """See `kernels_pallas.sparse_decode_attention.api.sparse_decode_attention`. Holds B·N·T·S scores."""
    k, v = (jnp.asarray(cache)[layer].astype(jnp.float32) for cache in (k_cache, v_cache))
    if page_table is not None:
        pages = jnp.clip(page_table, 0, k.shape[1] - 1)
        k, v = (jnp.moveaxis(x[:, pages], 1, 0) for x in (k, v))  # [B, K, M, page_size, H]
        k, v = (x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (k, v))
    groups = q.shape[2] // k.shape[1]
    k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))  # [B, N, S, H]
    scores = scale * jnp.einsum("btnh,bnsh->bnts", q.astype(jnp.float32), k)
    slot = jnp.arange(k.shape[2])
    chosen = (block_ids[..., None, :] == (slot // block_size)[:, None]).any(axis=-1)  # [B, K, T, S]
    visible = jnp.repeat(chosen, groups, axis=1) & (slot <= query_positions[:, None, :, None])
    weights = jax.nn.softmax(scores, axis=-1, where=visible)
    weights = jnp.where(visible.any(axis=-1, keepdims=True), weights, 0.0)
    return jnp.einsum("bnts,bnsh->btnh", weights, v).astype(q.dtype)
