"""Block-sparse causal attention on TPU: a tile of neighbouring queries walks the union of its blocks.

Exact: every query sees just the blocks that it chose. A tile's table (`tile_unions.py`) lists the blocks that any of
its 32 queries chose, with a bit for each query; times the heads of the group they are the rows of one matrix product.
Blocks are copied from HBM by number, a group of them at a time, while the group before is multiplied; the last group of
a tile already fetches for the next tile.

Two kernels: forward, with the log-sum-exp of each row, and all gradients. There a range of keys stays in vector memory
with its float32 gradients while all tiles of queries after it pass, each with its entries of the range and the sum of
its dq so far. Scores are so computed once for all gradients: five products instead of seven. To read the queries again
for each pair of block and tile would take four times the bytes of the forward pass at 16 heads a group.

Rows: the heads of a group, then the queries of a tile, G·t of them. Tables reach scalar memory one tile at a time, so
its use does not grow with the batch, and with the length only until a list is as long as all of a tile's choices.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from kernels_pallas.block_sparse_attention.arg_specs import ArgSpec
from kernels_pallas.block_sparse_attention.costs import backward_cost, forward_cost, range_bytes
from kernels_pallas.block_sparse_attention.tile_unions import TileUnions, range_starts, tile_unions
from kernels_pallas.block_sparse_attention.tuned_block_sizes import (
    DQ_BUFFERS,
    GROUP_KEYS,
    RANGE_GROUP_KEYS,
    TILE,
    TILES_PER_STEP,
)
from kernels_pallas.block_sparse_attention.union_walk import (
    LANES,
    MASKED,
    TokenTables,
    UnionWalk,
    add_bias,
    blocks_per_group,
    compiler_params,
    dot,
    group_bias,
    row_spec,
    token_tables,
    walk_operands,
)


def unsupported_reason(q: Float[Array, "B T N H"], block_size: int) -> str | None:
    """Says why the kernels cannot serve these arguments, or None if they can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q has dtype {q.dtype}: must be float32 or bfloat16"
    if block_size not in (16, 32, 64, 128, 256):
        return f"block_size = {block_size}: must be 16, 32, 64, 128 or 256"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and any(axis != AxisType.Manual for axis in mesh.axis_types):
        return (
            f"on a mesh of {mesh.size} devices: call it inside shard_map, where each device has its own batch and heads"
        )
    return None


def block_sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    block_ids: Int[Array, "B K T I"],
    segment_ids: Int[Array, "B S"] | None,
    block_size: int,
    scale: float,
    query_positions: Int[Array, "B T"] | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """See `kernels_pallas.block_sparse_attention.api.block_sparse_attention`; returns the output and the log-sum-exp.

    `interpret` (True or `pltpu.InterpretParams`) runs the kernels' programs step by step on any device, for tests.
    """
    batch_size, length, num_heads, width = q.shape
    in_order = query_positions is None
    if query_positions is None:
        query_positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch_size, length))
    if segment_ids is None:
        segment_ids = jnp.zeros(k.shape[:2], jnp.int32)
    query_segments = segment_ids
    if not in_order:
        query_segments = jnp.take_along_axis(segment_ids, jnp.maximum(query_positions, 0), axis=1)
    multiple = math.lcm(TILE * TILES_PER_STEP, block_size)
    q, block_ids = _pad(q, 1, multiple), _pad(block_ids, 2, multiple, -1)
    k, v, key_segments = (_pad(x, 1, multiple) for x in (k, v, segment_ids))
    query_positions, query_segments = (_pad(x, 1, multiple) for x in (query_positions, query_segments))
    tokens = token_tables(query_positions, query_segments, key_segments, block_size)
    spec = ArgSpec(
        batch_size,
        k.shape[1],
        num_heads=num_heads,
        num_kv_heads=k.shape[2],
        head_dim=width,
        dtype=str(q.dtype),
        block_size=block_size,
        num_selected=block_ids.shape[-1],
    )
    out, lse = _attention(spec, scale, interpret, in_order, q, k, v, block_ids, tokens)
    return out[:, :length], lse[:, :, :length]


def _pad(x: Array, axis: int, multiple: int, value: int = 0) -> Array:
    widths = [(0, -x.shape[i] % multiple if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attention(spec: ArgSpec, scale: float, interpret: Any, in_order: bool, *args: Any) -> tuple[Array, Array]:
    return _attention_fwd(spec, scale, interpret, in_order, *args)[0]


def _attention_fwd(
    spec: ArgSpec, scale: float, interpret: Any, in_order: bool, *args: Any
) -> tuple[tuple[Array, Array], tuple]:
    q, k, v, block_ids, tokens = args
    unions = _unions(block_ids, k.shape[1], spec.block_size)
    q_rows = _to_rows(q, k.shape[2])
    kv = _key_blocks(k, v, spec.block_size)
    out, lse = _forward(spec, scale, interpret, q_rows, kv, unions, tokens)
    out, lse = _from_rows(out, q.shape), _from_stats(lse, q.shape[2])
    return (out, lse), (q, k, v, unions, tokens, out, lse)


def _attention_bwd(
    spec: ArgSpec, scale: float, interpret: Any, in_order: bool, residuals: tuple, cotangents: tuple
) -> tuple:
    q, k, v, unions, tokens, out, lse = residuals
    dout, dlse = cotangents
    num_kv_heads = k.shape[2]
    # sum_s p_s · dp_s of the softmax's gradient equals out · dout; the log-sum-exp's own gradient is p.
    delta = jnp.einsum("btnh,btnh->bnt", out.astype(jnp.float32), dout.astype(jnp.float32)) - dlse
    # A row that sees nothing has no weights: exp(MASKED - 0).
    lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
    rows = _to_rows(q, num_kv_heads), _to_rows(dout, num_kv_heads)
    stats = _to_stats(lse, num_kv_heads), _to_stats(delta, num_kv_heads)
    kv = _key_blocks(k, v, spec.block_size)
    dq, dkv = _backward(spec, scale, interpret, in_order, rows, stats, kv, unions, tokens)
    dkv = dkv.reshape(*dkv.shape[:2], -1, dkv.shape[-1])[:, :, : k.shape[1]].transpose(0, 2, 1, 3)
    dk, dv = jnp.split(dkv, 2, axis=-1)
    return _from_rows(dq.astype(q.dtype), q.shape), dk, dv, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _unions(block_ids: Array, num_keys: int, block_size: int) -> TileUnions:
    return tile_unions(block_ids, TILE, num_keys // block_size, blocks_per_group(GROUP_KEYS, block_size))


def _to_rows(x: Float[Array, "B T N H"], num_kv_heads: int) -> Float[Array, "B K M R H"]:
    """Tiles of rows: the heads of a group, then the queries of a tile."""
    batch_size, length, num_heads, width = x.shape
    x = x.reshape(batch_size, length // TILE, TILE, num_kv_heads, num_heads // num_kv_heads, width)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(batch_size, num_kv_heads, length // TILE, -1, width)


def _from_rows(x: Float[Array, "B K M R H"], shape: tuple[int, ...]) -> Float[Array, "B T N H"]:
    batch_size, num_kv_heads, num_tiles, _, width = x.shape
    x = x.reshape(batch_size, num_kv_heads, num_tiles, -1, TILE, width)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(shape)


def _to_stats(x: Float[Array, "B N T"], num_kv_heads: int) -> Float[Array, "B K M 1 R"]:
    """A number for each row, in the rows' order."""
    batch_size, num_heads, length = x.shape
    x = x.reshape(batch_size, num_kv_heads, num_heads // num_kv_heads, length // TILE, TILE)
    return x.swapaxes(2, 3).reshape(batch_size, num_kv_heads, length // TILE, 1, -1)


def _from_stats(x: Float[Array, "B K M 1 R"], num_heads: int) -> Float[Array, "B N T"]:
    batch_size, num_kv_heads, num_tiles = x.shape[:3]
    x = x.reshape(batch_size, num_kv_heads, num_tiles, -1, TILE)
    return x.swapaxes(2, 3).reshape(batch_size, num_heads, -1)


def _key_blocks(k: Array, v: Array, block_size: int) -> Float[Array, "B K C b 2H"]:
    """Keys and values side by side: one copy fetches both, and a head width of 64 fills the lanes."""
    kv = jnp.concatenate([k, v], axis=-1).transpose(0, 2, 1, 3)
    return kv.reshape(*kv.shape[:2], -1, block_size, kv.shape[-1])


def _forward(
    spec: ArgSpec,
    scale: float,
    interpret: Any,
    q: Array,
    kv: Array,
    unions: TileUnions,
    tokens: TokenTables,
) -> tuple[Float[Array, "B K M R H"], Float[Array, "B K M 1 R"]]:
    batch_size, num_kv_heads, num_tiles, num_rows, width = q.shape
    operands, specs, scratch = walk_operands(kv, unions, tokens)
    return pl.pallas_call(
        functools.partial(_forward_kernel, spec.block_size, scale),
        grid=(batch_size, num_kv_heads, num_tiles),
        in_specs=[row_spec(num_rows, width), *specs],
        out_specs=[row_spec(num_rows, width), row_spec(1, num_rows)],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((*q.shape[:3], 1, num_rows), jnp.float32),
        ],
        scratch_shapes=[
            *scratch,
            pltpu.VMEM((num_rows, LANES), jnp.float32),
            pltpu.VMEM((num_rows, LANES), jnp.float32),
            pltpu.VMEM((num_rows, width), jnp.float32),
        ],
        compiler_params=compiler_params(3),
        cost_estimate=forward_cost(spec, share=num_tiles * TILE / spec.seq_len),
        interpret=interpret,
        name="block_sparse_attention_forward",
    )(q, *operands)


def _forward_kernel(block_size: int, scale: float, q_ref: Any, *refs: Any) -> None:
    *tables, queries_ref, k_segments_ref, kv_hbm, out_ref, lse_ref = refs[:9]
    max_ref, sum_ref, acc_ref = refs[12:]
    max_ref[...] = jnp.full_like(max_ref, MASKED)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    q = q_ref[...]
    positions, q_segments = (jnp.expand_dims(queries_ref[i], -1) for i in range(2))

    def use(kv: Array, ids: list[Array], words: list[Array]) -> None:
        k, v = kv[:, : q.shape[-1]], kv[:, q.shape[-1] :]
        bias = group_bias(ids, words, positions, q_segments, k_segments_ref, block_size)
        scores = add_bias(scale * dot(q, k, (1, 1)), bias)  # [R, s]
        old_max = max_ref[:, :1]
        new_max = jnp.maximum(old_max, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_max)
        shrink = jnp.exp(old_max - new_max)
        max_ref[...] = jnp.broadcast_to(new_max, max_ref.shape)
        total = shrink * sum_ref[:, :1] + weights.sum(axis=-1, keepdims=True)
        sum_ref[...] = jnp.broadcast_to(total, sum_ref.shape)
        acc_ref[...] = shrink * acc_ref[...] + dot(weights.astype(v.dtype), v, (1, 0))

    UnionWalk(tuple(tables), kv_hbm, refs[9:12]).run(use)
    total, maximum = sum_ref[:, :1], max_ref[:, :1]
    sees = maximum > 0.5 * MASKED
    out_ref[...] = jnp.where(sees, acc_ref[...] / total, 0.0).astype(out_ref.dtype)
    lse = jnp.where(sees, maximum + jnp.log(total), -jnp.inf)
    lse_ref[...] = jnp.broadcast_to(lse, max_ref.shape).T[:1]


def _backward(
    spec: ArgSpec,
    scale: float,
    interpret: Any,
    in_order: bool,
    rows: tuple[Array, Array],
    stats: tuple[Array, Array],
    kv: Array,
    unions: TileUnions,
    tokens: TokenTables,
) -> tuple[Float[Array, "B K M R H"], Float[Array, "B K C b 2H"]]:
    """Returns dq in float32, and the gradients of keys and values side by side; C is rounded up to whole ranges.

    `in_order` says that query t is key t, so that a range of keys need not meet the queries before it.
    """
    q, block_size = rows[0], spec.block_size
    batch_size, num_kv_heads, num_tiles, num_rows, width = q.shape
    num_blocks, num_entries = kv.shape[2], unions.ids.shape[-1]
    block_bytes = block_size * kv.shape[-1] * kv.dtype.itemsize
    range_blocks = min(max(range_bytes(kv.dtype.itemsize) // block_bytes, 1), num_blocks)
    num_ranges = pl.cdiv(num_blocks, range_blocks)
    fill = num_ranges * range_blocks - num_blocks
    kv = jnp.pad(kv, ((0, 0), (0, 0), (0, fill), (0, 0), (0, 0)))
    k_segments = jnp.pad(tokens.key_segments, ((0, 0), (0, fill), (0, 0)))
    starts = range_starts(unions, range_blocks, num_ranges)
    skipped = range_blocks * block_size if in_order else 0  # queries, for each range before

    def step_of(r: Array, i: Array) -> Array:
        # Steps before the range's first query have nothing to do; they name that one, so that nothing is copied.
        return jnp.maximum(i, r * skipped // (TILE * TILES_PER_STEP))

    def per_tile(*shape: int, **kwargs: Any) -> pl.BlockSpec:
        index = lambda b, h, r, i: (b, h, step_of(r, i), 0, 0)  # noqa: E731
        return pl.BlockSpec((None, None, TILES_PER_STEP, *shape), index, **kwargs)

    # One buffer for each: a range stays for all tiles after it.
    kv_spec = pl.BlockSpec(
        (None, None, range_blocks, *kv.shape[3:]),
        lambda b, h, r, i: (b, h, r, 0, 0),
        pipeline_mode=pl.Buffered(buffer_count=1),
    )
    return pl.pallas_call(
        functools.partial(_backward_kernel, block_size, scale, skipped),
        grid=(batch_size, num_kv_heads, num_ranges, num_tiles // TILES_PER_STEP),
        in_specs=[
            *[per_tile(num_rows, width)] * 2,
            *[per_tile(1, num_rows)] * 2,
            per_tile(1, num_ranges + 1, memory_space=pltpu.SMEM),
            *[per_tile(1, num_entries, memory_space=pltpu.SMEM)] * 2,
            pl.BlockSpec((None, TILES_PER_STEP, 2, TILE), lambda b, h, r, i: (b, step_of(r, i), 0, 0)),
            pl.BlockSpec((None, range_blocks, k_segments.shape[-1]), lambda b, h, r, i: (b, r, 0)),
            kv_spec,
        ],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY), kv_spec],
        out_shape=[jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(kv.shape, kv.dtype)],
        scratch_shapes=[
            pltpu.VMEM((range_blocks, *kv.shape[3:]), jnp.float32),
            pltpu.VMEM((DQ_BUFFERS, TILES_PER_STEP, num_rows, width), jnp.float32),
            *[pltpu.SemaphoreType.DMA((DQ_BUFFERS,))] * 2,
        ],
        compiler_params=compiler_params(4),
        cost_estimate=backward_cost(spec, share=num_tiles * TILE / spec.seq_len),
        interpret=interpret,
        name="block_sparse_attention_backward",
    )(
        *rows,
        *stats,
        starts[..., None, :],
        unions.ids[..., None, :],
        unions.words[..., None, :],
        tokens.queries,
        k_segments,
        kv,
    )


class _RunningSums:
    """dq of a step's tiles, kept in HBM between the ranges of keys and added to in vector memory.

    The first range passes all tiles and only writes. Later ones fetch a step's sums while the step before is computed;
    a buffer is free for that when the step that wrote from it is two steps past.
    """

    def __init__(self, dq_hbm: Any, buffers: Any, semaphores: tuple[Any, Any], begin: Any):
        self.dq_hbm, self.buffers, self.semaphores, self.begin = dq_hbm, buffers, semaphores, begin
        # Taken here: in a branch the interpreter does not know them.
        self.batch, self.head, self.key_range, self.step = map(pl.program_id, range(4))
        self.num_steps = pl.num_programs(3)

    def _copy(self, step: Any, *, fetch: bool) -> Any:
        slot = step % DQ_BUFFERS
        in_hbm = self.dq_hbm.at[self.batch, self.head, pl.ds(step * TILES_PER_STEP, TILES_PER_STEP)]
        ends = (in_hbm, self.buffers.at[slot]) if fetch else (self.buffers.at[slot], in_hbm)
        return pltpu.make_async_copy(*ends, self.semaphores[fetch].at[slot])

    def take(self) -> Any:
        """Returns the buffer with what earlier ranges have added up for this step's tiles."""
        step, later = self.step, self.key_range > 0

        @pl.when(later & (step == self.begin))
        def fetch_first() -> None:
            self._copy(step, fetch=True).start()

        @pl.when(step >= self.begin + 2)
        def free_next() -> None:
            self._copy(step - 2, fetch=False).wait()

        @pl.when(later & (step + 1 < self.num_steps))
        def fetch_ahead() -> None:
            self._copy(step + 1, fetch=True).start()

        @pl.when(later)
        def await_sums() -> None:
            self._copy(step, fetch=True).wait()

        buffer = self.buffers.at[step % DQ_BUFFERS]

        @pl.when(~later)
        def begin_sums() -> None:
            buffer[...] = jnp.zeros_like(buffer)

        return buffer

    def put(self) -> None:
        """Writes this step's sums back; with the last step of a range everything is written."""
        self._copy(self.step, fetch=False).start()

        @pl.when(self.step == self.num_steps - 1)
        def finish() -> None:
            @pl.when(self.step > self.begin)
            def before() -> None:
                self._copy(self.step - 1, fetch=False).wait()

            self._copy(self.step, fetch=False).wait()


def _backward_kernel(
    block_size: int,
    scale: float,
    skipped: int,
    q_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    starts_ref: Any,
    ids_ref: Any,
    words_ref: Any,
    queries_ref: Any,
    k_segments_ref: Any,
    kv_ref: Any,
    dq_hbm: Any,
    dkv_ref: Any,
    acc_ref: Any,
    dq_buffers: Any,
    *dq_semaphores: Any,
) -> None:
    key_range, step = pl.program_id(2), pl.program_id(3)
    width, num_entries = q_ref.shape[-1], ids_ref.shape[-1]
    first_block = key_range * kv_ref.shape[0]
    first_step = key_range * skipped // (TILE * TILES_PER_STEP)
    per_group = blocks_per_group(RANGE_GROUP_KEYS, block_size)
    sums = _RunningSums(dq_hbm, dq_buffers, dq_semaphores, first_step)

    @pl.when(step == 0)
    def begin() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def tile(i: Array, dq_ref: Any) -> None:
        start, end = starts_ref[i, 0, key_range], starts_ref[i, 0, key_range + 1]

        @pl.when(start < end)
        def walk() -> None:
            q, dout = q_ref[i], dout_ref[i]
            lse, delta = (jnp.expand_dims(ref[i][0], -1) for ref in (lse_ref, delta_ref))  # [R, 1]
            positions, q_segments = (jnp.expand_dims(queries_ref[i][j], -1) for j in range(2))
            positions -= first_block * block_size

            def group(g: Array, _: None) -> None:
                blocks, words = [], []
                for j in range(per_group):
                    entry = start + g * per_group + j
                    here = entry < end
                    entry = jnp.minimum(entry, num_entries - 1)
                    blocks.append(jnp.where(here, ids_ref[i, 0, entry] - first_block, 0))
                    words.append(jnp.where(here, words_ref[i, 0, entry], 0))
                kv = jnp.concatenate([kv_ref[block] for block in blocks], axis=0)
                k, v = kv[:, :width], kv[:, width:]
                bias = group_bias(blocks, words, positions, q_segments, k_segments_ref, block_size)
                weights = jnp.exp(add_bias(scale * dot(q, k, (1, 1)), bias) - lse)  # [R, s]
                dscores = (scale * weights * (dot(dout, v, (1, 1)) - delta)).astype(q.dtype)
                dq_ref[i] += dot(dscores, k, (1, 0))
                dk = dot(dscores, q, (0, 0))
                dv = dot(weights.astype(dout.dtype), dout, (0, 0))
                dkv = jnp.concatenate([dk, dv], axis=-1).reshape(per_group, block_size, -1)
                for j, block in enumerate(blocks):
                    acc_ref[block] += dkv[j]

            lax.fori_loop(0, pl.cdiv(end - start, per_group), group, None)

    # Before the range's first query the arguments are those of a later step.
    @pl.when(step >= first_step)
    def tiles() -> None:
        dq_ref = sums.take()
        lax.fori_loop(0, TILES_PER_STEP, lambda i, _: tile(i, dq_ref), None)
        sums.put()

    @pl.when(step == pl.num_programs(3) - 1)
    def finish() -> None:
        dkv_ref[...] = acc_ref[...].astype(dkv_ref.dtype)
