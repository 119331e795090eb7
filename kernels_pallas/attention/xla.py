"""Causal attention in blocks, in plain JAX: no more than one block of scores per head exists at any time.

The online softmax of Milakov & Gimelshein (2018) over tiles, with FlashAttention's backward pass (Dao et al., 2022,
algorithm 4): the forward pass keeps the output and the log-sum-exp of each row, the backward pass computes each
tile's probabilities again. A loop over query blocks holds a loop over the key blocks that the query block can see,
so tiles above the diagonal and outside the window cost nothing.

Arrays of blocks are `[n, B, K, G, b, H]` for queries and `[n, B, K, b, H]` for keys and values, with n blocks of b
tokens. The last block is padded at the end: no real query sees a padded key, and padded queries are cut off.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# Tiles of 128 x 128 scores stay in a CPU's caches; 64 was as fast at 512 tokens, 256 slower.
MAX_BLOCK = 128
# Finite, so that a row whose tile is wholly masked gives 0 - 0 rather than inf - inf. What such a tile adds to the
# row is multiplied by exp(MASKED - m) = 0 when the row meets its first visible key; every row sees itself.
MASKED = -0.7 * float(np.finfo(np.float32).max)


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """See `kernels_pallas.attention.api.dot_product_attention`."""
    return _attention(scale, window, q, k, v, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale: float, window: int | None, q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
    return _forward(scale, window, q, k, v, segment_ids)[0]


def _attention_fwd(
    scale: float, window: int | None, q: Array, k: Array, v: Array, segment_ids: Array | None
) -> tuple[Array, tuple]:
    out, lse = _forward(scale, window, q, k, v, segment_ids)
    return out, (q, k, v, segment_ids, out, lse)


def _forward(
    scale: float, window: int | None, q: Array, k: Array, v: Array, segment_ids: Array | None
) -> tuple[Array, Array]:
    """Returns the output [B, T, N, H] and the log-sum-exp of each query's scores, [n, B, K, G, b, 1]."""
    q_blocks, k_blocks, v_blocks, segments = _to_query_blocks(q, k.shape[2]), _to_blocks(k), _to_blocks(v), None
    if segment_ids is not None:
        segments = _to_blocks(segment_ids)
    block = q_blocks.shape[-2]

    def query_block(_: None, index: Array) -> tuple[None, tuple[Array, Array]]:
        q_block = q_blocks[index]

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, acc = carry
            scores = _scores(scale, window, q_block, k_blocks[j], index, j, segments)
            new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - new_maximum)
            shrink = jnp.exp(maximum - new_maximum)
            acc = acc * shrink + _f32_einsum("bkgqs,bksh->bkgqh", weights.astype(v.dtype), v_blocks[j])
            return new_maximum, total * shrink + weights.sum(axis=-1, keepdims=True), acc

        rows = (*q_block.shape[:-1], 1)
        start = jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros(q_block.shape, jnp.float32)
        first = _first_visible_block(index, block, window)
        maximum, total, acc = lax.fori_loop(first, index + 1, key_block, start)
        return None, ((acc / total).astype(q.dtype), maximum + jnp.log(total))

    _, (out, lse) = lax.scan(query_block, None, jnp.arange(q_blocks.shape[0]))
    return _from_query_blocks(out, q.shape), lse


def _attention_bwd(scale: float, window: int | None, residuals: tuple, dout: Array) -> tuple:
    q, k, v, segment_ids, out, lse = residuals
    num_kv_heads = k.shape[2]
    q_blocks, dout_blocks = _to_query_blocks(q, num_kv_heads), _to_query_blocks(dout, num_kv_heads)
    k_blocks, v_blocks, segments = _to_blocks(k), _to_blocks(v), None
    if segment_ids is not None:
        segments = _to_blocks(segment_ids)
    block = q_blocks.shape[-2]
    # sum_s p_s · dp_s of the softmax's gradient equals out · dout.
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1, keepdims=True)
    delta_blocks = _to_query_blocks(delta, num_kv_heads)

    def query_block(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array]:
        q_block, dout_block, lse_block, delta_block = (x[index] for x in (q_blocks, dout_blocks, lse, delta_blocks))

        def key_block(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            scores = _scores(scale, window, q_block, k_blocks[j], index, j, segments)
            weights = jnp.exp(scores - lse_block)
            dweights = _f32_einsum("bkgqh,bksh->bkgqs", dout_block, v_blocks[j])
            dscores = (scale * weights * (dweights - delta_block)).astype(q.dtype)
            dq += _f32_einsum("bkgqs,bksh->bkgqh", dscores, k_blocks[j])
            dk = dk.at[j].add(_f32_einsum("bkgqs,bkgqh->bksh", dscores, q_block))
            dv = dv.at[j].add(_f32_einsum("bkgqs,bkgqh->bksh", weights.astype(dout.dtype), dout_block))
            return dq, dk, dv

        first = _first_visible_block(index, block, window)
        dq, *carried = lax.fori_loop(first, index + 1, key_block, (jnp.zeros(q_block.shape, jnp.float32), *carry))
        return (carried[0], carried[1]), dq.astype(q.dtype)

    start = jnp.zeros(k_blocks.shape, jnp.float32), jnp.zeros(v_blocks.shape, jnp.float32)
    (dk, dv), dq = lax.scan(query_block, start, jnp.arange(q_blocks.shape[0]))
    dk, dv = (_from_blocks(x, k.shape) for x in (dk, dv))
    return _from_query_blocks(dq, q.shape), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _scores(
    scale: float,
    window: int | None,
    q_block: Float[Array, "B K G b H"],
    k_block: Float[Array, "B K b H"],
    i: Array,
    j: Array,
    segments: Int[Array, "n B b"] | None,
) -> Float[Array, "B K G b b"]:
    """Returns the scaled scores of query block i and key block j, MASKED where the query may not look."""
    block = q_block.shape[-2]
    query, key = i * block + jnp.arange(block)[:, None], j * block + jnp.arange(block)[None, :]
    visible = key <= query
    if window is not None:
        visible &= query - key < window
    if segments is not None:
        visible &= (segments[i][:, :, None] == segments[j][:, None, :])[:, None, None]
    return jnp.where(visible, scale * _f32_einsum("bkgqh,bksh->bkgqs", q_block, k_block), MASKED)


def _first_visible_block(index: Array, block: int, window: int | None) -> Array | int:
    return 0 if window is None else jnp.maximum(index * block - window + 1, 0) // block


def _f32_einsum(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _block_grid(length: int) -> tuple[int, int]:
    """Returns the number of blocks and the tokens a block: as few as fit, evenly filled, in steps of 8 tokens."""
    number = math.ceil(length / MAX_BLOCK)
    return number, length if number == 1 else math.ceil(length / number / 8) * 8


def _to_blocks(x: Array) -> Array:
    """[B, T, K, H] -> [n, B, K, b, H], or [B, T] -> [n, B, b]."""
    number, block = _block_grid(x.shape[1])
    x = jnp.pad(x, [(0, 0), (0, number * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], number, block, *x.shape[2:])
    return x.transpose(1, 0, 2) if x.ndim == 3 else x.transpose(1, 0, 3, 2, 4)


def _from_blocks(x: Array, shape: tuple[int, ...]) -> Array:
    """[n, B, K, b, H] -> [B, T, K, H], the given shape."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(shape[0], -1, *shape[2:])[:, : shape[1]]


def _to_query_blocks(x: Array, num_kv_heads: int) -> Array:
    """[B, T, N, H] -> [n, B, K, G, b, H]."""
    x = _to_blocks(x)
    return x.reshape(*x.shape[:2], num_kv_heads, -1, *x.shape[3:])


def _from_query_blocks(x: Array, shape: tuple[int, ...]) -> Array:
    """[n, B, K, G, b, H] -> [B, T, N, H], the given shape."""
    return _from_blocks(x.reshape(*x.shape[:2], -1, *x.shape[4:]), shape)
