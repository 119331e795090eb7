"""Cross-entropy of a linear language-model head, without ever holding all logits."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatch import UnsupportedError, choose_implementation
from kernels_pallas.linear_cross_entropy import reference, xla
from kernels_pallas.linear_cross_entropy.per_device import loss_per_device

Implementation = Literal["reference", "xla"]
_IMPLEMENTATIONS = {"reference": reference.linear_cross_entropy, "xla": xla.linear_cross_entropy}


def linear_cross_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    hidden_spec: PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
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
        hidden_spec: how [B, T, D] lies on the mesh in scope; D is whole. Each device then works on its own tokens, and
            the head travels once. None leaves the layout to the partitioner.
        kernel_spec: how [D, V] lies on the mesh in scope.
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
    name = choose_implementation("linear_cross_entropy", implementation, get_args(Implementation), {})
    return loss_per_device(_IMPLEMENTATIONS[name], hidden, kernel, targets, weights, hidden_spec, kernel_spec)
