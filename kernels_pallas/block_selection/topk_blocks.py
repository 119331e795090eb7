"""From the scores of blocks to the numbers of those chosen: the end of every implementation but the reference."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.block_selection.selection import BlockSelection


def visible_blocks(
    selection: BlockSelection, query_positions: Int[Array, "B T"], document_starts: Int[Array, "B T"], num_blocks: int
) -> Bool[Array, "B 1 T C"]:
    """Returns which blocks hold a key that the query may see."""
    first, last = _block_range(selection, query_positions, document_starts)
    block = jnp.arange(num_blocks)
    return (first <= block) & (block <= last)


def topk_blocks(
    scores: Float[Array, "B K T C"],
    selection: BlockSelection,
    query_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
) -> Int[Array, "B K T I"]:
    """Returns the chosen blocks in ascending order, then -1.

    Args:
        scores: at least 0, and -inf for blocks that the query may not see.
        selection: numbers of initial, local and chosen blocks.
        query_positions: where each query lies among the keys.
        document_starts: the first key of each query's document.
    """
    num_blocks = scores.shape[-1]
    first, last = _block_range(selection, query_positions, document_starts)
    block = jnp.arange(num_blocks)
    # Initial and local blocks are known without ranking. Where they overlap, they are all that the query may see.
    begin, end = first + selection.init_blocks, last - selection.num_local
    initial = first + jnp.arange(selection.init_blocks)
    local = end + 1 + jnp.arange(selection.num_local)
    known = [jnp.where(initial <= last, initial, num_blocks), jnp.where(local >= begin, local, num_blocks)]
    known = [jnp.broadcast_to(x, (*scores.shape[:3], x.shape[-1])) for x in known]
    number = min(max(selection.num_selected - selection.init_blocks - selection.num_local, 0), num_blocks)
    # Of equal values `top_k` has the lowest index first.
    values, best = lax.top_k(jnp.where((begin <= block) & (block <= end), scores, -jnp.inf), number)
    ranked = jnp.where(values > -jnp.inf, best, num_blocks)
    ascending = jnp.sort(jnp.concatenate([*known, ranked], axis=-1), axis=-1)
    ascending = ascending[..., : min(selection.num_selected, num_blocks)]
    return jnp.where(ascending < num_blocks, ascending, -1).astype(jnp.int32)


def select_by_spans(
    select: Callable[[Array, Array, Array], Int[Array, "B K t I"]],
    span: int,
    q: Float[Array, "B T N H"],
    query_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
    shape: tuple[int, int],
) -> Int[Array, "B K T I"]:
    """Selects for a span of queries after the other, so that nothing of the size queries x blocks exists.

    Args:
        select: from the queries of a span, their positions and their documents' starts to the blocks.
        span: t.
        q: queries.
        query_positions: theirs.
        document_starts: theirs.
        shape: K and I.
    """
    batch, length = query_positions.shape
    span = min(span, length)
    fill = -length % span
    q = jnp.pad(q, ((0, 0), (0, fill), (0, 0), (0, 0)))
    # Queries that fill the last span see nothing.
    query_positions = jnp.pad(query_positions, ((0, 0), (0, fill)), constant_values=-1)
    document_starts = jnp.pad(document_starts, ((0, 0), (0, fill)), mode="edge")

    def one_span(i: Array, out: Array) -> Array:
        part = (lax.dynamic_slice_in_dim(x, i * span, span, axis=1) for x in (q, query_positions, document_starts))
        return lax.dynamic_update_slice_in_dim(out, select(*part), i * span, axis=2)

    out = jnp.zeros((batch, shape[0], length + fill, shape[1]), jnp.int32)
    return lax.fori_loop(0, (length + fill) // span, one_span, out)[:, :, :length]


def _block_range(
    selection: BlockSelection, query_positions: Array, document_starts: Array
) -> tuple[Int[Array, "B 1 T 1"], Int[Array, "B 1 T 1"]]:
    """The first and the last block that hold a key which the query may see."""
    first, last = document_starts // selection.block_size, query_positions // selection.block_size
    return first[:, None, :, None], last[:, None, :, None]
