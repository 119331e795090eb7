"""The lists of chosen blocks turned round: from "query → its blocks" to "block → the queries that chose it".

Neighbouring queries choose much the same blocks, and all of them the same local ones. So the index has two parts: for
each tile of consecutive queries the blocks that at least half of them chose, which the tile reads once for all its
queries; and what is left, sorted by block. Both parts together are the lists, each pair of a query and a block once.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


class TransposedIndex(NamedTuple):
    """Who chose what, for one key/value head of one sequence.

    Attributes:
        tile_ids: [n, Q, I], the queries' lists by tiles of Q queries.
        tile_blocks: [n, D], the blocks that at least half of a tile's queries chose, in ascending order, then C.
        tile_counts: [n], how many those are.
        queries: [T·I + R], the queries of block 0 that no tile serves, in ascending order, then those of block 1, ...
        starts: [C + 1], where each block's queries begin.
    """

    tile_ids: Int[Array, "n Q I"]
    tile_blocks: Int[Array, "n D"]
    tile_counts: Int[Array, " n"]
    queries: Int[Array, " P"]
    starts: Int[Array, " C1"]

    def tile_step(self, tile: Array, step: Array, blocks_per_step: int) -> tuple[Array, Array]:
        """Returns [m] blocks of a tile, C beyond its last, and [Q, m], which query chose which."""
        blocks = lax.dynamic_slice(self.tile_blocks, (tile, step * blocks_per_step), (1, blocks_per_step))[0]
        return blocks, (self.tile_ids[tile][:, None, :] == blocks[:, None]).any(axis=-1)

    def queries_of(self, block: Array, group: Array, size: int, absent: int) -> Array:
        """Returns [R] queries of a block; `absent` beyond its last."""
        first = self.starts[block] + group * size
        queries = lax.dynamic_slice(self.queries, (first,), (size,))
        return jnp.where(first + jnp.arange(size) < self.starts[block + 1], queries, absent)


def transpose_index(
    ids: Int[Array, "T I"],
    positions: Int[Array, " T"],
    *,
    num_blocks: int,
    block_size: int,
    tile_size: int,
    blocks_per_step: int,
    group_size: int,
) -> TransposedIndex:
    """Turns the lists of one head round.

    Args:
        ids: the blocks of each query; -1 where it has fewer.
        positions: of the queries. Blocks after a query are left out.
        num_blocks: C.
        block_size: keys in a block.
        tile_size: Q, which divides T.
        blocks_per_step: m, in which `tile_step` reads.
        group_size: R, in which `queries_of` reads.
    """
    length, per_query = ids.shape
    ids = jnp.where((ids >= 0) & (ids * block_size <= positions[:, None]), ids, num_blocks)
    # Twice the list is the most that half of a tile's queries can have in common.
    most = min(2 * per_query, num_blocks)

    def tile(ids: Array) -> tuple[Array, Array, Array]:
        counts = jnp.zeros(num_blocks + 1, jnp.int32).at[ids].add(1).at[num_blocks].set(0)
        shared = 2 * counts >= tile_size
        blocks = jnp.nonzero(shared, size=most, fill_value=num_blocks)[0]
        return blocks, shared.sum(), jnp.where(shared[ids], num_blocks, ids)

    tile_ids = ids.reshape(-1, tile_size, per_query)
    tile_blocks, tile_counts, left = lax.map(tile, tile_ids)
    tile_blocks = jnp.pad(tile_blocks, ((0, 0), (0, -most % blocks_per_step)), constant_values=num_blocks)
    tile_ids = jnp.where(tile_ids < num_blocks, tile_ids, -1)

    block = left.reshape(-1).astype(jnp.uint32)
    query = jnp.repeat(jnp.arange(length, dtype=jnp.uint32), per_query)
    if (num_blocks + 1) * length < 2**32:
        # One number for both: single numbers are sorted four times as fast.
        block, query = jnp.divmod(jnp.sort(block * jnp.uint32(length) + query), jnp.uint32(length))
    else:
        block, query = lax.sort((block, query), num_keys=1)
    starts = jnp.searchsorted(block, jnp.arange(num_blocks + 1, dtype=jnp.uint32)).astype(jnp.int32)
    queries = jnp.pad(query.astype(jnp.int32), (0, group_size))
    return TransposedIndex(tile_ids, tile_blocks, tile_counts, queries, starts)
