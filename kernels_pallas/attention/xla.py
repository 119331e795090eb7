"""Causal attention in tiles, in plain JAX: no more than one tile of scores per head exists at any time.

The online softmax of Milakov & Gimelshein (2018) over tiles, with FlashAttention's backward pass (Dao et al., 2022,
algorithm 4): the forward pass keeps the output and the log-sum-exp of each row, the backward pass computes each
tile's probabilities again. Each block of queries meets, in a loop, the tiles of keys that lie wholly before its own
tile, and then its own tile up to the diagonal; what lies above the diagonal or outside the window costs nothing.

A row of T tokens is n tiles of keys, each as long as m blocks of b queries (S = m·b). Queries are
`[n, m, B, K, G·b, H]`, so that a block and the heads that share keys are the rows of one matrix; keys and values are
`[n, B, K, S, H]`. The last tile is padded at the end: no real query sees a padded key, and padded queries are cut off.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

# Blocks of 128 queries against tiles of 256 keys. On CPU products over 128 keys ran at 0.6 to 0.7 of the rate of those
# over 256 to 512; tiles of 512 were 4% faster at 2,048 tokens and no faster at 512.
MAX_BLOCK = 128
BLOCKS_PER_TILE = 2
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


class _Grid(NamedTuple):
    """How a row of T tokens is cut: n tiles of m blocks of b tokens."""

    tiles: int
    blocks: int
    block: int

    @property
    def tile(self) -> int:
        """Tokens of a tile, S."""
        return self.blocks * self.block


def _grid(length: int) -> _Grid:
    """As few blocks as fit, evenly filled, in steps of 8 tokens."""
    number = math.ceil(length / MAX_BLOCK)
    blocks = min(number, BLOCKS_PER_TILE)
    tiles = math.ceil(number / blocks)
    return _Grid(tiles, blocks, length if number == 1 else math.ceil(length / (tiles * blocks) / 8) * 8)


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
    """Returns the output [B, T, N, H] and the log-sum-exp of each query's scores, [n, m, B, K, G·b, 1]."""
    grid = _grid(q.shape[1])
    q_tiles, k_tiles, v_tiles = _to_query_tiles(q, k.shape[2], grid), _to_tiles(k, grid), _to_tiles(v, grid)
    segments = None if segment_ids is None else _to_tiles(segment_ids, grid)

    def query_block(i: Array, block: int) -> tuple[Array, Array]:
        q_block = q_tiles[i, block]

        def meet(j: Array, seen: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, acc = carry
            scores = _scores(scale, window, segments, q_block, i, block, grid, k_tiles[j, :, :, :seen], j)
            new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - new_maximum)
            shrink = jnp.exp(maximum - new_maximum)
            acc = acc * shrink + _f32_einsum("bkqs,bksh->bkqh", weights.astype(v.dtype), v_tiles[j, :, :, :seen])
            return new_maximum, total * shrink + weights.sum(axis=-1, keepdims=True), acc

        rows = (*q_block.shape[:-1], 1)
        start = jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros(q_block.shape, jnp.float32)
        first = _first_visible_tile(i, block, grid, window)
        before = lax.fori_loop(first, i, lambda j, carry: meet(j, grid.tile, carry), start)
        maximum, total, acc = meet(i, (block + 1) * grid.block, before)
        return (acc / total).astype(q.dtype), maximum + jnp.log(total)

    def query_tile(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
        outs, lses = zip(*(query_block(i, block) for block in range(grid.blocks)), strict=True)
        return None, (jnp.stack(outs), jnp.stack(lses))

    _, (out, lse) = lax.scan(query_tile, None, jnp.arange(grid.tiles))
    return _from_query_tiles(out, q.shape, k.shape[2]), lse


def _attention_bwd(scale: float, window: int | None, residuals: tuple, dout: Array) -> tuple:
    q, k, v, segment_ids, out, lse = residuals
    num_kv_heads, grid = k.shape[2], _grid(q.shape[1])
    q_tiles, dout_tiles = (_to_query_tiles(x, num_kv_heads, grid) for x in (q, dout))
    k_tiles, v_tiles = _to_tiles(k, grid), _to_tiles(v, grid)
    segments = None if segment_ids is None else _to_tiles(segment_ids, grid)
    # sum_s p_s · dp_s of the softmax's gradient equals out · dout.
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1, keepdims=True)
    delta_tiles = _to_query_tiles(delta, num_kv_heads, grid)

    # The gradients of keys and values are gathered as [n, B, K, H, S]: the large operand of their products, a tile of
    # scores, is then taken as it lies, and only blocks of queries are transposed.
    def query_block(i: Array, block: int, gathered: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        q_block, dout_block, lse_block, delta_block = (x[i, block] for x in (q_tiles, dout_tiles, lse, delta_tiles))
        q_t, dout_t = q_block.swapaxes(-1, -2), dout_block.swapaxes(-1, -2)

        def meet(j: Array, seen: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            k_tile, v_tile = k_tiles[j, :, :, :seen], v_tiles[j, :, :, :seen]
            weights = jnp.exp(_scores(scale, window, segments, q_block, i, block, grid, k_tile, j) - lse_block)
            dweights = _f32_einsum("bkqh,bksh->bkqs", dout_block, v_tile)
            dscores = (scale * weights * (dweights - delta_block)).astype(q.dtype)
            dq += _f32_einsum("bkqs,bksh->bkqh", dscores, k_tile)
            dk = dk.at[j, :, :, :, :seen].add(_f32_einsum("bkhq,bkqs->bkhs", q_t, dscores))
            dv = dv.at[j, :, :, :, :seen].add(_f32_einsum("bkhq,bkqs->bkhs", dout_t, weights.astype(dout.dtype)))
            return dq, dk, dv

        start = (jnp.zeros(q_block.shape, jnp.float32), *gathered)
        first = _first_visible_tile(i, block, grid, window)
        before = lax.fori_loop(first, i, lambda j, carry: meet(j, grid.tile, carry), start)
        return meet(i, (block + 1) * grid.block, before)

    def query_tile(gathered: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        dqs = []
        for block in range(grid.blocks):
            dq, dk, dv = query_block(i, block, gathered)
            gathered = dk, dv
            dqs.append(dq.astype(q.dtype))
        return gathered, jnp.stack(dqs)

    nothing = jnp.zeros(k_tiles.swapaxes(-1, -2).shape, jnp.float32)
    (dk, dv), dq = lax.scan(query_tile, (nothing, nothing), jnp.arange(grid.tiles))
    dk, dv = (_from_tiles(x.swapaxes(-1, -2), k.shape) for x in (dk, dv))
    return _from_query_tiles(dq, q.shape, num_kv_heads), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _scores(
    scale: float,
    window: int | None,
    segments: Int[Array, "n B S"] | None,
    q_block: Float[Array, "B K G*b H"],
    i: Array,
    block: int,
    grid: _Grid,
    k_tile: Float[Array, "B K s H"],
    j: Array,
) -> Float[Array, "B K G*b s"]:
    """Returns scaled scores of a block of query tile i and the first keys of tile j, MASKED where it may not look."""
    scores = scale * _f32_einsum("bkqh,bksh->bkqs", q_block, k_tile)
    length = k_tile.shape[2]
    first = block * grid.block
    query = i * grid.tile + first + jnp.arange(grid.block)[:, None]
    key = j * grid.tile + jnp.arange(length)[None, :]
    visible = None
    if i is j:  # other tiles lie wholly before the queries
        visible = key <= query
    if window is not None:
        near = query - key < window
        visible = near if visible is None else visible & near
    if segments is not None:
        same = segments[i, :, first : first + grid.block, None] == segments[j, :, None, :length]
        visible = same[:, None, None] if visible is None else visible & same[:, None, None]
    if visible is None:
        return scores
    grouped = scores.reshape(*scores.shape[:2], -1, grid.block, length)
    return jnp.where(visible, grouped, MASKED).reshape(scores.shape)


def _first_visible_tile(i: Array, block: int, grid: _Grid, window: int | None) -> Array | int:
    return 0 if window is None else jnp.maximum(i * grid.tile + block * grid.block - window + 1, 0) // grid.tile


def _f32_einsum(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _pad(x: Array, grid: _Grid) -> Array:
    return jnp.pad(x, [(0, 0), (0, grid.tiles * grid.tile - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _to_tiles(x: Array, grid: _Grid) -> Array:
    """[B, T, K, H] -> [n, B, K, S, H], or [B, T] -> [n, B, S]."""
    x = _pad(x, grid)
    x = x.reshape(x.shape[0], grid.tiles, grid.tile, *x.shape[2:])
    return x.transpose(1, 0, 2) if x.ndim == 3 else x.transpose(1, 0, 3, 2, 4)


def _from_tiles(x: Array, shape: tuple[int, ...]) -> Array:
    """[n, B, K, S, H] -> [B, T, K, H], the given shape."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(shape[0], -1, *shape[2:])[:, : shape[1]]


def _to_query_tiles(x: Array, num_kv_heads: int, grid: _Grid) -> Array:
    """[B, T, N, H] -> [n, m, B, K, G·b, H]."""
    x = _pad(x, grid)
    x = x.reshape(x.shape[0], grid.tiles, grid.blocks, grid.block, num_kv_heads, -1, x.shape[-1])
    x = x.transpose(1, 2, 0, 4, 5, 3, 6)
    return x.reshape(*x.shape[:4], -1, x.shape[-1])


def _from_query_tiles(x: Array, shape: tuple[int, ...], num_kv_heads: int) -> Array:
    """[n, m, B, K, G·b, H] -> [B, T, N, H], the given shape."""
    tiles, blocks, batch = x.shape[:3]
    x = x.reshape(tiles, blocks, batch, num_kv_heads, shape[2] // num_kv_heads, -1, shape[3])
    return x.transpose(2, 0, 1, 5, 3, 4, 6).reshape(batch, -1, *shape[2:])[:, : shape[1]]
