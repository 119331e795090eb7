"""What the TPU kernels of block-sparse attention share: masks of a group of blocks, the walk over a tile's union."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention.tile_unions import TileUnions
from kernels_pallas.block_sparse_attention.tuned_block_sizes import GROUP_KEYS, TILE

LANES = 128
# Finite, so that a row without visible keys so far gives 0 - 0 rather than inf - inf; what it gathers meanwhile is
# multiplied by exp(MASKED - m) = 0 at its first visible key. Absorbs any score when added to it.
MASKED = -0.7 * float(np.finfo(np.float32).max)


def blocks_per_group(keys: int, block_size: int) -> int:
    """Blocks whose keys are multiplied at once."""
    return max(keys // block_size, 1)


class TokenTables(NamedTuple):
    """Where the tokens lie, as the kernels read it; M tiles of t queries, C blocks of b keys.

    Attributes:
        queries: position and segment of each query.
        key_segments: a block's, repeated to fill the lanes.
    """

    queries: Int[Array, "B M 2 t"]
    key_segments: Int[Array, "B C lanes"]


def token_tables(
    positions: Int[Array, "B T"], query_segments: Int[Array, "B T"], key_segments: Int[Array, "B S"], block_size: int
) -> TokenTables:
    """Lays out where the tokens lie; T is a multiple of a tile and S one of a block."""
    batch_size = positions.shape[0]
    queries = jnp.stack([positions, query_segments], axis=1).reshape(batch_size, 2, -1, TILE).swapaxes(1, 2)
    keys = key_segments.reshape(batch_size, -1, block_size)
    return TokenTables(queries, jnp.tile(keys, (1, 1, max(LANES // block_size, 1))))


def group_bias(
    ids: list[Array], words: list[Array], positions: Array, q_segments: Array, k_segments_ref: Any, block_size: int
) -> Float[Array, "t s"]:
    """Returns what to add to the scores of a tile's queries and a group's keys: 0 where the query sees the key.

    Args:
        ids: the group's blocks, scalars.
        words: which queries chose each.
        positions: of the tile's queries [t, 1].
        q_segments: theirs [t, 1].
        k_segments_ref: of all keys, as `token_tables` lays them out.
        block_size: keys of a block.
    """
    num_keys = len(ids) * block_size
    lane = lax.broadcasted_iota(jnp.int32, (1, num_keys), 1)
    id_of_key, word_of_key = (jnp.full((1, num_keys), x[0], jnp.int32) for x in (ids, words))
    for i in range(1, len(ids)):
        later = lane >= i * block_size
        id_of_key = jnp.where(later, ids[i], id_of_key)
        word_of_key = jnp.where(later, words[i], word_of_key)
    key = id_of_key * block_size + lane % block_size
    query = lax.broadcasted_iota(jnp.int32, (TILE, 1), 0)
    chosen = jnp.right_shift(word_of_key, query) & 1
    visible = (chosen == 1) & (key <= positions) & (_k_segments(ids, k_segments_ref, block_size) == q_segments)
    return jnp.where(visible, 0.0, MASKED)


def _k_segments(ids: list[Array], k_segments_ref: Any, block_size: int) -> Int[Array, "1 s"]:
    """Segments of a group's keys, a lane each."""
    rows = [k_segments_ref[pl.ds(block, 1), :] for block in ids]
    per_row = max(LANES // block_size, 1)
    lane = lax.broadcasted_iota(jnp.int32, (1, max(block_size, LANES)), 1)
    filled = []
    for i in range(0, len(rows), per_row):
        row = rows[i]
        for j in range(1, per_row):
            row = jnp.where(lane >= j * block_size, rows[i + j], row)
        filled.append(row)
    return jnp.concatenate(filled, axis=1)


def add_bias(scores: Float[Array, "R s"], bias: Float[Array, "t s"]) -> Float[Array, "R s"]:
    """Adds the same for every head of the group."""
    return (scores.reshape(-1, *bias.shape) + bias).reshape(scores.shape)


def dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """Multiplies over one axis of each, summing in float32; float32 factors at full precision."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


class UnionWalk:
    """The blocks of a tile's union, fetched a group at a time ahead of their use.

    Takes the references that `walk_operands` describes: tables of this tile and the next, the keys in HBM, two buffers
    of a group each with their semaphores, and which of the two this tile begins with.
    """

    def __init__(self, tables: tuple, kv_hbm: Any, scratch: tuple):
        self.count_ref, self.ids_ref, self.words_ref, self.next_ids_ref = tables
        self.kv_hbm = kv_hbm
        self.buffer, self.semaphores, self.first_slot_ref = scratch
        self.blocks_per_group, self.block_size = self.buffer.shape[1:3]
        # Taken here: in a branch the interpreter does not know them.
        self.batch, self.head, self.tile, self.num_tiles = *map(pl.program_id, range(3)), pl.num_programs(2)

    def _copies(self, ids_ref: Any, group: Any, slot: Any) -> list:
        return [
            pltpu.make_async_copy(
                self.kv_hbm.at[self.batch, self.head, ids_ref[0, group * self.blocks_per_group + i]],
                self.buffer.at[slot, i],
                self.semaphores.at[slot],
            )
            for i in range(self.blocks_per_group)
        ]

    def run(self, use: Any) -> None:
        """Calls `use(kv [s, 2H], ids, words)` for every group: at least one, perhaps of no query's blocks."""
        num_groups = jnp.maximum(pl.cdiv(self.count_ref[0, 0], self.blocks_per_group), 1)

        @pl.when(self.tile == 0)
        def fetch_first() -> None:
            self.first_slot_ref[0] = 0
            for copy in self._copies(self.ids_ref, 0, 0):
                copy.start()

        first_slot = self.first_slot_ref[0]

        def step(group: Array, _: None) -> None:
            slot = (first_slot + group) % 2

            @pl.when(group + 1 < num_groups)
            def fetch_ahead() -> None:
                for copy in self._copies(self.ids_ref, group + 1, 1 - slot):
                    copy.start()

            @pl.when((group + 1 == num_groups) & (self.tile + 1 < self.num_tiles))
            def fetch_for_next_tile() -> None:
                for copy in self._copies(self.next_ids_ref, 0, 1 - slot):
                    copy.start()

            for copy in self._copies(self.ids_ref, group, slot):
                copy.wait()
            kv = self.buffer[slot].reshape(self.blocks_per_group * self.block_size, -1)
            entries = [group * self.blocks_per_group + i for i in range(self.blocks_per_group)]
            use(kv, [self.ids_ref[0, e] for e in entries], [self.words_ref[0, e] for e in entries])

        lax.fori_loop(0, num_groups, step, None)
        self.first_slot_ref[0] = (first_slot + num_groups) % 2


def walk_operands(
    kv: Array, unions: TileUnions, tokens: TokenTables
) -> tuple[list[Array], list[pl.BlockSpec], list[Any]]:
    """Operands, their specs and scratch memory of a kernel that walks unions: what it takes after its rows."""
    _, _, _, block_size, width = kv.shape
    num_tiles, num_entries = unions.ids.shape[2:]
    counts, ids, words = unions.counts[..., None, None], unions.ids[..., None, :], unions.words[..., None, :]

    def table(width: int, ahead: int = 0) -> pl.BlockSpec:
        def index(b: Array, h: Array, i: Array) -> tuple:
            return b, h, jnp.minimum(i + ahead, num_tiles - 1), 0, 0

        return pl.BlockSpec((None, None, None, 1, width), index, memory_space=pltpu.SMEM)

    specs = [
        table(1),
        table(num_entries),
        table(num_entries),
        table(num_entries, ahead=1),
        pl.BlockSpec((None, None, 2, TILE), lambda b, h, i: (b, i, 0, 0)),
        pl.BlockSpec((None, *tokens.key_segments.shape[1:]), lambda b, h, i: (b, 0, 0)),
        pl.BlockSpec(memory_space=pl.ANY),
    ]
    number = blocks_per_group(GROUP_KEYS, block_size)
    scratch = [
        pltpu.VMEM((2, number, block_size, width), kv.dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SMEM((1,), jnp.int32),
    ]
    return [counts, ids, words, ids, *tokens, kv], specs, scratch


def row_spec(rows: int, width: int) -> pl.BlockSpec:
    """A tile of [B, K, M, rows, width]."""
    return pl.BlockSpec((None, None, None, rows, width), lambda b, h, i: (b, h, i, 0, 0))


def compiler_params(num_grid_axes: int) -> pltpu.CompilerParams:
    """Of a grid over batch rows, key heads and what is walked in order."""
    independent, in_order = pltpu.GridDimensionSemantics.PARALLEL, pltpu.GridDimensionSemantics.ARBITRARY
    return pltpu.CompilerParams(dimension_semantics=[independent] * 2 + [in_order] * (num_grid_axes - 2))
