"""Causal self-attention with grouped heads, sliding windows and packed documents: one function, several programs."""

import math
from typing import Literal, get_args

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.attention import reference, xla
from kernels_pallas.dispatch import UnsupportedError, log_choice

Implementation = Literal["reference", "xla"]


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    scale: float | None = None,
    window: int | None = None,
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
        implementation: None chooses; "xla" works in blocks on any device; "reference" materialises all scores.

    Returns:
        The attended values, in the type of `q`.

    Raises:
        UnsupportedError: for shapes that do not fit together, and when a named `implementation` does not exist or
            cannot serve these arguments.
    """
    _check_arguments(q, k, v, segment_ids, window)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if implementation is None:
        implementation = "xla"
        log_choice("attention", implementation, f"backend {jax.default_backend()}")
    if implementation == "xla":
        return xla.dot_product_attention(q, k, v, segment_ids, scale, window)
    if implementation == "reference":
        return reference.dot_product_attention(q, k, v, segment_ids, scale, window)
    accepted = ", ".join(map(repr, get_args(Implementation)))
    raise UnsupportedError(f"attention: implementation = {implementation!r}: must be None or one of {accepted}")


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
