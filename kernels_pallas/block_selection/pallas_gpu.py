"""Block selection on a GPU through Triton: scores of blocks, added over the heads of a group, and their ranking.

Three kernels. The first takes the normaliser of each head's softmax, over the coarse kernels or, where it is exact, the
fine ones. The second scores the fine kernels, adds over the heads of a group and pools: 1/(G·4) of the scores at the
defaults reach memory. Fine kernels lie by their place in a block, so that the kernels which touch consecutive blocks in
the same way are neighbours and the max-pool is a maximum of whole tiles. The third finds the last score that is chosen
by halving the range of its bits, which takes no sorting, and writes the blocks down in their order.

Queries go through in spans, so that nothing of the size queries x blocks exists.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.block_selection.topk_blocks import select_by_spans, visible_blocks
from kernels_pallas.block_selection.tuned_block_sizes import (
    GPU_CHUNK,
    GPU_PROGRAMS,
    GPU_ROWS,
    GPU_SPAN_BYTES,
    GPU_STAGES,
    GPU_WARPS,
)
from kernels_pallas.query_tiles import MAX_TILE, QueryTiles
from kernels_pallas.sparse_decode_attention import pallas_gpu as decode

LOG2_E = math.log2(math.e)
# Finite, so that a row that has seen nothing gives 0 - 0 rather than inf - inf.
MASKED = decode.MASKED
# Scores of a query that one program ranks in registers.
MAX_BLOCKS = 2**14
ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)


def unsupported_reason(q: Float[Array, "B T N H"], kernels: Float[Array, "B J K H"], num_blocks: int) -> str | None:
    """Says why the kernels cannot serve these arguments, or None if they can."""
    if kernels.dtype != q.dtype:
        return f"q has dtype {q.dtype} and k_compressed {kernels.dtype}: must be the same"
    if num_blocks > MAX_BLOCKS:
        return f"{num_blocks} blocks: must be at most {MAX_BLOCKS}"
    # The sizes of blocks do not matter here.
    return decode.unsupported_reason(q, kernels, block_size=decode.LEAST)


def select_blocks(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B J K H"],
    k_coarse: Float[Array, "B J2 K H"] | None,
    scale: float,
    selection: BlockSelection,
    query_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
    num_blocks: int,
    interpret: bool = False,
) -> Int[Array, "B K T I"]:
    """See `kernels_pallas.block_selection.api.select_blocks`.

    `interpret` runs the kernels' programs step by step on any device, for tests.
    """

    def select(part: Array, positions: Array, starts: Array) -> Array:
        scores = _scores(part, k_compressed, k_coarse, scale, selection, positions, starts, num_blocks, interpret)
        return _best(scores, selection, positions, starts, num_blocks, interpret)

    shape = k_compressed.shape[2], min(selection.num_selected, num_blocks)
    # Whole tiles, of at most 32 queries.
    span = max(GPU_SPAN_BYTES // (4 * q.shape[0] * shape[0] * num_blocks * MAX_TILE), 1) * MAX_TILE
    return select_by_spans(select, span, q, query_positions, document_starts, shape)


def block_scores(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B J K H"],
    k_coarse: Float[Array, "B J2 K H"] | None,
    scale: float,
    selection: BlockSelection,
    query_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
    num_blocks: int,
    interpret: bool = False,
) -> Float[Array, "B K T C"]:
    """See `kernels_pallas.block_selection.api.block_scores`."""
    args = scale, selection, query_positions, document_starts, num_blocks
    scores = _scores(q, k_compressed, k_coarse, *args, interpret)[:, :, : q.shape[1], :num_blocks]
    visible = visible_blocks(selection, query_positions, document_starts, num_blocks)
    return jnp.where(visible, scores, -jnp.inf)


class _Kernels(NamedTuple):
    """Compressed keys and which of them a query sees: kernel j has the keys from stride·j on, `size` of them."""

    number: int
    size: int
    stride: int

    def visible(self, kernel: Array, positions: Array, starts: Array) -> Array:
        """[R, n] for [1, n] kernels and [R, 1] queries: all keys in its document, none after it."""
        first = self.stride * kernel
        return (starts <= first) & (first + (self.size - 1) <= positions) & (kernel >= 0) & (kernel < self.number)

    def range(self, positions: Array, starts: Array) -> tuple[Array, Array]:
        """The first kernel that any query along the last axis sees, and the one after the last."""
        end = jnp.clip((positions + 1 - self.size) // self.stride + 1, 0, self.number).max(axis=-1)
        return jnp.minimum((starts // self.stride).min(axis=-1), end), end


def _scores(
    q: Array,
    k_compressed: Array,
    k_coarse: Array | None,
    scale: float,
    selection: BlockSelection,
    positions: Array,
    starts: Array,
    num_blocks: int,
    interpret: bool,
) -> Float[Array, "B K T1 C1"]:
    """Scores of whole tiles of queries and chunks of blocks; what lies behind the last visible block is not written."""
    size = q.dtype.itemsize
    tiles = QueryTiles.of(q, k_compressed.shape[2], GPU_ROWS[size])
    chunk = GPU_CHUNK[size]
    rows = tiles.to_rows(q)
    of_rows = [tiles.repeated(positions, value=-1), tiles.repeated(starts, value=0)]
    grid = tiles.number, tiles.batch * tiles.kv_heads
    params = plgpu.CompilerParams(num_warps=GPU_WARPS[size], num_stages=GPU_STAGES)
    fine = _Kernels(k_compressed.shape[1], selection.kernel_size, selection.kernel_stride)
    normalising, sums = fine, k_compressed
    if k_coarse is not None:
        sums = k_coarse
        normalising = _Kernels(sums.shape[1], selection.coarse_kernel_size, selection.coarse_kernel_stride)

    missing = -max(sums.shape[1], 1) % chunk + (sums.shape[1] == 0)
    sums = jnp.pad(sums, ((0, 0), (0, missing), (0, 0), (0, 0))).transpose(0, 2, 1, 3)  # [B, K, J', H]
    begin, end = normalising.range(*of_rows)
    normaliser = pl.pallas_call(
        functools.partial(_normaliser_kernel, tiles, normalising, scale, chunk),
        grid=grid,
        in_specs=[*[ANYWHERE] * 5, tiles.block_spec(q.shape[3])],
        out_specs=tiles.block_spec(),
        out_shape=tiles.shape(jnp.float32),
        compiler_params=params,
        interpret=interpret,
        name="block_selection_normaliser",
    )(begin // chunk, -(-end // chunk), *of_rows, sums, rows)

    num_chunks = math.ceil(num_blocks / chunk)
    first = tiles.repeated(starts // selection.block_size, value=0)
    last = tiles.repeated(positions // selection.block_size, value=-1)
    splits = min(max(GPU_PROGRAMS // math.prod(grid), 1), num_chunks)
    per_split = math.ceil(num_chunks / splits)
    scores = pl.pallas_call(
        functools.partial(_scores_kernel, tiles, fine, selection, scale, chunk, per_split),
        grid=(*grid, splits),
        in_specs=[*[ANYWHERE] * 5, tiles.block_spec(q.shape[3]), tiles.block_spec()],
        out_specs=pl.BlockSpec(
            (None, None, tiles.tile, num_chunks * chunk), lambda m, h, s: (*tiles.batch_and_head(h), m, 0)
        ),
        out_shape=jax.ShapeDtypeStruct(
            (tiles.batch, tiles.kv_heads, tiles.number * tiles.tile, num_chunks * chunk), jnp.float32
        ),
        compiler_params=params,
        interpret=interpret,
        name="block_selection_scores",
    )(
        first.min(axis=-1) // chunk,
        last.max(axis=-1) // chunk + 1,
        *of_rows,
        _by_place_in_block(k_compressed, selection, num_chunks * chunk),
        rows,
        normaliser,
    )
    return scores


def _furthest(selection: BlockSelection) -> int:
    """How many blocks further a kernel that begins in one may reach."""
    return math.ceil(selection.pool_padding / selection.kernels_per_block)


def _by_place_in_block(
    kernels: Float[Array, "B J K H"], selection: BlockSelection, num_blocks: int
) -> Float[Array, "B K r C1 H"]:
    """Kernel r·c + y is at [:, :, y, c + blocks that stand before the first]."""
    batch, number, heads, width = kernels.shape
    per_block = selection.kernels_per_block
    kernels = jnp.pad(kernels, ((0, 0), (0, num_blocks * per_block - number), (0, 0), (0, 0)))
    kernels = kernels.reshape(batch, num_blocks, per_block, heads, width).transpose(0, 3, 2, 1, 4)
    return jnp.pad(kernels, ((0, 0), (0, 0), (0, 0), (_furthest(selection), 0), (0, 0)))


def _dot(x: Array, y: Array) -> Array:
    """[R, H] · [n, H] -> [R, n], sums in float32; float32 factors at full precision."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return plgpu.dot(x, y, trans_b=True, precision=precision)


def _normaliser_kernel(tiles: QueryTiles, kernels: _Kernels, scale: float, chunk: int, *refs: Any) -> None:
    """Writes log2 of the sum of 2^score over the kernels that a row sees; +inf where it sees none."""
    begins, ends, positions, starts, keys, q_ref, out_ref = refs
    m, (b, h) = pl.program_id(0), tiles.batch_and_head(pl.program_id(1))
    q, last, first = q_ref[...], positions[b, m, :][:, None], starts[b, m, :][:, None]

    def step(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        maximum, total = state
        kernel = i * chunk + lax.broadcasted_iota(jnp.int32, (1, chunk), 1)
        scores = scale * LOG2_E * _dot(q, keys[b, h, pl.ds(i * chunk, chunk)])
        visible = kernels.visible(kernel, last, first)
        scores = jnp.where(visible, scores, MASKED)
        now = jnp.maximum(maximum, scores.max(axis=1))
        weights = jnp.where(visible, jnp.exp2(scores - now[:, None]), 0.0)
        return now, total * jnp.exp2(maximum - now) + weights.sum(axis=1)

    empty = jnp.full((tiles.rows,), MASKED), jnp.zeros((tiles.rows,))
    maximum, total = lax.fori_loop(begins[b, m], ends[b, m], step, empty)
    out_ref[...] = jnp.where(total > 0, maximum + jnp.log2(jnp.where(total > 0, total, 1.0)), jnp.inf)


def _scores_kernel(
    tiles: QueryTiles,
    kernels: _Kernels,
    selection: BlockSelection,
    scale: float,
    chunk: int,
    per_split: int,
    *refs: Any,
) -> None:
    """Writes for each query the largest group-summed probability of the kernels that touch each block."""
    begins, ends, positions, starts, keys, q_ref, normaliser_ref, out_ref = refs
    m, (b, h), split = pl.program_id(0), tiles.batch_and_head(pl.program_id(1)), pl.program_id(2)
    q, last, first = q_ref[...], positions[b, m, :][:, None], starts[b, m, :][:, None]
    # Rows that fill a group up add nothing.
    head = lax.rem(lax.broadcasted_iota(jnp.int32, (tiles.rows, 1), 0), tiles.heads_of_query)
    normaliser = jnp.where(head < tiles.group, normaliser_ref[...][:, None], jnp.inf)
    per_block, furthest = selection.kernels_per_block, _furthest(selection)

    def step(i: Array, _: None) -> None:
        block = i * chunk + lax.broadcasted_iota(jnp.int32, (1, chunk), 1)
        pooled = jnp.zeros((tiles.tile, chunk))
        for offset in range(-selection.pool_padding, per_block):
            before = max(-(offset // per_block), 0)
            at = pl.ds(i * chunk + (furthest - before), chunk)
            scores = scale * LOG2_E * _dot(q, keys[b, h, offset + before * per_block, at])
            visible = kernels.visible(per_block * block + offset, last, first)
            probabilities = jnp.where(visible, jnp.exp2(scores - normaliser), 0.0)
            grouped = probabilities.reshape(tiles.tile, tiles.heads_of_query, chunk).sum(axis=1)
            pooled = jnp.maximum(pooled, grouped)
        out_ref[:, pl.ds(i * chunk, chunk)] = pooled

    begin, end = jnp.maximum(begins[b, m], split * per_split), jnp.minimum(ends[b, m], (split + 1) * per_split)
    lax.fori_loop(begin, end, step, None)


def _best(
    scores: Float[Array, "B K T1 C1"],
    selection: BlockSelection,
    positions: Int[Array, "B T"],
    starts: Int[Array, "B T"],
    num_blocks: int,
    interpret: bool,
) -> Int[Array, "B K T I"]:
    """Ranks the scores of each query as `topk_blocks` does."""
    (batch, length), kv_heads = positions.shape, scores.shape[1]
    chosen = min(selection.num_selected, num_blocks)
    width = 1 << (scores.shape[3] - 1).bit_length()
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (0, width - scores.shape[3])))
    filled = 1 << (chosen - 1).bit_length()
    ids = pl.pallas_call(
        functools.partial(_best_kernel, selection, kv_heads),
        grid=(length, batch * kv_heads),
        in_specs=[
            *[ANYWHERE] * 2,
            pl.BlockSpec((None, None, None, width), lambda t, h: (lax.div(h, kv_heads), lax.rem(h, kv_heads), t, 0)),
        ],
        out_specs=pl.BlockSpec(
            (None, None, None, filled), lambda t, h: (lax.div(h, kv_heads), lax.rem(h, kv_heads), t, 0)
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, length, filled), jnp.int32),
        # Sixteen scores to a thread.
        compiler_params=plgpu.CompilerParams(num_warps=min(max(width // 512, 1), 16), num_stages=1),
        interpret=interpret,
        name="block_selection_best",
    )(starts // selection.block_size, positions // selection.block_size, scores)
    return ids[..., :chosen]


def _best_kernel(selection: BlockSelection, kv_heads: int, *refs: Any) -> None:
    """Writes the blocks of one query in ascending order, then -1."""
    firsts, lasts, scores_ref, out_ref = refs
    t, b = pl.program_id(0), lax.div(pl.program_id(1), kv_heads)
    first, last = firsts[b, t], lasts[b, t]
    (width,), (filled,) = scores_ref.shape, out_ref.shape
    block = lax.broadcasted_iota(jnp.int32, (width,), 0)
    begin, end = first + selection.init_blocks, last - selection.num_local
    forced = (block >= first) & (block <= last) & ((block < begin) | (block > end))
    # Scores are not negative: their bits are in the order of their values.
    bits = lax.bitcast_convert_type(scores_ref[...], jnp.int32)
    bits = jnp.where((begin <= block) & (block <= end), bits, -1)
    number = max(selection.num_selected - selection.init_blocks - selection.num_local, 0)

    def halve(i: Array, threshold: Array) -> Array:
        higher = threshold | lax.shift_left(1, 30 - i)
        return jnp.where((bits >= higher).astype(jnp.int32).sum() >= number, higher, threshold)

    # The number-th largest, or 0 where there are not so many.
    threshold = lax.fori_loop(0, 31, halve, jnp.int32(0))
    above, equal = bits > threshold, bits == threshold
    left = number - above.astype(jnp.int32).sum()
    # Of equal scores the lowest block first.
    ranked = above | (equal & (jnp.cumsum(equal.astype(jnp.int32)) <= left))
    chosen = (forced | ranked).astype(jnp.int32)
    place = jnp.where(chosen == 1, jnp.cumsum(chosen) - 1, filled)
    plgpu.store(out_ref.at[place], block, mask=chosen == 1)
    rest = lax.broadcasted_iota(jnp.int32, (filled,), 0)
    plgpu.store(out_ref.at[pl.ds(0, filled)], jnp.full((filled,), -1), mask=rest >= chosen.sum())
