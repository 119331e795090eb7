"""Runs programs that nobody trusts: without network, without the host's files and processes, and within limits.

`python -m cpm_jax.tools.sandbox` says what this host guarantees; docs/sandbox.md says how.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from cpm_jax.tools import limits as kernel_limits
from cpm_jax.tools.bubblewrap import check_files, encode, environment, find_walls, run_behind_walls
from cpm_jax.tools.limits import Limits, SandboxError
from cpm_jax.tools.seccomp import syscall_filter
from cpm_jax.tools.supervise import Outcome, Usage, follow

__all__ = ["Guarantee", "Limits", "SandboxError", "SandboxResult", "guarantees", "run_python", "run_sandboxed"]

_PROGRAM = "program.py"
_DEFAULT_LIMITS = Limits()
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SandboxResult:
    """How a sandboxed program ended.

    Attributes:
        status: "ok", exit code 0; "error", another exit code; "timeout", too much time by the clock or of the
            processor; "memory" or "output", too much of those; "killed", by a signal that was none of ours.
        returncode: its exit code, 128 + n after signal n as in a shell; 127 when there is no such program.
        stdout: what it wrote; bytes that are no UTF-8 are shown as U+FFFD.
        stderr: the same of stderr.
        wall_seconds: from start to end, the sandbox's own time included.
    """

    status: Literal["ok", "error", "timeout", "memory", "output", "killed"]
    returncode: int
    stdout: str
    stderr: str
    wall_seconds: float


@dataclass(frozen=True)
class Guarantee:
    """One thing that a sandbox promises.

    Attributes:
        name: what is promised.
        held: whether it holds on this host.
        how: the mechanism, or the reason why it is lost.
    """

    name: str
    held: bool
    how: str


def guarantees() -> tuple[Guarantee, ...]:
    """What `run_sandboxed` promises on this host, found out by trying."""
    walls, reason = find_walls()
    built = walls is not None
    user = "" if walls is None else {"own uid": "a uid that owns nothing"}.get(walls.kind, "a user namespace")
    filtered = syscall_filter() is not None
    counted = walls is not None and walls.count_processes

    def by_walls(name: str, how: str) -> Guarantee:
        return Guarantee(name, built, how if built else reason)

    return (
        by_walls("no network", "network namespace with nothing but its own loopback"),
        by_walls("no files of the host but system libraries and this Python", "mount namespace, read-only root"),
        by_walls("no sight of the host's processes, no signals to them", "PID namespace with its own /proc"),
        by_walls("no privileges", f"{user}, no capabilities, no new ones by exec"),
        by_walls("nothing survives the program", "the kernel kills the PID namespace with its first process"),
        by_walls("total memory", "watched every 20 ms, and killed"),
        by_walls("total CPU time", "watched every 20 ms, and killed"),
        by_walls("disk space", "files live in memory file systems of limited size"),
        Guarantee(
            "number of processes",
            counted,
            f"RLIMIT_NPROC of {user}"
            if counted
            else reason or "watched every 20 ms, and killed: the kernel counts none",
        ),
        Guarantee(
            "no dangerous system calls",
            built and filtered,
            "seccomp filter" if built and filtered else reason or f"no filter for {os.uname().machine}",
        ),
        Guarantee("memory of each process", True, "RLIMIT_AS"),
        Guarantee("CPU time of each process", True, "RLIMIT_CPU"),
        Guarantee("size of each file", True, "RLIMIT_FSIZE"),
        Guarantee("time by the clock", True, "killed"),
        Guarantee("output", True, "killed"),
    )


def _run_unsafe(
    argv: Sequence[str], stdin: bytes, files: Mapping[PurePosixPath, bytes], limits: Limits
) -> tuple[Outcome, int]:
    """Runs a program with the kernel's limits for each process and a time limit, and nothing else."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        source = stack.enter_context(tempfile.TemporaryFile())
        source.write(stdin)
        source.seek(0)
        block, release = os.pipe()
        stack.callback(os.close, block)
        started = time.monotonic()
        # The shell waits until its limits are set, and then becomes the program.
        wait = f'read -r go </dev/fd/{block} && exec "$@"'
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", wait, "sh", *argv],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[block],
                env={**environment(sys.executable), "HOME": str(folder), "TMPDIR": str(folder)},
                cwd=folder,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            os.close(release)
            raise SandboxError(f"cannot start {list(argv)!r:.200}: {error}") from error
        stack.enter_context(process)

        def kill() -> None:
            if process.returncode is None:  # else its number may be somebody else's by now
                os.killpg(process.pid, signal.SIGKILL)

        stack.callback(kill)
        with os.fdopen(release, "wb", buffering=0) as go:
            kernel_limits.apply(process.pid, limits, max_processes=None)
            go.write(b"go\n")
        outcome = follow(process, limits, started=started, kill=kill, measure=Usage)
    code = process.returncode
    return outcome, code if code >= 0 else 128 - code


def run_sandboxed(
    argv: Sequence[str],
    *,
    stdin: str = "",
    files: Mapping[str, bytes | str] = {},
    limits: Limits = _DEFAULT_LIMITS,
    allow_unsafe: bool = False,
) -> SandboxResult:
    """Runs a program that nobody trusts, and waits for its end.

    It sees system libraries and this Python read-only, and may write to its working directory, `/tmp` and
    `/dev/shm`, all of which live in memory and vanish with it. Nothing of the caller's environment reaches it. Safe
    to call from many threads at once.

    Args:
        argv: the program and its arguments; looked up in the sandbox, where this Python comes first in `PATH`.
        stdin: what it reads.
        files: what its working directory holds at the start, by relative path.
        limits: what it may use.
        allow_unsafe: where this host cannot build a sandbox, run the program with time limits and the kernel's
            limits of each process alone, as the caller's user, with network and files. A warning names what is lost.

    Returns:
        How it ended, whatever it did.

    Raises:
        SandboxError: this host cannot build a sandbox, or the arguments cannot be used.
    """
    if isinstance(argv, str) or not argv or not all(isinstance(part, str) and "\0" not in part for part in argv):
        raise SandboxError(f"argv = {argv!r:.200}: give a program and its arguments, strings without NUL")
    placed, started = check_files(files, limits), time.monotonic()
    walls, reason = find_walls()
    if walls is not None:
        outcome, code = run_behind_walls(walls, argv, stdin=encode(stdin), files=placed, limits=limits)
    elif allow_unsafe:
        lost = ", ".join(guarantee.name for guarantee in guarantees() if not guarantee.held)
        _log.warning("running %s WITHOUT a sandbox (%s); lost: %s", argv[0], reason, lost)
        outcome, code = _run_unsafe(argv, encode(stdin), placed, limits)
    else:
        raise SandboxError(f"this host cannot build a sandbox: {reason}. See docs/sandbox.md.")
    code = 128 + signal.SIGKILL if code is None else code
    return SandboxResult(
        status=_status(outcome, code, limits),
        returncode=code,
        stdout=outcome.stdout.decode(errors="replace"),
        stderr=outcome.stderr.decode(errors="replace"),
        wall_seconds=time.monotonic() - started,
    )


def _status(
    outcome: Outcome, code: int, limits: Limits
) -> Literal["ok", "error", "timeout", "memory", "output", "killed"]:
    """The word for an end."""
    if outcome.stopped is not None:
        return outcome.stopped
    if code == 0:
        return "ok"
    return "killed" if code > 128 else "error"


def run_python(
    code: str,
    *,
    stdin: str = "",
    files: Mapping[str, bytes | str] = {},
    limits: Limits = _DEFAULT_LIMITS,
    allow_unsafe: bool = False,
) -> SandboxResult:
    """Runs a Python program with this interpreter and its packages; otherwise as `run_sandboxed`.

    The program is the file `program.py`, so that it can import modules among `files`. When it ends with a
    `MemoryError` that it did not catch, the status is "memory".
    """
    if _PROGRAM in files:
        raise SandboxError(f"files[{_PROGRAM!r}]: this name is the program's own")
    result = run_sandboxed(
        [sys.executable, _PROGRAM],
        stdin=stdin,
        files={**files, _PROGRAM: code},
        limits=limits,
        allow_unsafe=allow_unsafe,
    )
    last_line = result.stderr.rstrip().rpartition("\n")[2]
    if result.status == "error" and last_line.startswith("MemoryError"):
        return replace(result, status="memory")
    return result


def main() -> int:
    """Prints what this host guarantees; returns 1 when something is lost."""
    found = guarantees()
    width = max(len(guarantee.name) for guarantee in found)
    for guarantee in found:
        print(f"{'held' if guarantee.held else 'LOST'}  {guarantee.name:<{width}}  {guarantee.how}")
    return 0 if all(guarantee.held for guarantee in found) else 1


if __name__ == "__main__":
    sys.exit(main())
