"""Semantic kernels in plain JAX: every key is read once."""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels_pallas.block_selection.selection import num_kernels


def compress_keys(k: Float[Array, "B S K H"], kernel_size: int, kernel_stride: int) -> Float[Array, "B J K H"]:
    """See `kernels_pallas.compress_keys.api.compress_keys`.

    Overlapping kernels share the sums of pieces of gcd(size, stride) keys (16 keys, two to a kernel, at the defaults).
    """
    number = num_kernels(k.shape[1], kernel_size, kernel_stride)
    if number == 0:
        return k[:, :0]
    piece = math.gcd(kernel_size, kernel_stride)
    step, pieces_per_kernel = kernel_stride // piece, kernel_size // piece
    pieces = (number - 1) * step + pieces_per_kernel
    sums = k[:, : pieces * piece].reshape(k.shape[0], pieces, piece, *k.shape[2:]).sum(axis=2, dtype=jnp.float32)
    last = (number - 1) * step + 1
    parts = [lax.slice_in_dim(sums, i, i + last, step, axis=1) for i in range(pieces_per_kernel)]
    total = functools.reduce(jnp.add, parts)
    return (total / kernel_size).astype(k.dtype)
