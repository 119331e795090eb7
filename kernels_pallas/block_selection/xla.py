"""Block selection in plain JAX: the scores of a head exist for one tile of queries and one chunk of kernels at a time.

Each tile goes twice over the kernels that its queries may see: over the coarse ones for the normaliser of each head's
softmax (over the fine ones where the softmax is exact), then over the fine ones for the probabilities, which are added
over the heads of a group and pooled to blocks as soon as they exist. The tile's block scores, 1/(G·4) of the kernel
scores at the defaults, are ranked and forgotten.

The fine kernels of a chunk lie in memory by their place in the block: the kernels that begin a block, then those that
begin one stride later, and so on. The max-pool is then a maximum of whole rows, which a CPU takes as vectors.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.block_selection.topk_blocks import topk_blocks, visible_blocks

# Rows of a tile's matrix products, heads of a group times queries, and kernels of a chunk: measured on two CPU cores.
# Longer chunks look further past the queries.
TILE_ROWS = 2048
CHUNK = 256
COARSE_CHUNK = 256


class _Queries(NamedTuple):
    """A tile of queries: G·t rows, and for each query its place and its document's first key."""

    rows: Float[Array, "B K G*t H"]
    positions: Int[Array, "B t"]
    starts: Int[Array, "B t"]


def select_blocks(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B J K H"],
    k_coarse: Float[Array, "B J2 K H"] | None,
    scale: float,
    selection: BlockSelection,
    query_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
    num_blocks: int,
) -> Int[Array, "B K T I"]:
    """See `kernels_pallas.block_selection.api.select_blocks`."""

    def choose(scores: Array, queries: _Queries) -> Array:
        return topk_blocks(scores, selection, queries.positions, queries.starts)

    return _for_each_tile(
        q, k_compressed, k_coarse, scale, selection, query_positions, document_starts, num_blocks,
        choose, min(selection.num_selected, num_blocks), jnp.int32,
    )  # fmt: skip


def block_scores(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B J K H"],
    k_coarse: Float[Array, "B J2 K H"] | None,
    scale: float,
    selection: BlockSelection,
    query_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
    num_blocks: int,
) -> Float[Array, "B K T C"]:
    """See `kernels_pallas.block_selection.api.block_scores`."""
    return _for_each_tile(
        q, k_compressed, k_coarse, scale, selection, query_positions, document_starts, num_blocks,
        lambda scores, _: scores, num_blocks, jnp.float32,
    )  # fmt: skip


def _for_each_tile(
    q: Array,
    k_compressed: Array,
    k_coarse: Array | None,
    scale: float,
    selection: BlockSelection,
    query_positions: Array,
    document_starts: Array,
    num_blocks: int,
    use: Callable[[Array, _Queries], Array],
    width: int,
    dtype: type,
) -> Array:
    """Puts together what `use` makes of each tile's scores [B, K, t, C]: [B, K, T, width] of a type."""
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k_compressed.shape[2]
    group = num_heads // num_kv_heads
    tile = max(min(TILE_ROWS // group, length), 1)
    num_tiles = math.ceil(length / tile)
    fill = num_tiles * tile - length
    q = jnp.pad(q, ((0, 0), (0, fill), (0, 0), (0, 0)))
    # Queries that fill the last tile see nothing.
    query_positions = jnp.pad(query_positions, ((0, 0), (0, fill)), constant_values=-1)
    document_starts = jnp.pad(document_starts, ((0, 0), (0, fill)), mode="edge")
    fine = _by_place_in_block(k_compressed, selection, num_blocks)
    # What the softmax's normaliser is taken of, and its sizes.
    if k_coarse is None:
        sums, sizes = k_compressed, (selection.kernel_size, selection.kernel_stride)
    else:
        sums, sizes = k_coarse, (selection.coarse_kernel_size, selection.coarse_kernel_stride)
    sum_chunks = _in_chunks(sums)

    def one_tile(i: Array, out: Array) -> Array:
        def cut(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, i * tile, tile, axis=1)

        rows = cut(q).astype(jnp.float32).reshape(batch, tile, num_kv_heads, group, head_dim)
        rows = rows.transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, group * tile, head_dim)
        queries = _Queries(rows, cut(query_positions), cut(document_starts))
        normaliser = _log_normaliser(queries, sum_chunks, scale, sums.shape[1], *sizes)
        scores = _pooled(queries, fine, normaliser, scale, k_compressed.shape[1], selection)[..., :num_blocks]
        visible = visible_blocks(selection, queries.positions, queries.starts, num_blocks)
        result = use(jnp.where(visible, scores, -jnp.inf), queries)
        return lax.dynamic_update_slice_in_dim(out, result, i * tile, axis=2)

    out = jnp.zeros((batch, num_kv_heads, num_tiles * tile, width), dtype)
    return lax.fori_loop(0, num_tiles, one_tile, out)[:, :, :length]


def _in_chunks(kernels: Float[Array, "B J K H"]) -> Float[Array, "n B K c H"]:
    """Kernels in their order."""
    batch, number, heads, width = kernels.shape
    chunk = max(min(COARSE_CHUNK, number), 1)
    num_chunks = max(math.ceil(number / chunk), 1)
    kernels = jnp.pad(kernels, ((0, 0), (0, num_chunks * chunk - number), (0, 0), (0, 0)))
    return kernels.astype(jnp.float32).reshape(batch, num_chunks, chunk, heads, width).transpose(1, 0, 3, 2, 4)


def _by_place_in_block(
    kernels: Float[Array, "B J K H"], selection: BlockSelection, num_blocks: int
) -> Float[Array, "n B K r c H"]:
    """Kernel r·(c·i + x) + y of chunks of c blocks is at [i, :, :, y, x]."""
    batch, number, heads, width = kernels.shape
    per_block = selection.kernels_per_block
    chunk = min(max(CHUNK // per_block, 1), num_blocks)
    num_chunks = math.ceil(num_blocks / chunk)
    kernels = jnp.pad(kernels, ((0, 0), (0, num_chunks * chunk * per_block - number), (0, 0), (0, 0)))
    kernels = kernels.astype(jnp.float32).reshape(batch, num_chunks, chunk, per_block, heads, width)
    return kernels.transpose(1, 0, 4, 3, 2, 5)


def _visible_range(queries: _Queries, number: int, size: int, stride: int) -> tuple[Array, Array]:
    """The first kernel that each query sees, and the one after its last: all keys in its document, none after it."""
    first = -(-queries.starts // stride)
    end = jnp.clip((queries.positions + 1 - size) // stride + 1, 0, number)
    return first, end


def _chunks_of(first: Array, end: Array, chunk: int) -> tuple[Array, Array]:
    """The chunks that any query of the tile sees: from the first to before the second."""
    return jnp.min(first) // chunk, -(-jnp.max(end) // chunk)


def _log_normaliser(
    queries: _Queries, chunks: Float[Array, "n B K c H"], scale: float, number: int, size: int, stride: int
) -> Float[Array, "B K G t 1"]:
    """Logarithm of the sum of exp(score) over the kernels that a query sees; +inf where it sees none."""
    batch, heads, num_rows, _ = queries.rows.shape
    tile, chunk = queries.positions.shape[1], chunks.shape[3]
    first, end = _visible_range(queries, number, size, stride)
    first, end = first[:, None, None, :, None], end[:, None, None, :, None]

    def meet(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        maximum, total = carry
        scores = scale * jnp.einsum("bkqh,bkjh->bkqj", queries.rows, chunks[i])
        kernel = i * chunk + jnp.arange(chunk)
        scores = scores.reshape(batch, heads, -1, tile, chunk)
        scores = jnp.where((first <= kernel) & (kernel < end), scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
        # Finite, so that a row that has seen nothing yet gives exp(-inf - 0) = 0.
        reference = jnp.where(new_maximum > -jnp.inf, new_maximum, 0.0)
        total = total * jnp.exp(maximum - reference) + jnp.exp(scores - reference).sum(axis=-1, keepdims=True)
        return new_maximum, total

    shape = (batch, heads, num_rows // tile, tile, 1)
    start = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
    maximum, total = lax.fori_loop(*_chunks_of(first, end, chunk), meet, start)
    return jnp.where(total > 0, maximum + jnp.log(total), jnp.inf)


def _pooled(
    queries: _Queries,
    chunks: Float[Array, "n B K r c H"],
    normaliser: Float[Array, "B K G t 1"],
    scale: float,
    number: int,
    selection: BlockSelection,
) -> Float[Array, "B K t n*c"]:
    """The largest group-summed probability of the kernels that touch each block; 0 where the query sees none."""
    batch, heads, num_rows, width = queries.rows.shape
    tile, (num_chunks, _, _, per_block, chunk, _) = queries.positions.shape[1], chunks.shape
    group = num_rows // tile
    first, end = _visible_range(queries, number, selection.kernel_size, selection.kernel_stride)
    first, end = first[:, None, :, None, None], end[:, None, :, None, None]
    # Kernel y of a block reaches into the s-th block after it if y >= s·r - padding.
    furthest = math.ceil(selection.pool_padding / per_block)
    reaches = [max(per_block * s - selection.pool_padding, 0) for s in range(furthest + 1)]

    def meet(i: Array, pooled: tuple[Array, ...]) -> tuple[Array, ...]:
        keys = chunks[i].reshape(batch, heads, per_block * chunk, width)
        scores = jnp.einsum("bkqh,bkjh->bkqj", queries.rows, keys).reshape(batch, heads, group, tile, -1)
        # Head by head: XLA's reduction over the group would take one element at a time on CPU.
        heads_of_group = (jnp.exp(scale * scores[:, :, g] - normaliser[:, :, g]) for g in range(group))
        grouped = functools.reduce(jnp.add, heads_of_group)
        kernel = per_block * (i * chunk + jnp.arange(chunk)) + jnp.arange(per_block)[:, None]
        visible = (first <= kernel) & (kernel < end)
        grouped = jnp.where(visible, grouped.reshape(batch, heads, tile, per_block, chunk), 0.0)
        best = (grouped[:, :, :, y:].max(axis=3) for y in reaches)
        return tuple(
            lax.dynamic_update_slice_in_dim(x, new, i * chunk, axis=3) for x, new in zip(pooled, best, strict=True)
        )

    start = tuple(jnp.zeros((batch, heads, tile, num_chunks * chunk)) for _ in reaches)
    here, *next_ones = lax.fori_loop(*_chunks_of(first, end, per_block * chunk), meet, start)
    for s, reaching in enumerate(next_ones, start=1):
        here = jnp.maximum(here, jnp.pad(reaching, ((0, 0), (0, 0), (0, 0), (s, 0)))[..., : here.shape[-1]])
    return here
