"""Attention on each device's own batch rows and heads, and sparse attention also on its own queries."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import UnsupportedError


def attend_per_device(
    attend: Callable[..., Array],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    partition_spec: PartitionSpec | None,
    block_ids: Int[Array, "B K T I"] | None = None,
) -> Float[Array, "B T N H"]:
    """Calls `attend(q, k, v, segment_ids)` on every device of the mesh in scope with its part of the arguments.

    Where the heads are divided into more parts than there are key/value heads, those are repeated, so that each
    device holds the ones that its query heads read. Where the length is divided, queries stay where they are and keys
    and values are gathered whole; their gradients are summed and scattered on the way back.

    Args:
        attend: attention over whole sequences; maps over batch rows and over groups of heads. With `block_ids` it is
            called as `attend(q, k, v, segment_ids, block_ids, query_positions)`, where `query_positions` [B, T] are
            the places of its queries among the keys, or None for all of them in order.
        q: queries.
        k: keys.
        v: values.
        segment_ids: document of each token.
        partition_spec: how `q` is divided; None, or no mesh in scope, calls `attend` as it is.
        block_ids: blocks of keys that each query chose, of sparse attention.

    Raises:
        UnsupportedError: if `partition_spec` divides the head width, or the length of dense attention, or more finely
            than there are heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if partition_spec is None or mesh.size <= 1:
        return attend(q, k, v, segment_ids, *(() if block_ids is None else (block_ids, None)))
    batch_axes, length_axes, head_axes, width_axes = (*partition_spec, None, None, None, None)[:4]
    if width_axes or (length_axes and block_ids is None):
        raise UnsupportedError(f"attention: partition_spec = {partition_spec}: may divide only batch and heads of q")
    names = head_axes if isinstance(head_axes, tuple) else (head_axes,) if head_axes else ()
    parts = math.prod(mesh.shape[name] for name in names)
    if q.shape[2] % parts:
        raise UnsupportedError(f"attention: partition_spec = {partition_spec}: {parts} must divide {q.shape[2]} heads")
    spec = PartitionSpec(batch_axes, length_axes, head_axes, None)
    copies = parts // math.gcd(k.shape[2], parts)
    if copies > 1:
        # Few heads are gathered as far as they are divided more finely, before they are many.
        while k.shape[2] % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        few = PartitionSpec(batch_axes, length_axes, names or None, None)
        k, v = (jnp.repeat(jax.lax.with_sharding_constraint(x, few), copies, axis=2) for x in (k, v))
    rows = None if segment_ids is None else PartitionSpec(batch_axes, None)
    in_specs = (spec, spec, spec, rows)
    if block_ids is None:
        return jax.shard_map(attend, in_specs=in_specs, out_specs=spec, check_vma=False)(q, k, v, segment_ids)

    def attend_whole_rows(
        q: Array, k: Array, v: Array, segment_ids: Array | None, ids: Array, positions: Array
    ) -> Array:
        if not length_axes:
            return attend(q, k, v, segment_ids, ids, None)
        k, v = (jax.lax.all_gather(x, length_axes, axis=1, tiled=True) for x in (k, v))
        return attend(q, k, v, segment_ids, ids, positions)

    ids = block_ids if copies == 1 else jnp.repeat(block_ids, copies, axis=1)
    positions = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    more = PartitionSpec(batch_axes, head_axes, length_axes, None), PartitionSpec(batch_axes, length_axes)
    on_devices = jax.shard_map(attend_whole_rows, in_specs=(*in_specs, *more), out_specs=spec, check_vma=False)
    return on_devices(q, k, v, segment_ids, ids, positions)
