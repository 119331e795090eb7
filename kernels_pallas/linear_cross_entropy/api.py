"""Cross-entropy of a linear language-model head, without ever holding all logits."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import UnsupportedError, log_choice, target_platform
from kernels_pallas.linear_cross_entropy import reference, xla

Implementation = Literal["reference", "xla"]


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Computes sum(weights · nll) with nll = logsumexp(hidden @ kernel) - (hidden @ kernel)[target].

    The product is taken in the type of `hidden` (a float32 kernel is cast) and accumulated in float32, as is
    everything after it. Gradients flow to `hidden` and `kernel`, each in its own type; `weights` are constants.

    Args:
        hidden: final hidden states, after the norm and any output multiplier.
        kernel: the head.
        targets: target ids, in [0, V).
        weights: factor on each token's loss; a token of weight 0 contributes exactly nothing.
        implementation: None takes "xla", which holds the logits of one chunk of tokens; "reference" holds all.

    Returns:
        The weighted sum of losses (divide by sum(weights) for the mean), and the loss of each token without gradient
        and without weight, for metrics. Both float32.

    Raises:
        UnsupportedError: for shapes that do not fit together or an `implementation` that does not exist.
    """
    if hidden.ndim != 3 or kernel.ndim != 2 or hidden.shape[-1] != kernel.shape[0]:
        raise UnsupportedError(
            f"linear_cross_entropy: hidden and kernel have shapes {hidden.shape} and {kernel.shape}: must be "
            "[B, T, D] and [D, V]"
        )
    if targets.shape != hidden.shape[:2] or weights.shape != hidden.shape[:2]:
        raise UnsupportedError(
            f"linear_cross_entropy: targets and weights have shapes {targets.shape} and {weights.shape}: must be "
            f"[B, T] = {hidden.shape[:2]}"
        )
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    if implementation is None:
        implementation = "xla"
        log_choice("linear_cross_entropy", implementation, f"on {target_platform()}")
    if implementation == "xla":
        return xla.linear_cross_entropy(hidden, kernel, targets, weights)
    if implementation == "reference":
        return reference.linear_cross_entropy(hidden, kernel, targets, weights)
    accepted = ", ".join(map(repr, get_args(Implementation)))
    raise UnsupportedError(
        f"linear_cross_entropy: implementation = {implementation!r}: must be None or one of {accepted}"
    )
