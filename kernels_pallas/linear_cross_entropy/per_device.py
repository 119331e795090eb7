"""The loss on each device's own tokens, with the head gathered once before and its gradient summed once after."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.collectives import axis_names, gather_parameter

Loss = Callable[[Array, Array, Array, Array], tuple[Array, Array]]


def loss_per_device(
    loss: Loss,
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    hidden_spec: PartitionSpec | None,
    kernel_spec: PartitionSpec | None,
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Calls `loss(hidden, kernel, targets, weights)` on every device of the mesh in scope with its own tokens.

    Left to itself the partitioner gathers the head, and sums its gradient over the devices, anew for every chunk of
    tokens. Here the parts of the head are gathered before the chunks, in the type they are multiplied in, and the
    gradient is summed into those parts after them, in float32. A vocabulary that is divided stays so.

    Args:
        loss: of the tokens of one device.
        hidden: final hidden states.
        kernel: the head.
        targets: target ids.
        weights: factor on each token's loss.
        hidden_spec: how `hidden` lies; D whole. None, or no mesh in scope, calls `loss` as it is.
        kernel_spec: how `kernel` lies.
    """
    row_axes, length_axes = (*(hidden_spec or ()), None, None)[:2]
    width_axes = axis_names((*(kernel_spec or ()), None)[0])
    token_axes = axis_names(row_axes) + axis_names(length_axes)
    if not token_axes:
        return loss(hidden, kernel, targets, weights)

    def on_device(hidden: Array, kernel: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
        if width_axes:
            kernel = gather_parameter(width_axes, 0, jnp.dtype(hidden.dtype), kernel)
        total, nll = loss(hidden, kernel, targets, weights)
        return total[None], nll

    tokens = PartitionSpec(row_axes, length_axes)
    totals, nll = jax.shard_map(
        on_device,
        in_specs=(tokens, PartitionSpec(width_axes or None, None), tokens, tokens),
        out_specs=(PartitionSpec(token_axes), tokens),
        axis_names={*token_axes, *width_axes},
        check_vma=False,
    )(hidden, kernel, targets, weights)
    return jnp.sum(totals), nll
