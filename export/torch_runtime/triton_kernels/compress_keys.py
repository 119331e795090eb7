"""Semantic kernels of new keys: one mean of rows of the cache for each."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def compress_keys_kernel(
    keys_ptr,
    kernels_ptr,
    positions_ptr,
    num_slots,
    places,
    kernel_size,
    kernel_stride,
    SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One kernel of one sequence and key/value head."""
    head = tl.program_id(1).to(tl.int64)
    rows, dims = tl.arange(0, KEYS), tl.arange(0, DIMS)
    # The first kernel whose last key is not before the first new one.
    first = tl.maximum(tl.load(positions_ptr) - kernel_size + kernel_stride, 0) // kernel_stride
    number = first + tl.program_id(0)
    slots = number * kernel_stride + rows
    read = ((rows < kernel_size) & (slots < num_slots))[:, None] & (dims < SIZE)[None, :]
    place = (head * num_slots + slots)[:, None] * SIZE + dims[None, :]
    keys = tl.load(keys_ptr + place, mask=read, other=0.0).to(tl.float32)
    mean = (tl.sum(keys, axis=0) / kernel_size).to(kernels_ptr.dtype.element_ty)
    width = tl.where(number < places, SIZE, 0)  # what follows the last kernel is not written
    tl.store(kernels_ptr + (head * places + number) * SIZE + dims, mean, mask=dims < width)


def write_kernels(kernels: Tensor, keys: Tensor, positions: Tensor, size: int, stride: int) -> None:
    """As `infllm.write_kernels`; both are contiguous."""
    (batch, heads, places, width), number = kernels.shape, -(-positions.shape[0] // stride)
    compress_keys_kernel[(number, batch * heads)](
        keys,
        kernels,
        positions,
        keys.shape[2],
        places,
        size,
        stride,
        SIZE=width,
        DIMS=triton.next_power_of_2(width),
        KEYS=triton.next_power_of_2(size),
    )
