"""Block-sparse causal attention on a GPU through Triton, forward and backward.

The published CUDA kernels (infllmv2_cuda_impl) give a program one query, whose group of heads are its rows, and read
each query's blocks for it alone. Here a program has a tile of consecutive queries: it walks the union of their blocks
(`tile_unions.py`), with a bit for each query that says whether it chose the block. Neighbours choose much the same
blocks, so that a block read once serves all of them, and the rows of a product fill a tensor core. Keys are masked one
by one only in blocks that not all of a tile's queries may see whole: those at the diagonal and at a document's ends.

The gradient to the queries walks the same union. The gradients to the keys walk it turned round: a program has one
block and meets the tiles that chose it, in order, so that sums are the same in every run.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention.tile_unions import block_tiles, tile_unions
from kernels_pallas.block_sparse_attention.tuned_block_sizes import GPU_ROWS, GPU_STAGES, GPU_WARPS
from kernels_pallas.query_tiles import QueryTiles
from kernels_pallas.sparse_decode_attention import pallas_gpu as decode

# Softmax in powers of two, which a GPU computes directly.
LOG2_E = math.log2(math.e)
# What a maximum begins with: far above MASKED, so that a masked score has the weight 0 where nothing was seen so far.
LOWEST = -1e30
ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def unsupported_reason(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], block_size: int) -> str | None:
    """Says why the kernels cannot serve these arguments, or None if they can."""
    tiles = QueryTiles.of(q, k.shape[2], GPU_ROWS.get(q.dtype.itemsize, 0))
    if (size := tiles.batch * tiles.kv_heads * tiles.number * tiles.rows * q.shape[3]) >= 2**31:
        return f"queries of {size} numbers in whole tiles: must be below 2**31, as Pallas counts offsets in 32 bits"
    return decode.unsupported_reason(q, k, block_size)


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_ids: Int[Array, "B K T I"],
    segment_ids: Int[Array, "B S"] | None,
    block_size: int,
    scale: float,
    query_positions: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """See `kernels_pallas.block_sparse_attention.api.block_sparse_attention`; returns the output and the log-sum-exp.

    `interpret` runs the kernels' programs step by step on any device, for tests.
    """
    if query_positions is None:
        query_positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    return _attention(block_size, scale, interpret, q, k, v, block_ids, query_positions, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(block_size: int, scale: float, interpret: bool, *args: Any) -> tuple[Array, Array]:
    return _attention_fwd(block_size, scale, interpret, *args)[0]


def _attention_fwd(block_size: int, scale: float, interpret: bool, *args: Any) -> tuple[tuple[Array, Array], tuple]:
    q, k, v, block_ids, positions, segment_ids = args
    tiles, keys = _layout(q, k, block_size)
    tables = _tables(tiles, keys, block_ids, positions, segment_ids)
    of_queries = tiles.block_spec(keys.head_dim)
    out, lse = pl.pallas_call(
        functools.partial(_forward_kernel, tiles, keys, scale),
        grid=(tiles.number, tiles.batch * tiles.kv_heads),
        in_specs=[*[ANYWHERE] * (len(tables) + 2), of_queries],
        out_specs=(of_queries, tiles.block_spec()),
        out_shape=(tiles.shape(q.dtype, keys.head_dim), tiles.shape(jnp.float32)),
        compiler_params=_compiler_params("forward", q),
        interpret=interpret,
        name="block_sparse_attention_forward",
    )(*tables, *(keys.to_keys(x.astype(q.dtype)) for x in (k, v)), tiles.to_rows(q))
    out, lse = tiles.from_rows(out), tiles.from_rows(lse).transpose(0, 2, 1)
    return (out, lse), (*args, out, lse)


def _attention_bwd(block_size: int, scale: float, interpret: bool, residuals: tuple, gradients: tuple) -> tuple:
    q, k, v, block_ids, positions, segment_ids, out, lse = residuals
    dout, dlse = gradients
    tiles, keys = _layout(q, k, block_size)
    # sum_s p_s · dp_s of the softmax's gradient equals out · dout; the gradient to lse adds p_s · dlse.
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1) - dlse.transpose(0, 2, 1)
    # A query that saw nothing has the weights exp(score - inf) = 0.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, LOG2_E * lse).transpose(0, 2, 1)
    rows = [tiles.to_rows(x) for x in (q, dout.astype(q.dtype), lse, delta)]
    by_blocks = [keys.to_keys(x.astype(q.dtype)) for x in (k, v)]
    tables = _tables(tiles, keys, block_ids, positions, segment_ids)

    of_queries = tiles.block_spec(keys.head_dim)
    dq = pl.pallas_call(
        functools.partial(_dq_kernel, tiles, keys, scale),
        grid=(tiles.number, tiles.batch * tiles.kv_heads),
        in_specs=[*[ANYWHERE] * (len(tables) + 2), *[of_queries] * 2, *[tiles.block_spec()] * 2],
        out_specs=of_queries,
        out_shape=tiles.shape(q.dtype, keys.head_dim),
        compiler_params=_compiler_params("dq", q),
        interpret=interpret,
        name="block_sparse_attention_dq",
    )(*tables, *by_blocks, *rows)

    whole = jnp.arange(tables.ids.shape[-1]) < tables.num_whole[..., None]
    turned = block_tiles(tables.ids, tables.words, whole, keys.num_blocks)
    of_block = pl.BlockSpec((None, None, block_size, keys.head_dim), lambda c, h: (*tiles.batch_and_head(h), c, 0))
    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, tiles, keys, scale),
        # From the first block on: the initial ones, which all queries choose, take longest.
        grid=(keys.num_blocks, tiles.batch * tiles.kv_heads),
        in_specs=[*[ANYWHERE] * (len(turned) + len(tables) + len(rows)), of_block, of_block],
        out_specs=(of_block, of_block),
        out_shape=[jax.ShapeDtypeStruct(x.shape, of.dtype) for x, of in zip(by_blocks, (k, v), strict=True)],
        compiler_params=_compiler_params("dkv", q),
        interpret=interpret,
        name="block_sparse_attention_dkv",
    )(*turned, *tables, *rows, *by_blocks)
    return tiles.from_rows(dq), keys.from_keys(dk), keys.from_keys(dv), None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


class _Keys(NamedTuple):
    """Keys and values by blocks: C blocks of b tokens, the last one filled up."""

    length: int
    block_size: int
    head_dim: int

    @property
    def num_blocks(self) -> int:
        return max(math.ceil(self.length / self.block_size), 1)

    @property
    def missing(self) -> int:
        return self.num_blocks * self.block_size - self.length

    def to_keys(self, x: Array) -> Array:
        """[B, S, K, H] -> [B, K, C·b, H]."""
        return jnp.pad(x, ((0, 0), (0, self.missing), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    def from_keys(self, x: Array) -> Array:
        """[B, K, C·b, H] -> [B, S, K, H]."""
        return x[:, :, : self.length].transpose(0, 2, 1, 3)

    def slots(self, block: Any) -> Any:
        """Where a block lies."""
        return pl.ds(block * self.block_size, self.block_size)


def _layout(q: Array, k: Array, block_size: int) -> tuple[QueryTiles, _Keys]:
    tiles = QueryTiles.of(q, k.shape[2], GPU_ROWS[q.dtype.itemsize])
    return tiles, _Keys(k.shape[1], block_size, q.shape[3])


class _Tables(NamedTuple):
    """What the kernels read besides the vectors: the unions of tiles, and where their rows and the keys lie.

    Attributes:
        ids: blocks of each tile's union; first those that all its queries may see whole.
        words: which queries chose each.
        num_whole: how many those are.
        counts: how many blocks there are.
        positions: of the rows.
        query_segments: theirs; without documents a zero that nobody reads, as for the keys.
        key_segments: theirs.
    """

    ids: Int[Array, "B K M U"]
    words: Int[Array, "B K M U"]
    num_whole: Int[Array, "B K M"]
    counts: Int[Array, "B K M"]
    positions: Int[Array, "B M R"]
    query_segments: Int[Array, "B M R"]
    key_segments: Int[Array, "B S"]


def _tables(tiles: QueryTiles, keys: _Keys, block_ids: Array, positions: Array, segment_ids: Array | None) -> _Tables:
    ids, words, counts = tile_unions(tiles.fill(block_ids, axis=2, value=-1), tiles.tile, keys.num_blocks, multiple=1)
    places = tiles.repeated(positions, value=-1)  # [B, M, R]
    whole = (words != 0) & ((ids + 1) * keys.block_size <= places.min(axis=2)[:, None, :, None] + 1)
    if segment_ids is None:
        # Whole blocks lie before the others: they are in ascending order.
        segments = jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)
    else:
        of_queries = tiles.repeated(jnp.take_along_axis(segment_ids, jnp.maximum(positions, 0), axis=1), value=0)
        of_keys = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, keys.missing)))
        segments = of_queries, of_keys
        blocks = of_keys.reshape(tiles.batch, 1, 1, keys.num_blocks, keys.block_size)
        for extreme in (jnp.min, jnp.max):
            of_block = jnp.take_along_axis(extreme(blocks, axis=4), ids, axis=3)
            for of_tile in (of_queries.min(axis=2), of_queries.max(axis=2)):
                whole &= of_block == of_tile[:, None, :, None]
        # A stable sort, so that sums are in the same order in every run.
        last, ids, words = lax.sort(((~whole).astype(jnp.int32) + (words == 0), ids, words), num_keys=1)
        whole = last == 0
    return _Tables(ids, words, whole.sum(axis=3, dtype=jnp.int32), counts, places, *segments)


def _compiler_params(kernel: str, q: Array) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=GPU_WARPS[q.dtype.itemsize][kernel], num_stages=GPU_STAGES)


def _dot(x: Array, y: Array, *, trans_b: bool = False) -> Array:
    """Multiplies with sums in float32; float32 factors at full precision."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return plgpu.dot(x, y, trans_b=trans_b, precision=precision)


def _visible(layout: _Keys, rows: tuple[Array, Array | None], tables: _Tables, batch: Any, block: Any) -> Array:
    """Which keys of a block some rows may see, given their positions and segments as [R, 1], or [1, R] for [b, R]."""
    positions, segments = rows
    axis = 1 - positions.shape.index(1)
    key = jnp.expand_dims(block * layout.block_size + jnp.arange(layout.block_size), axis)
    visible = key <= positions
    if segments is not None:
        visible &= jnp.expand_dims(tables.key_segments[batch, layout.slots(block)], axis) == segments
    return visible


def _places(tiles: QueryTiles, tables: _Tables, batch: Any, tile: Any, axis: int) -> tuple[Array, Array | None]:
    """Positions and segments of a tile's rows, with a new axis."""
    packed = tables.query_segments.shape[-1] == tiles.rows
    of_rows = (tables.positions, tables.query_segments) if packed else (tables.positions,)
    positions, *segments = (jnp.expand_dims(x[batch, tile, :], axis) for x in of_rows)
    return positions, segments[0] if packed else None


def _chosen(tiles: QueryTiles, word: Any) -> Array:
    """[R], whether a row's query chose the block."""
    query = tiles.query_of_row()
    return (lax.shift_right_logical(jnp.broadcast_to(word, query.shape), query) & 1) == 1


def _walk(tables: _Tables, index: tuple, step: Callable, state: Any) -> Any:
    """Takes a step for each block of a tile's union, those that need no mask first."""
    whole = tables.num_whole[index]
    state = lax.fori_loop(0, whole, functools.partial(step, False), state)
    return lax.fori_loop(whole, tables.counts[index], functools.partial(step, True), state)


def _forward_kernel(tiles: QueryTiles, layout: _Keys, scale: float, *refs: Any) -> None:
    """Writes a tile's output and log-sum-exp by FlashAttention's online softmax."""
    tables, (keys, values, q_ref, out_ref, lse_ref) = _Tables(*refs[:7]), refs[7:]
    m, (b, h) = pl.program_id(0), tiles.batch_and_head(pl.program_id(1))
    q = q_ref[...]  # [R, H]
    rows = _places(tiles, tables, b, m, axis=1)

    def step(masked: bool, i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum, total, acc = state  # [R], [R], [R, H]
        block, chosen = tables.ids[b, h, m, i], _chosen(tiles, tables.words[b, h, m, i])
        slots = layout.slots(block)
        scores = scale * LOG2_E * _dot(q, keys[b, h, slots], trans_b=True)  # [R, b]
        if masked:
            scores = jnp.where(_visible(layout, rows, tables, b, block), scores, decode.MASKED)
        now = jnp.where(chosen, jnp.maximum(maximum, scores.max(axis=1)), maximum)
        weights = jnp.exp2(scores - jnp.where(chosen, now, jnp.inf)[:, None])
        shrink = jnp.exp2(maximum - now)
        product = _dot(weights.astype(q.dtype), values[b, h, slots])
        return now, total * shrink + weights.sum(axis=1), acc * shrink[:, None] + product

    empty = jnp.full((tiles.rows,), LOWEST), jnp.zeros((tiles.rows,)), jnp.zeros(q.shape)
    maximum, total, acc = _walk(tables, (b, h, m), step, empty)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out_ref[...] = (acc / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(seen, maximum / LOG2_E + jnp.log(total), -jnp.inf)


def _dq_kernel(tiles: QueryTiles, layout: _Keys, scale: float, *refs: Any) -> None:
    """Writes the gradient to a tile's queries (FlashAttention-2, algorithm 2, by rows)."""
    tables, (keys, values, q_ref, dout_ref, lse_ref, delta_ref, dq_ref) = _Tables(*refs[:7]), refs[7:]
    m, (b, h) = pl.program_id(0), tiles.batch_and_head(pl.program_id(1))
    q, dout, lse, delta = q_ref[...], dout_ref[...], lse_ref[...], delta_ref[...]
    rows = _places(tiles, tables, b, m, axis=1)

    def step(masked: bool, i: Array, dq: Array) -> Array:
        block, chosen = tables.ids[b, h, m, i], _chosen(tiles, tables.words[b, h, m, i])
        slots = layout.slots(block)
        k = keys[b, h, slots]
        scores = scale * LOG2_E * _dot(q, k, trans_b=True)
        if masked:
            scores = jnp.where(_visible(layout, rows, tables, b, block), scores, decode.MASKED)
        weights = jnp.exp2(scores - jnp.where(chosen, lse, jnp.inf)[:, None])
        dscores = weights * (_dot(dout, values[b, h, slots], trans_b=True) - delta[:, None])
        return dq + _dot(dscores.astype(q.dtype), k)

    dq = _walk(tables, (b, h, m), step, jnp.zeros(q.shape))
    dq_ref[...] = (scale * dq).astype(dq_ref.dtype)


def _dkv_kernel(tiles: QueryTiles, layout: _Keys, scale: float, *refs: Any) -> None:
    """Writes the gradients to a block's keys and values, of all tiles that chose it."""
    (entries, starts), tables = refs[:2], _Tables(*refs[2:9])
    rows, douts, lses, deltas, k_ref, v_ref, dk_ref, dv_ref = refs[9:]
    c, (b, h) = pl.program_id(0), tiles.batch_and_head(pl.program_id(1))
    k, v = k_ref[...], v_ref[...]  # [b, H]
    per_tile = tables.ids.shape[3]

    def step(masked: bool, i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        dk, dv = state
        entry = entries[b, h, i]
        m = lax.div(entry, per_tile)
        chosen = _chosen(tiles, tables.words[b, h, m, lax.rem(entry, per_tile)])
        q, dout = rows[b, h, m], douts[b, h, m]  # [R, H]
        scores = scale * LOG2_E * _dot(k, q, trans_b=True)  # [b, R]
        if masked:
            visible = _visible(layout, _places(tiles, tables, b, m, axis=0), tables, b, c)
            scores = jnp.where(visible, scores, decode.MASKED)
        weights = jnp.exp2(scores - jnp.where(chosen, lses[b, h, m, :], jnp.inf)[None])
        dv += _dot(weights.astype(q.dtype), dout)
        dscores = weights * (_dot(v, dout, trans_b=True) - deltas[b, h, m, :][None])
        return dk + _dot(dscores.astype(q.dtype), q), dv

    state = jnp.zeros(k.shape), jnp.zeros(v.shape)
    begin, whole, end = (starts[b, h, 2 * c + i] for i in range(3))
    state = lax.fori_loop(begin, whole, functools.partial(step, True), state)
    dk, dv = lax.fori_loop(whole, end, functools.partial(step, False), state)
    dk_ref[...], dv_ref[...] = (scale * dk).astype(dk_ref.dtype), dv.astype(dv_ref.dtype)
