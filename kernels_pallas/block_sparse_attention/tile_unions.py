"""The tables by which the Pallas kernels walk chosen blocks: for each tile of queries the union of their blocks.

Neighbouring queries choose nearly the same blocks, so a tile of them reads each block of the union once, and a bit
for every query says whether it chose the block. Made by sorting, a tile's lists at a time: memory grows linearly with
the length, and nothing of the size queries x blocks exists.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


class TileUnions(NamedTuple):
    """The union of each tile's blocks; M tiles, U entries.

    Attributes:
        ids: blocks in ascending order, then 0.
        words: bit t says that query t of the tile chose the block; 0 where there is no entry.
        counts: entries of each tile.
    """

    ids: Int[Array, "B K M U"]
    words: Int[Array, "B K M U"]
    counts: Int[Array, "B K M"]


def tile_unions(block_ids: Int[Array, "B K T I"], tile: int, num_blocks: int, multiple: int) -> TileUnions:
    """Returns the unions of tiles of consecutive queries.

    Args:
        block_ids: the blocks that each query chose, in any order; -1, and what is not below `num_blocks`, is no block.
        tile: queries of a tile, at most 32; T is a multiple of it.
        num_blocks: blocks that exist.
        multiple: U is a multiple of this, large enough for every union, and at least as much again.
    """
    batch_size, num_kv_heads, length, chosen = block_ids.shape
    listed = tile * chosen
    num_entries = -(-min(num_blocks, listed) // multiple) * multiple + multiple
    exists = (block_ids >= 0) & (block_ids < num_blocks)
    query = jnp.arange(length, dtype=jnp.int32) % tile
    # Sorted by block, then by query.
    keys = jnp.where(exists, block_ids * tile + query[:, None], num_blocks * tile)
    keys = jnp.sort(keys.reshape(batch_size, num_kv_heads, length // tile, listed), axis=-1)
    ids = keys // tile
    repeated = keys == _shifted(keys, -1)
    bits = jnp.where(repeated | (ids == num_blocks), 0, jnp.left_shift(1, keys % tile))
    # The bits of a run of equal blocks differ, so their sum is their union: the difference of running sums at the ends
    # of this run and the one before, exact in the arithmetic of 32 bits, which wraps around.
    sums = jnp.cumsum(bits, axis=-1, dtype=jnp.int32)
    ends = (ids < num_blocks) & (ids != jnp.roll(ids, -1, axis=-1).at[..., -1].set(num_blocks))
    ids, sums = lax.sort((jnp.where(ends, ids, num_blocks), sums), num_keys=1)
    ids, sums = (_cut(x, num_entries, fill) for x, fill in ((ids, num_blocks), (sums, 0)))
    words = sums - _shifted(sums, 0)
    present = ids < num_blocks
    return TileUnions(jnp.where(present, ids, 0), jnp.where(present, words, 0), ends.sum(axis=-1, dtype=jnp.int32))


def range_starts(unions: TileUnions, blocks_per_range: int, num_ranges: int) -> Int[Array, "B K M R"]:
    """Returns where each tile's entries of each range of consecutive blocks begin, and where the last range ends.

    This is the transposed index: the tiles of queries that chose blocks of range r are those with
    `starts[..., r] < starts[..., r + 1]`, and these are their entries.

    Args:
        unions: of M tiles.
        blocks_per_range: blocks of a range.
        num_ranges: ranges; the result has one entry more.
    """
    entry = jnp.arange(unions.ids.shape[-1])
    bounds = jnp.arange(num_ranges + 1) * blocks_per_range
    below = (unions.ids[..., None] < bounds) & (entry < unions.counts[..., None])[..., None]
    return below.sum(axis=-2, dtype=jnp.int32)


def block_tiles(
    ids: Int[Array, "B K M U"], words: Int[Array, "B K M U"], second: Bool[Array, "B K M U"], num_blocks: int
) -> tuple[Int[Array, "B K M*U"], Int[Array, "B K C2"]]:
    """Turns unions round: entries U·m + u of the tiles that chose block 0, in their order, then those of block 1, ...

    Args:
        ids: of `TileUnions`.
        words: of `TileUnions`.
        second: which entries come after the others of their block.
        num_blocks: C.

    Returns:
        The entries, and where each block's begin, where its second ones do, and where the last one's end: 2·C + 1.
    """
    batch_size, num_kv_heads = ids.shape[:2]
    half = jnp.where(words == 0, 2 * num_blocks, 2 * ids + second).reshape(batch_size, num_kv_heads, -1)
    entries = jnp.broadcast_to(jnp.arange(half.shape[-1], dtype=jnp.int32), half.shape)
    half, entries = lax.sort((half, entries), num_keys=1, is_stable=True)
    bounds = jnp.arange(2 * num_blocks + 1, dtype=jnp.int32)
    find = jnp.vectorize(lambda half: jnp.searchsorted(half, bounds), signature="(n)->(c)")
    return entries, find(half).astype(jnp.int32)


def _shifted(x: Array, first: int) -> Array:
    """Each entry is the one before; the first is the given value."""
    return jnp.concatenate([jnp.full_like(x[..., :1], first), x[..., :-1]], axis=-1)


def _cut(x: Array, length: int, fill: int) -> Array:
    """Cuts or pads the last axis to a length."""
    x = x[..., :length]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])], constant_values=fill)
