"""From the scores of blocks to the numbers of those chosen: the end of every implementation but the reference."""

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


def _block_range(
    selection: BlockSelection, query_positions: Array, document_starts: Array
) -> tuple[Int[Array, "B 1 T 1"], Int[Array, "B 1 T 1"]]:
    """The first and the last block that hold a key which the query may see."""
    first, last = document_starts // selection.block_size, query_positions // selection.block_size
    return first[:, None, :, None], last[:, None, :, None]
