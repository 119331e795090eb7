"""Attention over chosen blocks written from its definition: a dense mask. Slow, and obviously right."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_ids: Int[Array, "B K T I"],
    segment_ids: Int[Array, "B S"] | None,
    block_size: int,
    scale: float,
    query_positions: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """See `kernels_pallas.block_sparse_attention.api.block_sparse_attention`. Holds B·N·T·S scores."""
    groups = q.shape[2] // k.shape[2]
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    k32, v32 = (jnp.repeat(x, groups, axis=2) for x in (k32, v32))
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q32, k32)
    key = jnp.arange(k.shape[1])
    if query_positions is None:
        query_positions = jnp.broadcast_to(key, q.shape[:2])
    # The number -1, which fills a list, is the number of no key's block.
    chosen = (block_ids[..., None, :] == (key // block_size)[:, None]).any(axis=-1)  # [B, K, T, S]
    visible = (key <= query_positions[:, None, :, None]) & jnp.repeat(chosen, groups, axis=1)
    if segment_ids is not None:
        query_segments = jnp.take_along_axis(segment_ids, jnp.maximum(query_positions, 0), axis=1)
        visible &= (query_segments[:, :, None] == segment_ids[:, None, :])[:, None]
    # A query without a key gets zeros: its softmax is taken over all keys, so that it has a gradient, and dropped.
    blind = ~visible.any(axis=-1, keepdims=True)
    weights = jnp.where(blind, 0.0, jax.nn.softmax(jnp.where(visible | blind, scores, -jnp.inf), axis=-1))
    out = jnp.einsum("bnts,bsnh->btnh", weights, v32).astype(q.dtype)
    lse = jax.nn.logsumexp(jnp.where(visible | blind, scores, -jnp.inf), axis=-1)
    return out, jnp.where(blind[..., 0], -jnp.inf, lse)
