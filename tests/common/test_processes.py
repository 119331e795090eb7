"""What is taken for the loss of another process; real processes are in tests/training/test_multiprocess.py."""

import jax
import pytest

from cpm_jax.checkpoints.manager import CheckpointError
from cpm_jax.common.processes import _loss_behind


def wrapped(error):
    """As the checkpoint manager wraps what went wrong in a save."""
    try:
        try:
            raise error
        except Exception as cause:
            raise CheckpointError("saving the checkpoint of step 20 failed") from cause
    except CheckpointError as outer:
        return outer


@pytest.mark.parametrize(
    "message",
    [
        "UNAVAILABLE: Task 1 heartbeat timeout.\nmore of it",
        "UNKNOWN: Gloo all-reduce failed: Connection reset by peer",
        "INTERNAL: NCCL operation ncclCommInitRank failed: remote process exited",
    ],
)
def test_errors_that_a_lost_process_causes(message):
    error = jax.errors.JaxRuntimeError(message)
    assert _loss_behind(error) == message.partition("\n")[0]
    assert _loss_behind(wrapped(error)) == message.partition("\n")[0]


def test_exchange_that_failed_is_a_loss_whatever_the_type_of_its_error():
    message = "UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:1: Connection reset by peer"
    assert _loss_behind(wrapped(ValueError(message))) == message


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 GiB"),
        jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"),
        ValueError("UNAVAILABLE: not an error of jaxlib's"),
    ],
)
def test_errors_of_our_own(error):
    assert _loss_behind(error) is None
    assert _loss_behind(wrapped(error)) is None
