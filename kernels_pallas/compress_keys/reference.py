"""Semantic kernels written from their definition: one mean after another."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.block_selection.selection import num_kernels


def compress_keys(k: Float[Array, "B S K H"], kernel_size: int, kernel_stride: int) -> Float[Array, "B J K H"]:
    """See `kernels_pallas.compress_keys.api.compress_keys`."""
    starts = [kernel_stride * j for j in range(num_kernels(k.shape[1], kernel_size, kernel_stride))]
    if not starts:
        return k[:, :0]
    means = [k[:, start : start + kernel_size].astype(jnp.float32).mean(axis=1) for start in starts]
    return jnp.stack(means, axis=1).astype(k.dtype)
