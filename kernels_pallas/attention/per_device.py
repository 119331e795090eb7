"""Attention on each device's own batch rows and heads."""

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
    device holds the ones that its query heads read.

    Args:
        attend: attention over whole sequences; maps over batch rows and over groups of heads. Takes `block_ids` as
            its last argument where they are given.
        q: queries.
        k: keys.
        v: values.
        segment_ids: document of each token.
        partition_spec: how `q` is divided; None, or no mesh in scope, calls `attend` as it is.
        block_ids: blocks of keys that each query chose, of sparse attention.

    Raises:
        UnsupportedError: if `partition_spec` divides the length or the head width, or more finely than there are heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    chosen: tuple[Array, ...] = () if block_ids is None else (block_ids,)
    if partition_spec is None or mesh.size <= 1:
        return attend(q, k, v, segment_ids, *chosen)
    batch_axes, length_axes, head_axes, width_axes = (*partition_spec, None, None, None, None)[:4]
    if length_axes or width_axes:
        raise UnsupportedError(f"attention: partition_spec = {partition_spec}: may divide only batch and heads of q")
    names = head_axes if isinstance(head_axes, tuple) else (head_axes,) if head_axes else ()
    parts = math.prod(mesh.shape[name] for name in names)
    if q.shape[2] % parts:
        raise UnsupportedError(f"attention: partition_spec = {partition_spec}: {parts} must divide {q.shape[2]} heads")
    spec = PartitionSpec(batch_axes, None, head_axes, None)
    copies = parts // math.gcd(k.shape[2], parts)
    if copies > 1:
        # Few heads are gathered as far as they are divided more finely, before they are many.
        while k.shape[2] % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        few = PartitionSpec(batch_axes, None, names or None, None)
        k, v = (jnp.repeat(jax.lax.with_sharding_constraint(x, few), copies, axis=2) for x in (k, v))
        chosen = tuple(jnp.repeat(ids, copies, axis=1) for ids in chosen)
    rows, heads = PartitionSpec(batch_axes, None), PartitionSpec(batch_axes, head_axes, None, None)
    in_specs = spec, spec, spec, None if segment_ids is None else rows, *(heads for _ in chosen)
    return jax.shard_map(attend, in_specs=in_specs, out_specs=spec, check_vma=False)(q, k, v, segment_ids, *chosen)
