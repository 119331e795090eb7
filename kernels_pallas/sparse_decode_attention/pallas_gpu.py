"""Attention over chosen blocks of a cache on a GPU, through Triton: a program walks the blocks of one query.

One sequence, key/value head and query at a time, as in the published CUDA kernels (infllmv2_cuda_impl, CPM.cu): the
heads of its group are the rows of each product, filled up to the 16 that a tensor core takes. A list is divided among
several programs where there are few queries, as in decoding, and their parts are joined by their log-sum-exps
(FlashDecoding).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from kernels_pallas.sparse_decode_attention.tuned_block_sizes import GPU_PROGRAMS

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
# The least rows, columns and depth of a product that Triton gives to tensor cores.
LEAST = 16


def unsupported_reason(q: Float[Array, "B T N H"], keys: Float[Array, "..."], block_size: int) -> str | None:
    """Says why the kernel cannot serve these arguments, or None if it can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"q has dtype {q.dtype}: must be float32, bfloat16 or float16"
    for name, size in (("block_size", block_size), ("head_dim", q.shape[3])):
        if size < LEAST or size & (size - 1):
            return f"{name} = {size}: must be a power of two from {LEAST}"
    if keys.size >= 2**31:
        return f"keys of {keys.size} numbers: must be below 2**31, as Pallas counts offsets in 32 bits"
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
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """See `kernels_pallas.sparse_decode_attention.api.sparse_decode_attention`.

    `interpret` runs the kernel's program step by step on any device, for tests.
    """
    batch, length, heads, size = q.shape
    kv_heads, per_query = block_ids.shape[1], block_ids.shape[3]
    group = heads // kv_heads
    group_rows = max(LEAST, 1 << (group - 1).bit_length())
    queries = q.reshape(batch, length, kv_heads, group, size)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, 0), (0, group_rows - group), (0, 0)))
    # A cache that is shorter than a block is filled up to one; nobody looks there.
    missing = [(0, 0)] * 3 + [(0, max(block_size - k_cache.shape[3], 0)), (0, 0)]
    k_cache, v_cache = jnp.pad(k_cache, missing), jnp.pad(v_cache, missing)
    rows = k_cache.shape[3]
    pages = jnp.zeros((1, 1), jnp.int32) if page_table is None else page_table
    # How far each list goes: what is behind its last block is not walked.
    ends = jnp.max(jnp.where(block_ids >= 0, jnp.arange(1, per_query + 1), 0), axis=3)  # [B, K, T]
    splits = min(max(per_query, 1), max(GPU_PROGRAMS // (batch * kv_heads * length), 1))
    per_split = math.ceil(per_query / splits)
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def kernel(
        layer: Any,
        ids: Any,
        ends: Any,
        positions: Any,
        pages: Any,
        keys: Any,
        values: Any,
        q_ref: Any,
        out_ref: Any,
        lse_ref: Any,
    ) -> None:
        t, head, split = (pl.program_id(axis) for axis in range(3))
        b, h = lax.div(head, kv_heads), lax.rem(head, kv_heads)
        last, q_rows = positions[b, t], q_ref[...]  # [G', H]

        def step(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, acc = state  # [G'], [G'], [G', H]
            block = ids[b, h, t, i]
            first = jnp.maximum(block, 0) * block_size
            # The last block of a cache may be cut short: it is read from where a whole one ends.
            start = jnp.minimum(first, rows - block_size) if page_table is None else first
            slots = pl.ds(start, block_size)
            at = start + jnp.arange(block_size)
            visible = (at >= first) & (at <= last) & (block >= 0)
            if page_table is None:
                where = layer[0], b, h, slots
            else:
                where = layer[0], h, pages[b, lax.div(first, rows)], pl.ds(lax.rem(first, rows), block_size)
            k_rows, v_rows = keys[*where].astype(q.dtype), values[*where].astype(q.dtype)  # [b, H]
            scores = scale * plgpu.dot(q_rows, k_rows, trans_b=True, precision=precision)  # [G', b]
            scores = jnp.where(visible[None], scores, MASKED)
            now = jnp.maximum(maximum, scores.max(axis=1))
            # Where nothing was seen so far the maximum is MASKED as well, and the weights would be ones.
            weights = jnp.where(visible[None], jnp.exp(scores - now[:, None]), 0.0)
            shrink = jnp.exp(maximum - now)
            product = plgpu.dot(weights.astype(q.dtype), v_rows, precision=precision)
            return now, total * shrink + weights.sum(axis=1), acc * shrink[:, None] + product

        empty = jnp.full((group_rows,), MASKED), jnp.zeros((group_rows,)), jnp.zeros((group_rows, size))
        end = jnp.minimum((split + 1) * per_split, ends[b, h, t])
        maximum, total, acc = lax.fori_loop(split * per_split, end, step, empty)
        total = jnp.where(total > 0, total, 1.0)
        out_ref[...] = (acc / total[:, None]).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(maximum > MASKED, maximum + jnp.log(total), -jnp.inf)

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    # Parts that are joined are joined in float32.
    out_type = q.dtype if splits == 1 else jnp.float32
    out, lse = pl.pallas_call(
        kernel,
        # Neighbouring queries next to each other, as they read much the same blocks.
        grid=(length, batch * kv_heads, splits),
        in_specs=[
            *[anywhere] * 7,
            pl.BlockSpec((None, None, None, group_rows, size), lambda t, h, s: (h // kv_heads, t, h % kv_heads, 0, 0)),
        ],
        out_specs=(
            pl.BlockSpec((None, None, None, group_rows, size), lambda t, h, s: (s, h, t, 0, 0)),
            pl.BlockSpec((None, None, None, group_rows), lambda t, h, s: (s, h, t, 0)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((splits, batch * kv_heads, length, group_rows, size), out_type),
            jax.ShapeDtypeStruct((splits, batch * kv_heads, length, group_rows), jnp.float32),
        ),
        # Products in float32 are sums in registers, which four warps do not have enough of.
        compiler_params=plgpu.CompilerParams(num_warps=8 if q.dtype == jnp.float32 else 4, num_stages=2),
        interpret=interpret,
        name="sparse_decode_attention",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        block_ids,
        ends,
        query_positions.astype(jnp.int32),
        pages,
        k_cache,
        v_cache,
        queries,
    )
    out = _join(out, lse) if splits > 1 else out[0]
    out = out.reshape(batch, kv_heads, length, group_rows, size)[:, :, :, :group].transpose(0, 2, 1, 3, 4)
    return out.reshape(q.shape).astype(q.dtype)


def _join(out: Float[Array, "P ... H"], lse: Float[Array, "P ..."]) -> Float[Array, "... H"]:
    """Joins parts of a softmax's output by their log-sum-exps."""
    total = jax.nn.logsumexp(lse, axis=0)
    weights = jnp.exp(lse - jnp.where(total > -jnp.inf, total, 0.0))  # zeros where nothing is seen
    return jnp.sum(weights[..., None] * out, axis=0)
