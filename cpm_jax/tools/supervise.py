"""Follows a started program to its end: collects its output, watches what it uses, and kills it in time."""

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from cpm_jax.tools.limits import Limits

Stopped = Literal["timeout", "memory", "output", "killed"]

_POLL_SECONDS = 0.02
_CHUNK = 1 << 16
_INODE_BYTES = 1024  # what an empty file costs the kernel
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """What all processes of a sandbox use together at one moment.

    Attributes:
        cpu_seconds: processor time so far, of processes that ended too.
        memory_bytes: memory of the processes, and of what they wrote into the sandbox's file systems.
        processes: how many there are, threads included.
    """

    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    processes: int = 0

    def passes(self, limits: Limits) -> Stopped | None:
        """Which limit this is beyond."""
        if self.memory_bytes > limits.memory_bytes:
            return "memory"
        if self.cpu_seconds > limits.cpu_seconds:
            return "timeout"
        # The kernel refuses to start more wherever it counts them; this is for where it does not.
        return "killed" if self.processes > limits.max_processes else None


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        stopped: which limit it was killed for; None when it ended by itself.
        stdout: its output, up to the limit.
        stderr: its error output, up to the limit.
        usage: what was last seen of its usage.
    """

    stopped: Stopped | None
    stdout: bytes
    stderr: bytes
    usage: Usage


def _kilobytes(path: str, *names: bytes) -> int:
    """The sum of some lines of a file in `/proc`, in bytes."""
    with open(path, "rb") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith(names))


def _read_process(folder: str) -> Usage:
    """What one process uses, from its folder in `/proc`; OSError when it is gone.

    Memory that processes share counts for each of them.
    """
    with open(f"{folder}/stat", "rb") as stat:
        # The name in parentheses may hold anything; what follows it is field 3 of proc(5).
        fields = stat.read().rpartition(b")")[2].split()
    cpu = sum(map(int, fields[11:15])) / _TICKS  # utime, stime, and those of children that were waited for
    memory = _kilobytes(f"{folder}/status", b"RssAnon:", b"RssShmem:", b"VmSwap:")
    return Usage(cpu, memory, processes=int(fields[17]))


class NamespaceWatcher:
    """Measures everything in a PID namespace from outside, through the `/proc` and the files that it sees itself."""

    def __init__(self, first_pid: int, file_systems: tuple[str, ...], exact_above: int):
        """Prepares to watch.

        Args:
            first_pid: the namespace's first process, as the host numbers it.
            file_systems: paths inside the sandbox of the memory file systems it can write to.
            exact_above: bytes up to which it does not matter when shared memory is counted more than once.
        """
        self._first_pid = first_pid
        self._root = f"/proc/{first_pid}/root"
        self._file_systems = file_systems
        self._host_devices = {os.stat(path).st_dev for path in ("/", *filter(os.path.exists, file_systems))}
        self._exact_above = exact_above
        self._ready = False
        self._cpu_seconds = 0.0

    def __call__(self) -> Usage:
        """Adds up what the sandbox uses now; zero before it has its own root."""
        try:
            if not self._ready:
                self._ready = not any(
                    os.stat(self._root + path).st_dev in self._host_devices for path in self._file_systems
                )
            if not self._ready:
                return Usage()
            # The first process hides from the sandbox, and has waited for every orphan.
            cpu = _read_process(f"/proc/{self._first_pid}").cpu_seconds
            held = sum(map(self._held, self._file_systems))
            processes = [name for name in os.listdir(f"{self._root}/proc") if name.isdecimal() and name != "1"]
        except OSError:  # not set up yet, or over
            return Usage(self._cpu_seconds)
        found: dict[str, Usage] = {}
        for name in processes:
            with contextlib.suppress(OSError):  # it ended meanwhile
                found[name] = _read_process(f"{self._root}/proc/{name}")
        memory = held + sum(usage.memory_bytes for usage in found.values())
        for _ in range(2):  # one that ends while this adds up leaves its share to others, who then have too much
            if memory > self._exact_above:
                memory = held + sum(self._share_of_memory(name, usage) for name, usage in found.items())
        # A process that nobody waited for takes its time with it: what was seen stays counted.
        self._cpu_seconds = max(self._cpu_seconds, cpu + sum(usage.cpu_seconds for usage in found.values()))
        count = sum(usage.processes for usage in found.values())
        return Usage(self._cpu_seconds, memory, count)

    def _share_of_memory(self, name: str, usage: Usage) -> int:
        """The memory of a process in bytes, where what n processes share counts 1/n; walks its page tables."""
        try:
            return _kilobytes(f"{self._root}/proc/{name}/smaps_rollup", b"Pss_Anon:", b"Pss_Shmem:", b"SwapPss:")
        except (ProcessLookupError, FileNotFoundError):
            return 0
        except OSError:  # it hides, and its memory counts whole
            return usage.memory_bytes

    def _held(self, path: str) -> int:
        """What a memory file system holds, in bytes."""
        status = os.statvfs(self._root + path)
        files = status.f_files - status.f_ffree
        return (status.f_blocks - status.f_bfree) * status.f_frsize + files * _INODE_BYTES


class _Output:
    """What a program wrote, up to a limit over both streams."""

    def __init__(self, process: subprocess.Popen[bytes], limit: int):
        assert process.stdout is not None
        assert process.stderr is not None
        self.streams = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
        self._left = limit

    def read(self, descriptor: int) -> Literal["more", "end", "full"]:
        """Takes what is there; "full" when there was more than the limit allows."""
        data = os.read(descriptor, _CHUNK)
        if not data:
            return "end"
        self.streams[descriptor] += data[: self._left]
        self._left -= len(data)
        if self._left >= 0:
            return "more"
        self._left = 0
        return "full"


def follow(
    process: subprocess.Popen[bytes],
    limits: Limits,
    *,
    started: float,
    kill: Callable[[], None],
    measure: Callable[[], Usage],
) -> Outcome:
    """Waits for a program's end, or brings it about when it passes a limit.

    Args:
        process: with pipes for stdout and stderr; reaped on return.
        limits: what it may use.
        started: `time.monotonic()` at its start.
        kill: kills it with everything that it started, and returns when that is gone.
        measure: says what it uses now.
    """
    deadline = started + limits.wall_seconds
    stopped: Stopped | None = None
    usage = Usage()
    output = _Output(process, limits.output_bytes)
    with contextlib.ExitStack() as stack:
        stack.callback(process.wait)
        stack.callback(kill)
        ended = os.pidfd_open(process.pid)
        stack.callback(os.close, ended)
        selector = stack.enter_context(selectors.DefaultSelector())
        for descriptor in (*output.streams, ended):
            selector.register(descriptor, selectors.EVENT_READ)
        next_look = time.monotonic() + _POLL_SECONDS
        over = False
        while not over and stopped is None:
            now = time.monotonic()
            if now >= next_look:
                usage = measure()
                nearly_full = 2 * usage.memory_bytes > limits.memory_bytes
                next_look = now + (_POLL_SECONDS / 4 if nearly_full else _POLL_SECONDS)
                stopped = usage.passes(limits)
            if stopped is None and now >= deadline:
                stopped = "timeout"
            if stopped is not None:
                break
            for key, _ in selector.select(max(0.0, min(next_look, deadline) - now)):
                if key.fd == ended:
                    over = True
                    continue
                said = output.read(key.fd)
                if said == "end":
                    selector.unregister(key.fd)
                elif said == "full":
                    stopped = "output"
    for descriptor in output.streams:
        if _drain(output, descriptor) and stopped is None:
            stopped = "output"
    stdout, stderr = output.streams.values()
    return Outcome(stopped, bytes(stdout), bytes(stderr), usage)


def _drain(output: _Output, descriptor: int) -> bool:
    """Reads what a pipe still holds without waiting for more; True when it passes the limit."""
    os.set_blocking(descriptor, False)
    try:
        while (said := output.read(descriptor)) == "more":
            pass
    except BlockingIOError:  # something outside a sandbox still holds the pipe
        return False
    return said == "full"
