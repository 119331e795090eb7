"""What a sandboxed program may use, and the kernel's limits that hold each of its processes to it."""

import math
import resource

from cpm_jax.common.config import ConfigError, InputError, config_dataclass

OPEN_FILES = 256  # per process
_STACK_BYTES = 8 << 20
_LEAST_MEMORY = 32 << 20  # below it not even the sandbox's own first process starts


class SandboxError(InputError):
    """The program could not be started, or not with the guarantees that were asked for."""


@config_dataclass
class Limits:
    """What one program, with everything that it starts, may use.

    Attributes:
        cpu_seconds: processor time of all its processes together.
        wall_seconds: time from start to end.
        memory_bytes: memory of all its processes and of the files they wrote (which live in memory) together; also
            the address space of each process.
        max_processes: processes and threads at one time.
        file_bytes: what all files in the working directory and `/tmp` may hold together, and what those in
            `/dev/shm` may.
        output_bytes: what it may write to stdout and stderr together.
    """

    cpu_seconds: float = 10.0
    wall_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    max_processes: int = 32
    file_bytes: int = 64 << 20
    output_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("cpu_seconds", "wall_seconds"):
            value = getattr(self, name)
            if value <= 0:
                raise ConfigError(f"Limits.{name} = {value}: give a number above 0", field=f"Limits.{name}")
        least = {"memory_bytes": _LEAST_MEMORY, "max_processes": 1, "file_bytes": 4096, "output_bytes": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value < minimum:
                raise ConfigError(f"Limits.{name} = {value}: give at least {minimum}", field=f"Limits.{name}")


def apply(pid: int, limits: Limits, *, max_processes: int | None) -> None:
    """Sets the kernel's limits of a process, which all that it starts will inherit.

    The CPU limit leaves room for the watcher, which adds up all processes, to be the one that acts.

    Args:
        pid: of a process that has not yet started the program.
        limits: what to hold it to.
        max_processes: how many processes its user may have; None leaves that as it is.

    Raises:
        ProcessLookupError: the process is gone.
    """
    wanted = {
        resource.RLIMIT_CPU: math.ceil(limits.cpu_seconds) + 1,
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_STACK: _STACK_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if max_processes is not None:
        wanted[resource.RLIMIT_NPROC] = max_processes
    for kind, value in wanted.items():
        _, hard = resource.prlimit(pid, kind)
        if hard != resource.RLIM_INFINITY:  # an ordinary user may not raise what it was given
            value = min(value, hard)
        resource.prlimit(pid, kind, (value, value))
