"""What the ops' `api.py` files share: the error for a call that cannot be served, and the note on what was chosen."""

import functools
import logging

logger = logging.getLogger("kernels_pallas")


class UnsupportedError(ValueError):
    """An implementation was named that does not exist or cannot serve these arguments.

    The message names the argument, its value and what is accepted.
    """


@functools.cache
def log_choice(op: str, implementation: str, reason: str) -> None:
    """Logs, once per process for each combination, which implementation an op chose by itself and why."""
    logger.info("%s: using implementation=%r (%s)", op, implementation, reason)
