"""Semantic kernels of InfLLM v2: means of overlapping windows of keys, which stand for the keys in the selection."""

from typing import Literal, get_args

from jaxtyping import Array, Float

from kernels_pallas.compress_keys import reference, xla
from kernels_pallas.dispatch import UnsupportedError, check_types

Implementation = Literal["reference", "xla"]
_IMPLEMENTATIONS = {"reference": reference.compress_keys, "xla": xla.compress_keys}


def compress_keys(
    k: Float[Array, "B S K H"],
    *,
    kernel_size: int,
    kernel_stride: int,
    implementation: Implementation | None = None,
) -> Float[Array, "B J K H"]:
    """Computes the mean of keys [stride·j, stride·j + size) for each kernel j that lies wholly within the S keys.

    J = max(0, (S - size) // stride + 1). The kernels of keys [stride·j, …) alone are kernels j, j + 1, …: a cache
    that grows compresses only its new end.

    Args:
        k: keys, as the selection shall see them (with or without rotary embedding).
        kernel_size: keys in a kernel.
        kernel_stride: keys from one kernel's start to the next one's.
        implementation: "xla" reads every key once; "reference" takes one mean after another. None takes "xla".

    Returns:
        The means, summed in float32, in the type of `k`.

    Raises:
        ValueError: for a size or stride below 1, a `k` that is not [B, S, K, H], or an unknown `implementation`.
    """
    if k.ndim != 4:
        raise UnsupportedError(f"compress_keys: k has shape {k.shape}: must be [B, S, K, H]")
    for name, value in (("kernel_size", kernel_size), ("kernel_stride", kernel_stride)):
        if not isinstance(value, int) or value < 1:
            raise UnsupportedError(f"compress_keys: {name} = {value}: must be an int of at least 1")
    check_types("compress_keys", {"k": k}, {})
    implementation = "xla" if implementation is None else implementation
    if implementation not in _IMPLEMENTATIONS:
        accepted = ", ".join(map(repr, get_args(Implementation)))
        raise UnsupportedError(f"compress_keys: implementation = {implementation!r}: must be None or one of {accepted}")
    return _IMPLEMENTATIONS[implementation](k, kernel_size, kernel_stride)
