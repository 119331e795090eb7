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
) -> Float[Array, "B T N H"]:
    """Calls `attend(q, k, v, segment_ids)` on every device of the mesh in scope with its part of the arguments.

    Where the heads are divided into more parts than there are key/value heads, those are repeated, so that each
    device holds the ones that its query heads read.

    Args:
        attend: attention over whole sequences; maps over batch rows and over groups of heads.
        q: queries.
        k: keys.
        v: values.
        segment_ids: document of each token.
        partition_spec: how `q` is divided; None, or no mesh in scope, calls `attend` as it is.

    Raises:
        UnsupportedError: if `partition_spec` divides the length or the head width, or more finely than there are heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if partition_spec is None or mesh.size <= 1:
        return attend(q, k, v, segment_ids)
    batch_axes, length_axes, head_axes, width_axes = (*partition_spec, None, None, None, None)[:4]
    if length_axes or width_axes:
        raise UnsupportedError(f"attention: partition_spec = {partition_spec}: may divide only batch and heads of q")
    names = head_axes if isinstance(head_axes, tuple) else (head_axes,) if head_axes else ()
    parts = math.prod(mesh.shape[name] for name in names)
    if q.shape[2] % parts:
        raise UnsupportedError(f"attention: partition_spec = {partition_spec}: {parts} must divide {q.shape[2]} heads")
    copies = parts // math.gcd(k.shape[2], parts)
    k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    spec = PartitionSpec(batch_axes, None, head_axes, None)
    if segment_ids is None:
        return jax.shard_map(
            lambda q, k, v: attend(q, k, v, None), in_specs=(spec,) * 3, out_specs=spec, check_vma=False
        )(q, k, v)
    in_specs = spec, spec, spec, PartitionSpec(batch_axes, None)
    return jax.shard_map(attend, in_specs=in_specs, out_specs=spec, check_vma=False)(q, k, v, segment_ids)
