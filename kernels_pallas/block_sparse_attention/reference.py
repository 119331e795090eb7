"""Attention over chosen blocks written from its definition: a dense mask. Slow, and obviously right."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    block_ids: Int[Array, "B K T I"],
    segment_ids: Int[Array, "B T"] | None,
    block_size: int,
    scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """See `kernels_pallas.block_sparse_attention.api.block_sparse_attention`. Holds B·N·T·T scores."""
    groups = q.shape[2] // k.shape[2]
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    k32, v32 = (jnp.repeat(x, groups, axis=2) for x in (k32, v32))
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q32, k32)
    query, key = jnp.arange(q.shape[1])[:, None], jnp.arange(q.shape[1])[None, :]
    # The number -1, which fills a list, is the number of no key's block.
    chosen = (block_ids[..., None, :] == (key // block_size)[0][:, None]).any(axis=-1)  # [B, K, T, S]
    visible = (key <= query) & jnp.repeat(chosen, groups, axis=1)
    if segment_ids is not None:
        visible &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    # A query without a key gets zeros: its softmax is taken over all keys, so that it has a gradient, and dropped.
    blind = ~visible.any(axis=-1, keepdims=True)
    weights = jnp.where(blind, 0.0, jax.nn.softmax(jnp.where(visible | blind, scores, -jnp.inf), axis=-1))
    out = jnp.einsum("bnts,bsnh->btnh", weights, v32).astype(q.dtype)
    lse = jax.nn.logsumexp(jnp.where(visible | blind, scores, -jnp.inf), axis=-1)
    return out, jnp.where(blind[..., 0], -jnp.inf, lse)
