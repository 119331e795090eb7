"""Block selection on TPU: one kernel from queries and compressed keys to the scores of blocks.

The compressed keys of a key/value head stay in vector memory (2.5 MiB at 128K keys) while its tiles of queries pass.
Each tile goes over the coarse kernels that it may see for the normaliser of each head's softmax (over the fine ones
where the softmax is exact), then over the fine ones. A head's scores live in registers and vector memory; what reaches
HBM is added over the heads of a group and pooled, 1/(G·4) of them at the defaults. XLA ranks these, a span of queries
at a time, so that nothing of the size queries x blocks exists.

As in `xla.py` the fine kernels of a chunk lie by their place in the block, so that the max-pool is one of lane-aligned
slices; what reaches over a block's end moves on by a lane, over a chunk's end to the next chunk.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from kernels_pallas.block_selection.arg_specs import ArgSpec
from kernels_pallas.block_selection.costs import scores_cost, scores_vmem_bytes, tile_queries
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.block_selection.topk_blocks import select_by_spans, topk_blocks, visible_blocks
from kernels_pallas.block_selection.tuned_block_sizes import (
    CHUNK_BLOCKS,
    COARSE_CHUNK,
    MAX_VMEM_BYTES,
    SPAN,
    TILE_ROWS,
)

# Finite, so that a row that has seen nothing gives 0 - 0 rather than inf - inf. Absorbs any score when added to it.
MASKED = -0.7 * float(np.finfo(np.float32).max)


def unsupported_reason(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B J K H"],
    k_coarse: Float[Array, "B J2 K H"] | None,
    selection: BlockSelection,
) -> str | None:
    """Says why the kernel cannot serve these arguments, or None if it can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16) or k_compressed.dtype != q.dtype:
        return f"q has dtype {q.dtype} and k_compressed {k_compressed.dtype}: must both be float32 or bfloat16"
    if q.shape[2] // k_compressed.shape[2] > TILE_ROWS // 8:
        return f"{q.shape[2] // k_compressed.shape[2]} query heads to a key head: must be at most {TILE_ROWS // 8}"
    if selection.pool_padding >= CHUNK_BLOCKS * selection.kernels_per_block:
        return f"kernel_size = {selection.kernel_size}: must be at most {CHUNK_BLOCKS} blocks long"
    group, normalising = q.shape[2] // k_compressed.shape[2], k_compressed if k_coarse is None else k_coarse
    numbers = k_compressed.shape[1], normalising.shape[1]
    needed = scores_vmem_bytes(group, *numbers, q.shape[3], q.dtype.itemsize, selection.kernels_per_block)
    if needed > MAX_VMEM_BYTES:
        return (
            f"{sum(numbers)} compressed keys of a head in {q.dtype} need {needed} bytes of vector memory: must be at "
            f"most {MAX_VMEM_BYTES}"
        )
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and any(axis != AxisType.Manual for axis in mesh.axis_types):
        return (
            f"on a mesh of {mesh.size} devices: call it inside shard_map, where each device has its own batch and heads"
        )
    return None


def select_blocks(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B J K H"],
    k_coarse: Float[Array, "B J2 K H"] | None,
    scale: float,
    selection: BlockSelection,
    query_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
    num_blocks: int,
    interpret: Any = False,
) -> Int[Array, "B K T I"]:
    """See `kernels_pallas.block_selection.api.select_blocks`.

    `interpret` (True or `pltpu.InterpretParams`) runs the kernel's program step by step on any device, for tests.
    """

    def select(part: Array, positions: Array, starts: Array) -> Array:
        scores = block_scores(
            part, k_compressed, k_coarse, scale, selection, positions, starts, num_blocks, interpret
        )  # [B, K, span, C]
        return topk_blocks(scores, selection, positions, starts)

    shape = k_compressed.shape[2], min(selection.num_selected, num_blocks)
    return select_by_spans(select, SPAN, q, query_positions, document_starts, shape)


def block_scores(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B J K H"],
    k_coarse: Float[Array, "B J2 K H"] | None,
    scale: float,
    selection: BlockSelection,
    query_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
    num_blocks: int,
    interpret: Any = False,
) -> Float[Array, "B K T C"]:
    """See `kernels_pallas.block_selection.api.block_scores`."""
    batch, length, num_heads, width = q.shape
    num_kv_heads, per_block = k_compressed.shape[2], selection.kernels_per_block
    group = num_heads // num_kv_heads
    tile = tile_queries(group)
    num_tiles = -(-length // tile)
    fill = num_tiles * tile - length
    rows = jnp.pad(q, ((0, 0), (0, fill), (0, 0), (0, 0)))
    rows = rows.reshape(batch, num_tiles, tile, num_kv_heads, group, width).transpose(0, 3, 1, 4, 2, 5)
    rows = rows.reshape(batch, num_kv_heads, num_tiles, group * tile, width)
    positions = jnp.pad(query_positions, ((0, 0), (0, fill)), constant_values=-1).reshape(batch, num_tiles, tile)
    starts = jnp.pad(document_starts, ((0, 0), (0, fill)), mode="edge").reshape(batch, num_tiles, tile)

    fine = _in_chunks(k_compressed, CHUNK_BLOCKS * per_block, num_blocks * per_block)
    # By place in the block: kernel r·(c·i + x) + y at [i, y·c + x].
    fine = fine.reshape(*fine.shape[:3], CHUNK_BLOCKS, per_block, width).swapaxes(3, 4)
    fine = fine.reshape(*fine.shape[:3], -1, width)
    if k_coarse is None:
        sums, sizes = k_compressed, (selection.kernel_size, selection.kernel_stride)
    else:
        sums, sizes = k_coarse, (selection.coarse_kernel_size, selection.coarse_kernel_stride)
    coarse = _in_chunks(sums.astype(q.dtype), COARSE_CHUNK, sums.shape[1])
    fine_seen = _visible_range(positions, starts, k_compressed.shape[1], selection.kernel_size, selection.kernel_stride)
    coarse_seen = _visible_range(positions, starts, sums.shape[1], *sizes)
    last_chunk = jnp.max(positions, axis=-1) // selection.block_size // CHUNK_BLOCKS
    bounds = [
        jnp.min(coarse_seen[0], axis=-1) // COARSE_CHUNK,
        -(-jnp.max(coarse_seen[1], axis=-1) // COARSE_CHUNK),
        jnp.min(fine_seen[0], axis=-1) // (CHUNK_BLOCKS * per_block),
        # Up to the queries' own blocks: a kernel of the chunk before may reach into them.
        jnp.minimum(last_chunk + 1, fine.shape[2]),
    ]

    def of_tile(*shape: int, **kwargs: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda b, h, i: (b, i, 0, 0), **kwargs)

    def of_head(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, i: (b, h, 0, 0, 0))

    num_scored = fine.shape[2] * CHUNK_BLOCKS
    num_keys = num_blocks * selection.block_size
    spec = ArgSpec(batch, num_keys, num_heads, num_kv_heads, width, str(q.dtype), selection)
    scores = pl.pallas_call(
        functools.partial(_kernel, scale, selection, tile),
        grid=(batch, num_kv_heads, num_tiles),
        in_specs=[
            of_tile(1, 4, memory_space=pltpu.SMEM),
            of_tile(4, tile),
            pl.BlockSpec((None, None, None, group * tile, width), lambda b, h, i: (b, h, i, 0, 0)),
            of_head(coarse),
            of_head(fine),
        ],
        out_specs=pl.BlockSpec((None, None, tile, num_scored), lambda b, h, i: (b, h, i, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, num_kv_heads, num_tiles * tile, num_scored), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=[pltpu.GridDimensionSemantics.PARALLEL] * 3),
        cost_estimate=scores_cost(spec, num_tiles * tile, lse_approximation=k_coarse is not None),
        interpret=interpret,
        name="block_selection_scores",
    )(
        jnp.stack(bounds, axis=-1)[:, :, None].astype(jnp.int32),
        jnp.stack([*coarse_seen, *fine_seen], axis=2).astype(jnp.int32),
        rows,
        coarse,
        fine,
    )
    visible = visible_blocks(selection, query_positions, document_starts, num_blocks)
    return jnp.where(visible, scores[:, :, :length, :num_blocks], -jnp.inf)


def _in_chunks(kernels: Float[Array, "B J K H"], chunk: int, number: int) -> Float[Array, "B K n c H"]:
    """At least `number` kernels, and one chunk."""
    batch, length, heads, width = kernels.shape
    num_chunks = max(-(-number // chunk), 1)
    kernels = jnp.pad(kernels, ((0, 0), (0, num_chunks * chunk - length), (0, 0), (0, 0)))
    return kernels.transpose(0, 2, 1, 3).reshape(batch, heads, num_chunks, chunk, width)


def _visible_range(positions: Array, starts: Array, number: int, size: int, stride: int) -> tuple[Array, Array]:
    """The first kernel that each query sees, and the one after its last: all keys in its document, none after it."""
    return -(-starts // stride), jnp.clip((positions + 1 - size) // stride + 1, 0, number)


def _kernel(
    scale: float,
    selection: BlockSelection,
    tile: int,
    bounds_ref: Any,
    seen_ref: Any,
    q_ref: Any,
    coarse_ref: Any,
    fine_ref: Any,
    out_ref: Any,
) -> None:
    q = q_ref[...]
    num_rows = q.shape[0]
    first_coarse, end_coarse, first_fine, end_fine = (jnp.expand_dims(seen_ref[i], -1) for i in range(4))  # [t, 1]

    def multiply(keys: Array) -> Array:
        precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
        return scale * lax.dot_general(
            q, keys, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    def add_up(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        maximum, total = carry
        kernel = i * COARSE_CHUNK + lax.broadcasted_iota(jnp.int32, (1, COARSE_CHUNK), 1)
        bias = jnp.where((first_coarse <= kernel) & (kernel < end_coarse), 0.0, MASKED)  # [t, c]
        scores = (multiply(coarse_ref[i]).reshape(-1, *bias.shape) + bias).reshape(num_rows, -1)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_maximum)
        return new_maximum, total * jnp.exp(maximum - new_maximum) + weights.sum(axis=-1, keepdims=True)

    start = jnp.full((num_rows, 1), MASKED, jnp.float32), jnp.zeros((num_rows, 1), jnp.float32)
    maximum, total = lax.fori_loop(bounds_ref[0, 0], bounds_ref[0, 1], add_up, start)
    # A query that sees nothing to normalise by has no scores: exp(s - inf).
    normaliser = jnp.where(maximum > 0.5 * MASKED, maximum + jnp.log(total), jnp.inf)  # [R, 1]

    per_block = selection.kernels_per_block
    furthest = math.ceil(selection.pool_padding / per_block)
    group = num_rows // tile
    lane = lax.broadcasted_iota(jnp.int32, (1, CHUNK_BLOCKS), 1)
    place = lax.broadcasted_iota(jnp.int32, (1, CHUNK_BLOCKS * per_block), 1)
    place = per_block * lax.rem(place, CHUNK_BLOCKS) + lax.div(place, CHUNK_BLOCKS)

    def pool(i: Array, before: tuple[Array, ...]) -> tuple[Array, ...]:
        probabilities = jnp.exp(multiply(fine_ref[i]) - normaliser).reshape(group, tile, -1)
        grouped = probabilities.sum(axis=0)
        kernel = i * (CHUNK_BLOCKS * per_block) + place
        grouped = jnp.where((first_fine <= kernel) & (kernel < end_fine), grouped, 0.0)  # [t, r·c]
        places = [grouped[:, y * CHUNK_BLOCKS : (y + 1) * CHUNK_BLOCKS] for y in range(per_block)]
        best = functools.reduce(jnp.maximum, places)
        moved = []
        for s in range(1, furthest + 1):
            # Kernel y of a block reaches into the s-th block after it if y >= s·r - padding.
            reaching = functools.reduce(jnp.maximum, places[max(per_block * s - selection.pool_padding, 0) :])
            moved.append(pltpu.roll(reaching, s, 1))
            best = jnp.maximum(best, jnp.where(lane < s, before[s - 1], moved[-1]))
        out_ref[:, pl.ds(pl.multiple_of(i * CHUNK_BLOCKS, CHUNK_BLOCKS), CHUNK_BLOCKS)] = best
        return tuple(moved)

    out_ref[...] = jnp.zeros_like(out_ref)
    nothing = (jnp.zeros((tile, CHUNK_BLOCKS), jnp.float32),) * furthest
    lax.fori_loop(bounds_ref[0, 2], bounds_ref[0, 3], pool, nothing)
