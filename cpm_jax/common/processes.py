"""Joining the processes of a run on many hosts, and ending them: one that is lost must end the others, and clearly."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import jax

from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError

JOIN_SECONDS = 300
LEAVE_SECONDS = 10

# How jaxlib begins the message of an error that the failure of another process may be behind.
_STATUSES_OF_LOSS = ("UNAVAILABLE", "UNKNOWN", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED")


@contextlib.contextmanager
def joined(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    seconds: float = JOIN_SECONDS,
) -> Iterator[int]:
    """Joins the other processes of a run, before anything asks for a device; gives the number of this one.

    What is None is found by JAX on Cloud TPU, SLURM, Open MPI and Kubernetes (docs/many_devices.md). When the block
    ends with an error, the others get LEAVE_SECONDS to end by themselves before the process exits: JAX would wait for
    minutes for processes that wait for this one.

    Args:
        coordinator_address: HOST:PORT on which process 0 listens.
        num_processes: how many processes there are.
        process_id: which of them this is, from 0.
        seconds: how long to wait for all of them; without them the process then exits with PROCESS_LOST.

    Raises:
        ConfigError: if what is None cannot be found, or the numbers do not fit each other.
        exit_codes.Stop: PROCESS_LOST, in place of an error that the death of another process explains.
    """
    process = _join(coordinator_address, num_processes, process_id, seconds)
    try:
        try:
            yield process
        except Exception as error:
            cause = _loss_behind(error)
            if cause is None:
                raise
            raise exit_codes.Stop(
                exit_codes.PROCESS_LOST,
                f"process {process} of {jax.process_count()} lost another process: {cause}\n"
                "This one ends too. The output of the lost process says why it died; run the same command again on "
                "every host, and the run goes on from its newest checkpoint.",
            ) from error
    except BaseException as error:
        if isinstance(error, ConfigError | InputError | exit_codes.Stop):
            _exit_after(LEAVE_SECONDS, error.code)
        else:
            _exit_after(LEAVE_SECONDS, exit_codes.FAILED)
        raise


def _join(coordinator_address: str | None, num_processes: int | None, process_id: int | None, seconds: float) -> int:
    if coordinator_address and not coordinator_address.rpartition(":")[2].isdecimal():
        raise ConfigError(f"--coordinator_address={coordinator_address}: must be HOST:PORT, as in node0:12345")
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ConfigError(f"--process_id={process_id}: must be from 0 to below --num_processes={num_processes}")
    place = f" at {coordinator_address}" if coordinator_address else ""
    print(f"waiting for the other processes{place}, at most {seconds:g} s", file=sys.stderr, flush=True)
    # jaxlib aborts the process when it has waited for too long, in words that say little: speak before it does.
    timer = _exit_after(
        seconds,
        exit_codes.PROCESS_LOST,
        f"the processes of this run have not all met{place} within {seconds:g} s. Start the same command on every "
        "host, each with its own number, and see that process 0 can be reached at the coordinator's address.",
    )
    try:
        jax.distributed.initialize(
            coordinator_address, num_processes, process_id, initialization_timeout=int(seconds) + 60
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot join the other processes: {error}\n  outside of Cloud TPU, SLURM, Open MPI and Kubernetes give "
            "--coordinator_address, --num_processes and --process_id; the port must be free on the host of process 0"
        ) from error
    finally:
        timer.cancel()
    print(f"process {jax.process_index()} of {jax.process_count()}", file=sys.stderr, flush=True)
    return jax.process_index()


def _loss_behind(error: BaseException | None) -> str | None:
    """The first line of the error, among an error and its causes, that a lost process explains.

    A status says so in jaxlib's own errors only; a failed exchange whatever type its error has by then.
    """
    while error is not None:
        line = str(error).partition("\n")[0]
        status = isinstance(error, jax.errors.JaxRuntimeError) and line.startswith(_STATUSES_OF_LOSS)
        if status or "Gloo" in line or "NCCL" in line:
            return line
        error = error.__cause__ or error.__context__
    return None


def _exit_after(seconds: float, code: int, message: str = "") -> threading.Timer:
    """Starts a timer that ends the process from outside of whatever it then waits in."""

    def end() -> None:
        if message:
            print(message, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer
