"""Attention over chosen blocks of a cache in plain JAX: the blocks are gathered, and nothing else is read."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Queries that are served together: bounds what is gathered at a time.
MAX_GATHERED_BYTES = 2**26


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
    """See `kernels_pallas.sparse_decode_attention.api.sparse_decode_attention`."""
    length = q.shape[1]

    def attend(q: Array, block_ids: Array, query_positions: Array) -> Array:
        return _attend(q, k_cache, v_cache, block_ids, query_positions, jnp.int32(layer), page_table, block_size, scale)

    per_query = block_ids.size // length * block_size * k_cache.shape[-1] * k_cache.dtype.itemsize
    tile = min(length, max(1, MAX_GATHERED_BYTES // max(per_query, 1)))
    if tile == length:
        return attend(q, block_ids, query_positions)
    padding = -length % tile
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    block_ids = jnp.pad(block_ids, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=-1)
    query_positions = jnp.pad(query_positions, ((0, 0), (0, padding)), constant_values=-1)

    def one_tile(index: Array) -> Array:
        cut = lambda x, axis: lax.dynamic_slice_in_dim(x, index * tile, tile, axis)  # noqa: E731
        return attend(cut(q, 1), cut(block_ids, 2), cut(query_positions, 1))

    out = lax.map(one_tile, jnp.arange((length + padding) // tile))  # [tiles, B, tile, N, H]
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)[:, :length]


def _attend(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    block_ids: Array,
    query_positions: Array,
    layer: Array,
    page_table: Array | None,
    block_size: int,
    scale: float,
) -> Array:
    batch, length, _, size = q.shape
    kv_heads, rows = block_ids.shape[1], k_cache.shape[-2]
    keys = min(block_size, rows)  # a cache may be shorter than a block
    first = jnp.maximum(block_ids, 0) * block_size  # [B, K, T, I]
    row, head = jnp.arange(batch)[:, None, None, None], jnp.arange(kv_heads)[:, None, None]
    if page_table is None:
        # The last block of a cache may be cut short: it is read from where a whole one ends.
        start = jnp.minimum(first, rows - keys)
        where = jnp.broadcast_arrays(layer, row, head, start)
        slots = start
    else:
        page = jnp.take_along_axis(page_table[:, None, None], first // rows, axis=3, mode="clip")
        where = jnp.broadcast_arrays(layer, head, page, first % rows)
        slots = first
    index = jnp.stack(where, axis=-1)  # [B, K, T, I, 4]

    def read(cache: Array) -> Array:
        def block(start: Array) -> Array:
            return lax.dynamic_slice(cache, (*start, 0), (1, 1, 1, keys, size)).reshape(keys, size)

        blocks = jax.vmap(block)(index.reshape(-1, 4))
        return blocks.reshape(batch, kv_heads, length, -1, size).astype(q.dtype)  # [B, K, T, I·keys, H]

    at = slots[..., None] + jnp.arange(keys)  # [B, K, T, I, keys]
    visible = (block_ids >= 0)[..., None] & (at >= first[..., None]) & (at <= query_positions[:, None, :, None, None])
    visible = visible.reshape(batch, kv_heads, length, 1, -1)
    queries = q.reshape(batch, length, kv_heads, -1, size).transpose(0, 2, 1, 3, 4)  # [B, K, T, G, H]
    scores = scale * jnp.einsum("bktgh,bktsh->bktgs", queries, read(k_cache), preferred_element_type=jnp.float32)
    maximum = scores.max(axis=-1, keepdims=True, where=visible, initial=-jnp.inf)
    # A query that sees nothing has no maximum: its weights are zeros, and so is what it is divided by.
    weights = jnp.where(visible, jnp.exp(scores - jnp.where(maximum > -jnp.inf, maximum, 0.0)), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("bktgs,bktsh->bktgh", weights.astype(q.dtype), read(v_cache), preferred_element_type=jnp.float32)
    out = out / jnp.where(total > 0, total, 1.0)
    return out.transpose(0, 2, 1, 3, 4).reshape(q.shape).astype(q.dtype)
