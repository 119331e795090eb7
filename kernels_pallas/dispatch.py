"""What the ops' `api.py` files share: the error for a call that cannot be served, and the note on what was chosen."""

import functools
import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp

logger = logging.getLogger("kernels_pallas")


class UnsupportedError(ValueError):
    """An implementation was named that does not exist or cannot serve these arguments.

    The message names the argument, its value and what is accepted.
    """


def target_platform() -> str:
    """Returns the platform that a function being traced will run on: "cpu", "tpu" or that of a GPU.

    That of the mesh in scope, so that a program compiled here for a TPU that is elsewhere is the one that the TPU
    would run; without a mesh the default backend's.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


@functools.cache
def log_choice(op: str, implementation: str, platform: str, unsupported: str | None) -> None:
    """Logs, once per process for each combination, which implementation an op chose by itself and why.

    Args:
        op: name of the op.
        implementation: what it chose.
        platform: that it runs on.
        unsupported: why the platform's own kernel cannot serve, which is a warning; None if it can, or there is none.
    """
    level = logging.INFO if unsupported is None else logging.WARNING
    logger.log(level, "%s: using implementation=%r (%s)", op, implementation, unsupported or f"on {platform}")


def check_sizes(op: str, **shapes: tuple[int, ...]) -> None:
    """Refuses shapes without an element.

    Raises:
        UnsupportedError: naming the array and its shape.
    """
    for name, shape in shapes.items():
        if 0 in shape:
            raise UnsupportedError(f"{op}: {name} has shape {shape}: every size must be at least 1")


def check_types(op: str, floating: Mapping[str, jax.Array], integer: Mapping[str, jax.Array | None]) -> None:
    """Refuses arrays of another kind than they must have; None passes.

    Raises:
        UnsupportedError: naming the array, its type and what is accepted.
    """
    for arrays, kind, accepted in ((floating, jnp.floating, "floats"), (integer, jnp.integer, "integers")):
        for name, array in arrays.items():
            if array is not None and not jnp.issubdtype(array.dtype, kind):
                raise UnsupportedError(f"{op}: {name} is of {array.dtype}: must be {accepted}")


# The kernel that is written for a platform, as `target_platform` calls it.
_KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu", "cuda": "pallas_gpu", "rocm": "pallas_gpu"}


def choose_implementation(
    op: str, implementation: str | None, accepted: tuple[str, ...], unsupported: Mapping[str, str | None]
) -> str:
    """Returns the implementation that runs: the named one, or the platform's kernel where it can serve, else "xla".

    Args:
        op: name of the op, for messages.
        implementation: what the caller asked for; None leaves the choice, which is logged once.
        accepted: names of all implementations.
        unsupported: of each kernel, why it cannot serve the arguments, or None if it can.

    Raises:
        UnsupportedError: the name does not exist, or cannot serve the arguments.
    """
    if implementation is None:
        platform = target_platform()
        kernel = _KERNELS.get(platform, "")
        reason = unsupported.get(kernel)
        chosen = kernel if kernel in unsupported and reason is None else "xla"
        log_choice(op, chosen, platform, reason)
        return chosen
    if implementation not in accepted:
        raise UnsupportedError(
            f"{op}: implementation = {implementation!r}: must be None or one of {', '.join(map(repr, accepted))}"
        )
    if (reason := unsupported.get(implementation)) is not None:
        raise UnsupportedError(f"{op}: implementation = {implementation!r}: {reason}")
    return implementation
