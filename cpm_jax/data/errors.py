"""The one error by which this room refuses an input."""

from cpm_jax.common.config import InputError


class DataError(InputError):
    """Data that cannot be used: a missing folder, an empty corpus, a damaged shard, a full disk.

    The message names the path and says what is accepted or what to do, so that it can be shown to a user as it is.
    """
