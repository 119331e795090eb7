"""Attention over chosen blocks of a cache on TPU: blocks are fetched by number while those before are multiplied.

One sequence, key/value head and query at a time; the heads of its group are the rows of each product. A step of the
grid takes several blocks, each through an argument of its own: the same cache, read where the list says. The running
softmax of flash attention (arXiv 2205.14135) joins the steps.

The kernel wants rows of a cache to lie in whole lanes. At head_dim 128 they do; a narrower cache that comes from
elsewhere is laid out anew first, its rows padded to 128: a loop that carries the cache does so once.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from kernels_pallas.sparse_decode_attention.arg_specs import ArgSpec
from kernels_pallas.sparse_decode_attention.costs import blocks_per_step, decode_cost
from kernels_pallas.sparse_decode_attention.tuned_block_sizes import MAX_BLOCK_IDS

# Width of a row of vector memory; softmax's statistics are repeated over it.
LANES = 128
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def unsupported_reason(q: Float[Array, "B T N H"], block_ids: Int[Array, "B K T I"], block_size: int) -> str | None:
    """Says why the kernel cannot serve these arguments, or None if it can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q has dtype {q.dtype}: must be float32 or bfloat16"
    if block_size % 16:
        return f"block_size = {block_size}: must be a multiple of 16"
    if block_ids.size > MAX_BLOCK_IDS:
        return f"block_ids has {block_ids.size} numbers: at most {MAX_BLOCK_IDS} fit scalar memory; take fewer queries"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and any(axis != AxisType.Manual for axis in mesh.axis_types):
        return (
            f"on a mesh of {mesh.size} devices: call it inside shard_map, where each device has its own batch and heads"
        )
    return None


def sparse_decode_attention(
    q: Float[Array, "B T N H"],
    k_cache: Float[Array, "L ... H"],
    v_cache: Float[Array, "L ... H"],
    block_ids: Int[Array, "B K T I"],
    query_positions: Int[Array, "B T"],
    layer: int | Int[Array, ""],
    page_table: Int[Array, "B M"] | None,
    block_size: int,
    scale: float,
    interpret: Any = False,
) -> Float[Array, "B T N H"]:
    """See `kernels_pallas.sparse_decode_attention.api.sparse_decode_attention`.

    `interpret` (True or `pltpu.InterpretParams`) runs the kernel's program step by step on any device, for tests.
    """
    batch, length, heads, size = q.shape
    kv_heads, rows = block_ids.shape[1], k_cache.shape[-2]
    group, keys = heads // kv_heads, min(block_size, rows)
    slots = rows if page_table is None else rows * page_table.shape[1]
    spec = ArgSpec(
        batch, slots, heads, kv_heads, size, str(k_cache.dtype), length, block_size, num_selected=block_ids.shape[3]
    )
    per_step = blocks_per_step(block_size, block_ids.shape[3])
    steps = math.ceil(block_ids.shape[3] / per_step)
    padding = steps * per_step - block_ids.shape[3]
    block_ids = jnp.pad(block_ids, ((0, 0), (0, 0), (0, 0), (0, padding)), constant_values=-1)
    shape = block_ids.shape
    queries = q.reshape(batch, length, kv_heads, group, size)
    table = jnp.zeros((1, 1), jnp.int32) if page_table is None else page_table

    def number(ids: Any, b: Any, h: Any, t: Any, i: Any) -> Any:
        # One dimension: scalar memory pads the last of several to 128.
        return ids[((b * shape[1] + h) * shape[2] + t) * shape[3] + i]

    def cache_spec(i: int) -> pl.BlockSpec:
        def where(b: Any, h: Any, t: Any, step: Any, layer: Any, ids: Any, _: Any, table: Any) -> tuple[Any, ...]:
            block = jnp.maximum(number(ids, b, h, t, step * per_step + i), 0)
            if page_table is None:
                return layer[0], b, h, block, 0
            blocks = rows // block_size
            page = table[b * page_table.shape[1] + lax.div(block, blocks)]
            return layer[0], h, page, lax.rem(block, blocks), 0

        return pl.BlockSpec((None, None, None, keys, size), where)

    def kernel(_: Any, ids: Any, positions: Any, __: Any, q_ref: Any, *refs: Any) -> None:
        k_refs, v_refs, (out_ref, maximum, total, acc) = refs[:per_step], refs[per_step : 2 * per_step], refs[-4:]
        b, h, t, step = (pl.program_id(axis) for axis in range(4))

        @pl.when(step == 0)
        def _start() -> None:
            maximum[...] = jnp.full_like(maximum, MASKED)
            total[...] = jnp.zeros_like(total)
            acc[...] = jnp.zeros_like(acc)

        last = positions[b * length + t]
        for i in range(per_step):
            block = number(ids, b, h, t, step * per_step + i)

            @pl.when((block >= 0) & (block * block_size <= last))
            def _add(i: int = i, block: Any = block) -> None:
                k, v = k_refs[i][...].astype(q_ref.dtype), v_refs[i][...].astype(q_ref.dtype)
                if rows % block_size and page_table is None:
                    # What lies behind the end of the cache is not zero, and zero times it may not be either.
                    inside = block * block_size + lax.broadcasted_iota(jnp.int32, v.shape, 0) < rows
                    v = jnp.where(inside, v, jnp.zeros_like(v))
                scores = scale * lax.dot_general(
                    q_ref[...], k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
                )
                at = block * block_size + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                scores = jnp.where(at <= last, scores, MASKED)
                before = maximum[...]
                now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
                weights = jnp.exp(scores - now[:, :1])
                shrink = jnp.exp(before - now)
                total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
                product = lax.dot_general(
                    weights.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
                )
                acc[...] = acc[...] * shrink[:, :1] + product
                maximum[...] = now

        @pl.when(step == steps - 1)
        def _finish() -> None:
            sums = total[...][:, :1]
            out_ref[...] = (acc[...] / jnp.where(sums > 0, sums, 1.0)).astype(out_ref.dtype)

    query_spec = pl.BlockSpec((None, None, None, group, size), lambda b, h, t, step, *_: (b, t, h, 0, 0))
    specs = [cache_spec(i) for i in range(per_step)]
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, kv_heads, length, steps),
            in_specs=[query_spec, *specs, *specs],
            out_specs=query_spec,
            scratch_shapes=[
                pltpu.VMEM((group, LANES), jnp.float32),
                pltpu.VMEM((group, LANES), jnp.float32),
                pltpu.VMEM((group, size), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=decode_cost(spec),
        interpret=interpret,
        name="sparse_decode_attention",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        block_ids.reshape(-1),
        query_positions.astype(jnp.int32).reshape(-1),
        table.reshape(-1),
        queries,
        *[k_cache] * per_step,
        *[v_cache] * per_step,
    )
    return out.reshape(q.shape)
