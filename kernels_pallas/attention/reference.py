"""Causal attention written from its definition: all scores at once, in float32. Slow, and obviously right."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """See `kernels_pallas.attention.api.dot_product_attention`. Holds B·N·T·T scores."""
    groups = q.shape[2] // k.shape[2]
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    k32, v32 = (jnp.repeat(x, groups, axis=2) for x in (k32, v32))
    scores = scale * jnp.einsum("btnh,bsnh->bnts", q32, k32)
    query, key = jnp.arange(q.shape[1])[:, None], jnp.arange(q.shape[1])[None, :]
    visible = key <= query
    if window is not None:
        visible &= query - key < window
    visible = visible[None, None]
    if segment_ids is not None:
        visible &= (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v32).astype(q.dtype)
