"""Attention over chosen blocks in plain JAX: each block of keys meets the queries that chose it.

A query that fetched its own blocks would read them for itself alone. Here the lists are turned round once
(`transposed_index.py`). A tile of consecutive queries walks the blocks that most of them chose, several at a time,
with a mask per query: the local and the initial blocks, and what neighbours share. Then each block meets the other
queries that chose it, hundreds at a time. Either way a matrix product has thousands of rows, whatever the lists are,
and at most half of what it computes was not chosen.

The output of a query grows by FlashAttention's online softmax; the backward pass (FlashAttention, algorithm 4) walks
the same tiles and groups. Memory is linear in the length: one key/value head of one sequence is worked on at a time,
with its index of T·I numbers and its accumulators [T, G, H] in float32.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention.transposed_index import TransposedIndex, transpose_index

# Rows are queries times heads. The longer a group the better its product with one block, and the more of it is filled
# up: of 1,024, 2,048 and 4,096 rows the first two took a tenth less time over 6,144 queries at 32K. A tile of 1,024
# rows and 512 keys runs at a CPU's best.
ROWS_PER_GROUP = 2048
ROWS_PER_TILE = 1024
KEYS_PER_STEP = 512
# As in attention/xla.py: finite, so that a wholly masked row gives exp(0) and not nan; what it adds is multiplied by
# exp(MASKED - m) = 0 when the row meets its first visible key, and dropped at the end if it meets none.
MASKED = -0.7 * float(np.finfo(np.float32).max)


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
    """See `kernels_pallas.block_sparse_attention.api.block_sparse_attention`."""
    if query_positions is None:
        query_positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    return _attention(block_size, scale, q, k, v, block_ids, query_positions, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(block_size: int, scale: float, *args: Any) -> tuple[Array, Array]:
    return _forward(block_size, scale, *args)


def _attention_fwd(block_size: int, scale: float, *args: Any) -> tuple[tuple[Array, Array], tuple]:
    out, lse = _forward(block_size, scale, *args)
    return (out, lse), (*args, out, lse)


class _Sizes(NamedTuple):
    """Of the pieces that a head is worked on in."""

    tile: int
    group: int
    blocks_per_step: int

    @classmethod
    def of(cls, length: int, num_blocks: int, per_query: int, num_groups: int, block_size: int) -> "_Sizes":
        tile = min(length, 256, max(ROWS_PER_TILE // num_groups, 64))
        # Groups are filled up with absent queries, so that they are not longer than a block's list is on average. Tiles
        # have served most of it: of the lists of 512 queries at 32K they leave 0.2 to 0.4.
        average = math.ceil(length * per_query / num_blocks / 4)
        group = min(max(ROWS_PER_GROUP // num_groups, 1), average)
        return cls(tile, group, min(max(KEYS_PER_STEP // block_size, 1), num_blocks))


class _Head(NamedTuple):
    """One key/value head of one sequence and its G query heads.

    Attributes:
        q: [T' + 1, G, H], the queries in whole tiles, and one row that stands for the queries a group lacks.
        k: [C, b, H].
        v: [C, b, H].
        positions: [T' + 1].
        query_segments: [T' + 1].
        key_segments: [C, b].
        chosen: who chose what.
    """

    q: Float[Array, "T1 G H"]
    k: Float[Array, "C b H"]
    v: Float[Array, "C b H"]
    positions: Int[Array, " T1"]
    query_segments: Int[Array, " T1"] | None
    key_segments: Int[Array, "C b"] | None
    chosen: TransposedIndex

    def keys(self, blocks: Array) -> tuple[Array, Array]:
        """Keys and values of [m] blocks, each [m·b, H]; of the last block where a number is C."""
        blocks = jnp.minimum(blocks, self.k.shape[0] - 1)
        return _rows(self.k, blocks).reshape(-1, self.k.shape[2]), _rows(self.v, blocks).reshape(-1, self.v.shape[2])

    def visible(self, queries: Array, blocks: Array) -> Array:
        """[R, m·b]: which of the blocks' keys are not after a query, and of its document."""
        block_size = self.k.shape[1]
        keys = (blocks[:, None] * block_size + jnp.arange(block_size)).ravel()
        visible = keys <= _rows(self.positions, queries)[:, None]
        if self.key_segments is not None and self.query_segments is not None:
            segments = _rows(self.key_segments, jnp.minimum(blocks, self.k.shape[0] - 1)).ravel()
            visible &= segments == _rows(self.query_segments, queries)[:, None]
        return visible


def _head(
    index: Array,
    block_size: int,
    q: Array,
    k: Array,
    v: Array,
    block_ids: Array,
    query_positions: Array,
    segment_ids: Array | None,
) -> tuple[_Head, _Sizes]:
    """Takes one head out of the arguments; keys and values as [B, K, S, H], so that a head of them lies together."""
    length, num_groups, per_query = q.shape[1], q.shape[2] // k.shape[1], block_ids.shape[3]
    batch_index, head = index // k.shape[1], index % k.shape[1]
    k, v = (_to_blocks(x[batch_index, head], block_size) for x in (k, v))
    sizes = _Sizes.of(length, k.shape[0], per_query, num_groups, block_size)
    positions = _pad_queries(query_positions[batch_index], sizes)
    ids = _pad_queries(block_ids[batch_index, head], sizes, -1)[:-1]
    transposed = transpose_index(
        ids,
        positions[:-1],
        num_blocks=k.shape[0],
        block_size=block_size,
        tile_size=sizes.tile,
        blocks_per_step=sizes.blocks_per_step,
        group_size=sizes.group,
    )
    query_segments = key_segments = None
    if segment_ids is not None:
        segments = segment_ids[batch_index]
        key_segments, query_segments = _to_blocks(segments, block_size), segments[jnp.maximum(positions, 0)]
    rows = _pad_queries(_take_heads(q, batch_index, head * num_groups, num_groups), sizes)
    return _Head(rows, k, v, positions, query_segments, key_segments, transposed), sizes


def _scores(scale: float, q_rows: Array, k_rows: Array, visible: Array) -> Float[Array, "R G s"]:
    """Returns the scaled scores of R queries and s keys, MASKED where a query may not look."""
    return jnp.where(visible[:, None], scale * _f32_einsum("rgh,sh->rgs", q_rows, k_rows), MASKED)


def _forward(block_size: int, scale: float, *args: Any) -> tuple[Array, Array]:
    """Returns the output [B, T, N, H] and the log-sum-exp [B, N, T]."""
    q, k, v, *others = args
    length, num_heads = q.shape[1], k.shape[2]
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))

    def one_head(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], None]:
        head, sizes = _head(index, block_size, q, k, v, *others)
        rows, blocks_per_step = head.q.shape[0], sizes.blocks_per_step

        def tile(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            queries = i * sizes.tile + jnp.arange(sizes.tile)
            q_rows = _rows(head.q, queries)

            def step(j: Array, of_rows: tuple[Array, ...]) -> tuple[Array, ...]:
                blocks, chosen = head.chosen.tile_step(i, j, blocks_per_step)
                k_rows, v_rows = head.keys(blocks)
                visible = head.visible(queries, blocks) & jnp.repeat(chosen, block_size, axis=1)
                return _online_softmax(of_rows, _scores(scale, q_rows, k_rows, visible), v_rows)

            steps = _divide_up(head.chosen.tile_counts[i], blocks_per_step)
            return _put(state, queries, lax.fori_loop(0, steps, step, _get(state, queries)))

        def block(c: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            k_rows, v_rows = head.keys(c[None])

            def group(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
                queries = head.chosen.queries_of(c, i, sizes.group, absent=rows - 1)
                scores = _scores(scale, _rows(head.q, queries), k_rows, head.visible(queries, c[None]))
                return _put(state, queries, _online_softmax(_get(state, queries), scores, v_rows))

            return lax.fori_loop(0, _groups_of(head, c, sizes), group, state)

        shape = head.q.shape
        state = jnp.full(shape[:2], MASKED), jnp.zeros(shape[:2]), jnp.zeros(shape)
        state = lax.fori_loop(0, rows // sizes.tile, tile, state)
        maximum, total, acc = (x[:length] for x in lax.fori_loop(0, head.k.shape[0], block, state))
        blind = maximum <= MASKED
        out = jnp.where(blind[..., None], 0.0, acc / jnp.where(blind, 1.0, total)[..., None])
        lse = jnp.where(blind, -jnp.inf, maximum + jnp.log(jnp.where(blind, 1.0, total)))
        outs, lses = carry
        outs = _put_heads(outs, out.astype(q.dtype), index, num_heads)
        return (outs, _put_heads(lses, lse, index, num_heads)), None

    start = jnp.zeros_like(q), jnp.zeros(q.shape[:3])
    (out, lse), _ = lax.scan(one_head, start, jnp.arange(q.shape[0] * num_heads))
    return out, lse.transpose(0, 2, 1)


def _online_softmax(of_rows: tuple[Array, ...], scores: Array, v_rows: Array) -> tuple[Array, ...]:
    """Adds keys to the maximum [R, G], the sum [R, G] and the weighted values [R, G, H] of some queries."""
    maximum, total, acc = of_rows
    new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
    weights = jnp.exp(scores - new_maximum[..., None])
    shrink = jnp.exp(maximum - new_maximum)
    acc = acc * shrink[..., None] + _f32_einsum("rgs,sh->rgh", weights.astype(v_rows.dtype), v_rows)
    return new_maximum, total * shrink + weights.sum(axis=-1), acc


def _attention_bwd(block_size: int, scale: float, residuals: tuple, gradients: tuple[Array, Array]) -> tuple:
    """Returns the gradients to the arguments of `_attention`, which with its two outputs are the residuals."""
    q, k, v, *others, out, lse = residuals
    dout, dlse = gradients
    batch, length, num_heads = q.shape[0], q.shape[1], k.shape[2]
    k, v = (jnp.swapaxes(x, 1, 2) for x in (k, v))
    # sum_s p_s · dp_s of the softmax's gradient equals out · dout; the gradient to lse adds p_s · dlse.
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1) - dlse.transpose(0, 2, 1)
    # A query that saw nothing has the weights exp(score - inf) = 0; the rows that stand for no query likewise.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse).transpose(0, 2, 1)

    def one_head(dq: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
        head, sizes = _head(index, block_size, q, k, v, *others)
        rows, num_groups, _ = head.q.shape

        def of_head(x: Array, fill: float) -> Array:
            heads = _take_heads(x, index // num_heads, index % num_heads * num_groups, num_groups)
            return _pad_queries(heads, sizes, fill)

        dout_head, lse_head, delta_head = of_head(dout, 0), of_head(lse, jnp.inf), of_head(delta, 0)

        def gradients_of(queries: Array, k_rows: Array, v_rows: Array, visible: Array) -> tuple[Array, Array, Array]:
            """Of some queries [R, G, H] and of some keys and values [s, H], as far as they concern one another."""
            q_rows, dout_rows = _rows(head.q, queries), _rows(dout_head, queries)
            scores = _scores(scale, q_rows, k_rows, visible)
            weights = jnp.exp(scores - _rows(lse_head, queries)[..., None])
            dweights = _f32_einsum("rgh,sh->rgs", dout_rows, v_rows)
            dscores = (scale * weights * (dweights - _rows(delta_head, queries)[..., None])).astype(q.dtype)
            return (
                _f32_einsum("rgs,sh->rgh", dscores, k_rows),
                _f32_einsum("rgs,rgh->sh", dscores, q_rows),
                _f32_einsum("rgs,rgh->sh", weights.astype(dout.dtype), dout_rows),
            )

        def tile(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            queries = i * sizes.tile + jnp.arange(sizes.tile)

            def step(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                dq_rows, dk, dv = carry
                blocks, chosen = head.chosen.tile_step(i, j, sizes.blocks_per_step)
                visible = head.visible(queries, blocks) & jnp.repeat(chosen, block_size, axis=1)
                more_dq, *more = gradients_of(queries, *head.keys(blocks), visible)
                dk, dv = (x.at[blocks].add(y.reshape(-1, *x.shape[1:])) for x, y in zip((dk, dv), more, strict=True))
                return dq_rows + more_dq, dk, dv

            dq_head, dk, dv = state
            steps = _divide_up(head.chosen.tile_counts[i], sizes.blocks_per_step)
            dq_rows, dk, dv = lax.fori_loop(0, steps, step, (_rows(dq_head, queries), dk, dv))
            return _set(dq_head, queries, dq_rows), dk, dv

        def block(c: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
            k_rows, v_rows = head.keys(c[None])

            def group(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
                dq_head, dk, dv = carry
                queries = head.chosen.queries_of(c, i, sizes.group, absent=rows - 1)
                more = gradients_of(queries, k_rows, v_rows, head.visible(queries, c[None]))
                return _set(dq_head, queries, _rows(dq_head, queries) + more[0]), dk + more[1], dv + more[2]

            dq_head, *dkv = state
            dq_head, *more = lax.fori_loop(0, _groups_of(head, c, sizes), group, (dq_head, dkv[0][c], dkv[1][c]))
            return dq_head, *(x.at[c].set(y) for x, y in zip(dkv, more, strict=True))

        # One block more than there are: steps of a tile that has no more blocks add their zeros there.
        blocks_shape = head.k.shape[0] + 1, *head.k.shape[1:]
        state = tuple(jnp.zeros(shape, jnp.float32) for shape in (head.q.shape, blocks_shape, blocks_shape))
        state = lax.fori_loop(0, rows // sizes.tile, tile, state)
        dq_head, dk, dv = lax.fori_loop(0, head.k.shape[0], block, state)
        dq = _put_heads(dq, dq_head[:length].astype(q.dtype), index, num_heads)
        return dq, (dk[:-1].astype(k.dtype), dv[:-1].astype(v.dtype))

    dq, dkv = lax.scan(one_head, jnp.zeros_like(q), jnp.arange(batch * num_heads))
    dk, dv = (x.reshape(batch, num_heads, -1, x.shape[-1])[:, :, : k.shape[2]].transpose(0, 2, 1, 3) for x in dkv)
    return dq, dk, dv, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _groups_of(head: _Head, c: Array, sizes: _Sizes) -> Array:
    return _divide_up(head.chosen.starts[c + 1] - head.chosen.starts[c], sizes.group)


def _divide_up(x: Array, y: int) -> Array:
    return (x + y - 1) // y


def _f32_einsum(subscripts: str, x: Array, y: Array) -> Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _rows(x: Array, rows: Array) -> Array:
    return x.at[rows].get(mode="promise_in_bounds")


def _set(x: Array, rows: Array, values: Array) -> Array:
    return x.at[rows].set(values, mode="promise_in_bounds")


def _get(state: tuple[Array, ...], rows: Array) -> tuple[Array, ...]:
    return tuple(_rows(x, rows) for x in state)


def _put(state: tuple[Array, ...], rows: Array, values: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(_set(x, rows, y) for x, y in zip(state, values, strict=True))


def _pad_queries(x: Array, sizes: _Sizes, fill: float = 0) -> Array:
    """[T, ...] -> [T' + 1, ...], whole tiles and one row more."""
    padding = -x.shape[0] % sizes.tile + 1
    return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)


def _take_heads(x: Array, batch_index: Array, first: Array, number: int) -> Array:
    """[B, T, N, ...] -> [T, number, ...]."""
    return lax.dynamic_slice_in_dim(x[batch_index], first, number, axis=1)


def _put_heads(x: Array, values: Array, index: Array, num_kv_heads: int) -> Array:
    """Writes [T, G, ...] into [B, T, N, ...] where key/value head `index` of B·K has its query heads."""
    batch_index, first = index // num_kv_heads, index % num_kv_heads * values.shape[1]
    return lax.dynamic_update_slice(x, values[None], (batch_index, 0, first, *[0] * (x.ndim - 3)))


def _to_blocks(x: Array, block_size: int) -> Array:
    """[S, ...] -> [C, block_size, ...], padded at the end, where no query looks."""
    blocks = math.ceil(x.shape[0] / block_size)
    x = jnp.pad(x, [(0, blocks * block_size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(blocks, block_size, *x.shape[1:])
