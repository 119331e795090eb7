"""Causal self-attention with grouped heads, sliding windows and packed documents: one function, several programs."""

import math
from typing import Literal, get_args

from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import pallas_tpu, reference, xla
from kernels_pallas.attention.per_device import attend_per_device
from kernels_pallas.dispatch import UnsupportedError, choose_implementation

Implementation = Literal["reference", "xla", "pallas_tpu"]
_IMPLEMENTATIONS = {
    "reference": reference.dot_product_attention,
    "xla": xla.dot_product_attention,
    "pallas_tpu": pallas_tpu.dot_product_attention,
}


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    partition_spec: PartitionSpec | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Computes softmax(scale · q kᵀ + mask) v, where a query sees itself and what came before it.

    Query head n reads key/value head n // (N/K). Softmax and accumulation are in float32 whatever the inputs are.

    Args:
        q: queries.
        k: keys.
        v: values.
        segment_ids: document of each token; a query sees only keys of its own document. Padding is a document like
            any other (0 by convention), so that its rows are finite. None means one document.
        scale: factor on the scores; None takes 1/sqrt(H).
        window: how many keys a query sees at most, itself included; None means all before it.
        partition_spec: how [B, T, N, H] lies on the mesh in scope. Batch and heads may be divided, length and head
            width not: each device then attends with its own part, without communication. None leaves the layout to
            the partitioner, which cannot divide the TPU kernel.
        implementation: "xla" works in blocks on any device; "pallas_tpu" is JAX's splash attention, for TPU;
            "reference" materialises all scores. None takes "pallas_tpu" where the program is for a TPU and the kernel
            supports the arguments, else "xla", and logs its choice once.

    Returns:
        The attended values, in the type of `q`.

    Raises:
        UnsupportedError: for shapes that do not fit together, and when a named `implementation` does not exist or
            cannot serve these arguments.
    """
    _check_arguments(q, k, v, segment_ids, window)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    unsupported = {"pallas_tpu": pallas_tpu.unsupported_reason(q, partition_spec)}
    name = choose_implementation("attention", implementation, get_args(Implementation), unsupported)

    def attend(q: Array, k: Array, v: Array, segment_ids: Array | None) -> Array:
        return _IMPLEMENTATIONS[name](q, k, v, segment_ids, scale, window)

    return attend_per_device(attend, q, k, v, segment_ids, partition_spec)


def _check_arguments(q: Array, k: Array, v: Array, segment_ids: Array | None, window: int | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise UnsupportedError(
            f"attention: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}: must be [B, T, N, H], [B, T, K, H] and "
            "the shape of k"
        )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise UnsupportedError(
            f"attention: q has shape {q.shape} and k has {k.shape}: batch, length and head width must be equal, and "
            "the number of query heads a multiple of the number of key heads"
        )
    if segment_ids is not None and segment_ids.shape != q.shape[:2]:
        raise UnsupportedError(f"attention: segment_ids has shape {segment_ids.shape}: must be [B, T] = {q.shape[:2]}")
    if window is not None and window < 1:
        raise UnsupportedError(f"attention: window = {window}: must be at least 1 (the query itself), or None")
