"""Keys and values of past tokens, and attention over them.

Slot and position are the same: a token at position p is written to slot p and attends to slots 0..p. Prompts of
different lengths are therefore padded on the right: a slot that padding filled is written again by the real token of
that position before any token can see it.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cpm_jax.modeling.config import ModelConfig

# Queries that are scored together when a prompt is read: bounds the scores to [B, N, 128, S].
QUERY_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Rotated keys, and values, of every layer; slot = position.

    Attributes:
        keys: [L, B, K, S, H]: the slots of a head lie together, in the order in which attention reads them.
        values: [L, B, K, S, H].
    """

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]

    @property
    def length(self) -> int:
        """Number of slots, S."""
        return self.keys.shape[3]


def init_cache(config: ModelConfig, batch_size: int, length: int, dtype: jnp.dtype | str | None = None) -> KVCache:
    """An empty cache of `length` slots for each of `batch_size` sequences.

    Args:
        config: of the model.
        batch_size: B.
        length: S, the most tokens of a prompt and its continuation together. LongRoPE chooses its factors by it.
        dtype: of keys and values; None takes the compute dtype.
    """
    shape = (config.num_layers, batch_size, config.num_kv_heads, length, config.head_size)
    return KVCache(jnp.zeros(shape, dtype or config.dtype), jnp.zeros(shape, dtype or config.dtype))


def attend_to_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    cache: KVCache,
    layer: int | Int[Array, ""],
) -> tuple[Float[Array, "B T N H"], KVCache]:
    """Writes new keys and values to the slots of their positions, then attends to all slots up to each query's own.

    Positions beyond the cache are not written. Softmax and sums are in float32.
    """
    rows = jnp.arange(q.shape[0])[:, None]
    cache = KVCache(
        cache.keys.at[layer, rows, :, positions].set(k.astype(cache.keys.dtype), mode="drop"),
        cache.values.at[layer, rows, :, positions].set(v.astype(cache.values.dtype), mode="drop"),
    )
    keys, values = cache.keys[layer].astype(q.dtype), cache.values[layer].astype(q.dtype)
    slots = jnp.arange(cache.length)

    def attend_one(query: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, position = query  # [B, K, G, H], [B]
        scores = jnp.einsum("bkgh,bksh->bkgs", q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        scores = jnp.where((slots <= position[:, None])[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
        return jnp.einsum("bkgs,bksh->bkgh", weights, values)

    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    queries = (jnp.moveaxis(grouped, 1, 0), jnp.moveaxis(positions, 1, 0))
    if q.shape[1] <= QUERY_BLOCK:
        attended = jax.vmap(attend_one)(queries)
    else:
        attended = jax.lax.map(attend_one, queries, batch_size=QUERY_BLOCK)
    return jnp.moveaxis(attended, 0, 1).reshape(q.shape), cache
