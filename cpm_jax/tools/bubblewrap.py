"""The walls of the sandbox: the bubblewrap command that builds them, and what this host can offer of them."""

import contextlib
import fcntl
import functools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from cpm_jax.tools import limits as kernel_limits
from cpm_jax.tools.limits import Limits, SandboxError
from cpm_jax.tools.seccomp import syscall_filter
from cpm_jax.tools.supervise import NamespaceWatcher, Outcome, follow

WORKING_DIRECTORY = PurePosixPath("/tmp/work")
_FILE_SYSTEMS = ("/dev/shm", "/tmp")
_MAX_FILES = 200  # each is a descriptor until the sandbox has read it
# User ids that no account has, one for each sandbox of a privileged caller.
_FREE_UIDS = range(0x60000000, 0x70000000)
_NOBODY = 65534
_READ_ONLY = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

# Run with a limit of two processes: the kernel holds this sandbox alone to it where only the second fork fails.
_PROBE = """
import os, sys, time
def fork():
    try:
        if os.fork() == 0:
            time.sleep(60)
        return True
    except BlockingIOError:
        return False
print([sys.version, sys.prefix, [fork(), fork()] == [True, False]], end="")
"""


@dataclass(frozen=True)
class Walls:
    """How a sandbox gets a user of its own.

    Attributes:
        kind: root gives it a uid that owns nothing; anybody else a user namespace.
        count_processes: whether the kernel can hold this sandbox alone to a number of processes.
    """

    kind: Literal["own uid", "user namespace"]
    count_processes: bool = True


def environment(python: str) -> dict[str, str]:
    """The whole environment of a program: nothing of the caller's comes through."""
    return {
        "PATH": f"{os.path.dirname(python)}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(WORKING_DIRECTORY),
        "TMPDIR": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        # Numeric libraries start a thread for each core otherwise, and threads are processes here.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def encode(text: str) -> bytes:
    """A text as UTF-8; what a model wrote may hold halves of surrogate pairs, and they go through as they are."""
    return text.encode("utf-8", "surrogatepass")


def _is_name(name: str) -> bool:
    """Whether the file system can have it."""
    try:
        return "\0" not in name and all(len(os.fsencode(part)) < 256 for part in name.split("/"))
    except UnicodeEncodeError:
        return False


def check_files(files: Mapping[str, bytes | str], limits: Limits) -> dict[PurePosixPath, bytes]:
    """The files to put into the working directory, by path relative to it.

    Raises:
        SandboxError: a name that leaves the directory, is no file name, or clashes; or more than fits.
    """
    found: dict[PurePosixPath, bytes] = {}
    for name, content in files.items():
        if not isinstance(name, str) or not isinstance(content, (str, bytes)):
            raise SandboxError(f"files[{name!r}] = {content!r:.40}: give names as str, contents as str or bytes")
        path = PurePosixPath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or name.endswith("/") or not _is_name(name):
            raise SandboxError(f"files[{name!r}]: give a path inside the working directory, without '..'")
        if path in found:
            raise SandboxError(f"files[{name!r}]: the same path is given twice")
        found[path] = encode(content) if isinstance(content, str) else content
    for path in found:
        for parent in path.parents:
            if parent in found:
                raise SandboxError(f"files[{str(path)!r}]: {str(parent)!r} is a file, and cannot be its directory")
    if len(found) > _MAX_FILES:
        raise SandboxError(f"files: {len(found)} of them, at most {_MAX_FILES} are taken")
    size = sum(map(len, found.values()))
    if size > limits.file_bytes:
        raise SandboxError(f"files: {size} bytes, but Limits.file_bytes allows {limits.file_bytes}")
    return found


def _read_only_paths() -> Iterator[tuple[str, str]]:
    """What a program sees of the host, as (bubblewrap option, path): system libraries, programs, this Python."""
    yield "--ro-bind", "/usr"
    for path in ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"):
        if os.path.islink(path):
            yield "--symlink", path
        elif os.path.isdir(path):
            yield "--ro-bind", path
    for path in ("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives"):
        if os.path.exists(path):
            yield "--ro-bind", path
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    for prefix in sorted(prefixes | {os.path.realpath(prefix) for prefix in prefixes}):
        if not Path(prefix).is_relative_to("/usr"):
            # Not the whole prefix: a virtual environment may lie at the root of somebody's project.
            for part in ("bin", "lib", "lib64", "pyvenv.cfg"):
                if os.path.exists(os.path.join(prefix, part)):
                    yield "--ro-bind", os.path.join(prefix, part)


def _memory_file(content: bytes) -> int:
    """A descriptor from which `content` can be read, and which nobody can write to."""
    descriptor = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _READ_ONLY)
    return descriptor


class _Descriptors:
    """The descriptors that one bubblewrap process is given; they are closed together."""

    def __init__(self, stack: contextlib.ExitStack):
        self._stack = stack
        self.passed: list[int] = []

    def memory(self, content: bytes) -> int:
        """Opens a file in memory."""
        descriptor = _memory_file(content)
        self._stack.callback(os.close, descriptor)
        return descriptor

    def pass_memory(self, content: bytes) -> str:
        """Passes a file in memory, which bubblewrap closes when it has read it."""
        self.passed.append(self.memory(content))
        return str(self.passed[-1])


def _options(
    walls: Walls, uid: int, files: Mapping[PurePosixPath, bytes], limits: Limits, descriptors: _Descriptors
) -> list[str]:
    """The options of bubblewrap, in the order in which it shall carry them out."""
    options = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    options += ["--hostname", "sandbox", "--new-session", "--die-with-parent"]
    if walls.kind == "user namespace":
        options += ["--unshare-user", "--uid", str(uid), "--gid", str(uid)]
    else:  # for setpriv, which gives them up with the uid
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_SETPCAP"]
    program = syscall_filter()
    if program is not None:
        options += ["--seccomp", descriptors.pass_memory(program)]

    def memory_file_system(path: str, size: int) -> list[str]:
        return ["--perms", "1777", "--size", str(size), "--tmpfs", path]

    options += ["--proc", "/proc", "--dev", "/dev", *memory_file_system("/dev/shm", limits.file_bytes)]
    # Gives zeros too, but cannot be mapped: what is shared of /dev/zero stays when its processes let go of it.
    options += ["--dev-bind", "/dev/full", "/dev/zero"]
    # The first process is bubblewrap's: out of reach, and with it the command line that names the host's paths.
    options += [*memory_file_system("/proc/1", 4096), "--remount-ro", "/proc/1", "--remount-ro", "/dev"]
    options += memory_file_system("/tmp", limits.file_bytes)
    seen = list(_read_only_paths())
    # Left to itself, bubblewrap closes the folders on the way to everybody but root.
    for folder in sorted({parent for _, path in seen for parent in PurePosixPath(path).parents[:-1]}):
        if folder not in (PurePosixPath("/usr"), PurePosixPath("/tmp")):
            options += ["--perms", "0755", "--dir", str(folder)]
    for option, path in seen:
        options += [option, os.readlink(path) if option == "--symlink" else path, path]
    account = f"sandbox:x:{uid}:{uid}::{WORKING_DIRECTORY}:/bin/sh\n".encode()
    options += ["--ro-bind-data", descriptors.pass_memory(account), "/etc/passwd"]
    folders = {parent for path in files for parent in path.parents} | {PurePosixPath()}
    for folder in sorted(folders):
        options += ["--perms", "0777", "--dir", str(WORKING_DIRECTORY / folder)]
    for name, content in files.items():
        options += ["--perms", "0666", "--file", descriptors.pass_memory(content), str(WORKING_DIRECTORY / name)]
    return [*options, "--remount-ro", "/", "--chdir", str(WORKING_DIRECTORY)]


def _become(walls: Walls, uid: int) -> list[str]:
    """The command that starts the program as its user, without any privilege and with no way to gain one."""
    if walls.kind == "user namespace":
        return ["setpriv", "--no-new-privs", "--"]
    identity = ["--reuid", str(uid), "--regid", str(uid), "--clear-groups"]
    return ["setpriv", *identity, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"]


def _first_process(status: int) -> int | None:
    """Reads from bubblewrap's status which process is the first of the sandbox; None when it failed before."""
    text = b""
    while not text.endswith(b"}\n"):
        data = os.read(status, 4096)
        if not data:
            return None
        text += data
    return int(json.loads(text)["child-pid"])


def _exit_code(status: int) -> int | None:
    """Reads how the program ended; None when bubblewrap did not come to start it, or was killed with it."""
    text = b""
    while data := os.read(status, 4096):
        text += data
    return int(json.loads(text)["exit-code"]) if b"exit-code" in text else None


def _kill(first: int) -> None:
    """Kills the first process of a PID namespace, and with it all others; returns when they are gone.

    Args:
        first: a pidfd of it.
    """
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(first, signal.SIGKILL)
    gone = select.poll()
    gone.register(first, select.POLLIN)
    gone.poll()
    # It belongs to us only where this process is the init of a container: nobody else would clear it away.
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, first, os.WEXITED)


def run_behind_walls(
    walls: Walls,
    argv: Sequence[str],
    *,
    stdin: bytes,
    files: Mapping[PurePosixPath, bytes],
    limits: Limits,
) -> tuple[Outcome, int | None]:
    """Runs a program in namespaces of its own.

    Args:
        walls: how; `find_walls` says what works here.
        argv: the program and its arguments.
        stdin: what it reads.
        files: what its working directory holds at the start (`check_files`).
        limits: what it may use.

    Returns:
        How it ended, and its exit code (128 + n after signal n); None when it was killed before it had one.

    Raises:
        SandboxError: the sandbox could not be built; says what bubblewrap said.
    """
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError("bubblewrap is not installed (Debian, Ubuntu: apt-get install bubblewrap)")
    uid = random.SystemRandom().choice(_FREE_UIDS) if walls.kind == "own uid" else _NOBODY
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        descriptors = _Descriptors(stack)
        options = _options(walls, uid, files, limits, descriptors)
        status_read, status_write = os.pipe()
        stack.callback(os.close, status_read)
        block_read, block_write = os.pipe()
        release = stack.enter_context(os.fdopen(block_write, "wb", buffering=0))
        theirs = stack.enter_context(contextlib.ExitStack())
        theirs.callback(os.close, status_write)
        theirs.callback(os.close, block_read)
        options += ["--json-status-fd", str(status_write), "--block-fd", str(block_read)]
        arguments = descriptors.pass_memory(os.fsencode("\0".join(options)))
        source = descriptors.memory(stdin)
        try:
            process = subprocess.Popen(
                [bwrap, "--args", arguments, "--", *_become(walls, uid), *argv],
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[*descriptors.passed, status_write, block_read],
                env=environment(sys.executable),
                cwd="/",
            )
        except (OSError, ValueError) as error:  # arguments too long, or with a NUL
            raise SandboxError(f"cannot start {list(argv)!r:.200}: {error}") from error
        stack.enter_context(process)
        stack.callback(process.kill)
        theirs.close()
        first = _first_process(status_read)
        if first is None:
            raise SandboxError(f"bubblewrap failed: {_said(process)}")
        pidfd = os.pidfd_open(first)
        stack.callback(os.close, pidfd)
        stack.callback(_kill, pidfd)
        # In a user namespace bubblewrap's own first process counts as one of the user's.
        most = limits.max_processes + (walls.kind == "user namespace")
        kernel_limits.apply(first, limits, max_processes=most if walls.count_processes else None)
        release.write(b"x")
        outcome = follow(
            process,
            limits,
            started=started,
            kill=lambda: _kill(pidfd),
            measure=NamespaceWatcher(first, _FILE_SYSTEMS, exact_above=limits.memory_bytes),
        )
        code = _exit_code(status_read)
        if code is None and outcome.stopped is None:
            raise SandboxError(f"bubblewrap failed: {outcome.stderr.decode(errors='replace').strip()}")
        return outcome, code


def _said(process: subprocess.Popen[bytes]) -> str:
    """What a bubblewrap that failed has to say."""
    return process.communicate()[1].decode(errors="replace").strip() or f"exit code {process.returncode}"


@functools.cache
def find_walls() -> tuple[Walls | None, str]:
    """Tries which walls this host can build around this Python.

    Returns:
        The stronger of the kinds that work, or None; and why the others do not.
    """
    reasons = []
    limits = Limits(wall_seconds=30.0, max_processes=2)
    kinds = [Walls("own uid")] if os.geteuid() == 0 else []
    if os.stat("/dev/null").st_uid != os.geteuid():  # a namespace of the host's root would own the host's devices
        kinds.append(Walls("user namespace"))
    for walls in kinds:
        try:
            outcome, code = run_behind_walls(walls, [sys.executable, "-c", _PROBE], stdin=b"", files={}, limits=limits)
        except SandboxError as error:
            reasons.append(f"{walls.kind}: {error}")
            continue
        said = outcome.stdout.decode(errors="replace")
        for counted in (True, False):
            if said == repr([sys.version, sys.prefix, counted]):
                return replace(walls, count_processes=counted), "; ".join(reasons)
        said = outcome.stderr.decode(errors="replace").strip() or said or outcome.stopped or f"exit code {code}"
        reasons.append(f"{walls.kind}: {sys.executable} does not run in it: {said}")
    return None, "; ".join(reasons)
