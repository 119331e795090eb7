"""What the ops' `api.py` files share: the error for a call that cannot be served, and the note on what was chosen."""

import functools
import logging

import jax

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
def log_choice(op: str, implementation: str, reason: str) -> None:
    """Logs, once per process for each combination, which implementation an op chose by itself and why."""
    logger.info("%s: using implementation=%r (%s)", op, implementation, reason)
