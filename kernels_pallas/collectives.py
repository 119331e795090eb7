"""How parameters that are held in parts travel, for the functions that say themselves what each device does."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def gather_parameter(
    axis_names: tuple[str, ...], dim: int, dtype: jnp.dtype, part: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Puts the parts of a parameter together on every device, inside `jax.shard_map`.

    The parts travel in the type that the parameter is used in, half the bytes of a float32 parameter that is multiplied
    in bfloat16. Their gradients are summed in the parameter's own type, straight into each device's part.

    Args:
        axis_names: mesh axes over which the parameter is divided.
        dim: its dimension that is divided.
        dtype: what it will be cast to.
        part: this device's part.

    Returns:
        The whole, in the type of `part` but rounded to `dtype`.
    """
    return lax.all_gather(part.astype(dtype), axis_names, axis=dim, tiled=True).astype(part.dtype)


def _gather_fwd(axis_names: tuple[str, ...], dim: int, dtype: jnp.dtype, part: Array) -> tuple[Array, None]:
    return gather_parameter(axis_names, dim, dtype, part), None


def _gather_bwd(axis_names: tuple[str, ...], dim: int, dtype: jnp.dtype, _: None, gradient: Array) -> tuple[Array]:
    return (lax.psum_scatter(gradient, axis_names, scatter_dimension=dim, tiled=True),)


gather_parameter.defvjp(_gather_fwd, _gather_bwd)


def axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of a PartitionSpec names."""
    return entry if isinstance(entry, tuple) else (entry,) if entry else ()
