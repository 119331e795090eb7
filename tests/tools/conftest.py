"""A host for hostile programs to attack, which then says whether it is unharmed."""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path

import pytest

from cpm_jax.tools.sandbox import Limits, SandboxResult, run_sandboxed

SECRET = "the-secret-of-the-host"

# What the programs below may use. `HOST` is filled in by the test.
PRELUDE = """
import ctypes, errno, fcntl, mmap, os, platform, resource, signal, socket, stat, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def syscall(x86, arm, *arguments):
    call(libc.syscall(x86 if platform.machine() == "x86_64" else arm, *arguments))
def say(*words):
    print(*words, flush=True)
def until_refused(action, most=100_000):
    done = 0
    try:
        while done < most:
            action(done)
            done += 1
    except (OSError, RuntimeError, MemoryError, ValueError) as error:
        say("refused after", done, type(error).__name__, errno.errorcode.get(getattr(error, "errno", None)))
    else:
        say("NOT REFUSED")
def put(path, content):
    with open(path, "wb", buffering=0) as file:
        return file.write(content)
def attempt(action):
    try:
        result = action()
    except (OSError, ValueError) as error:
        say("refused:", type(error).__name__, error)
    else:
        say("DONE:", result)
"""


class Host:
    """What the programs go for, and whether it is still as it was."""

    def __init__(self, folder: Path):
        self.token = f"hostile-{uuid.uuid4().hex}"
        self.secret_file = folder / "secret.txt"
        self.secret_file.write_text(SECRET)
        self.canary = subprocess.Popen(["sleep", "600"])
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix, self.abstract = (socket.socket(socket.AF_UNIX) for _ in range(2))
        # A path of a socket must be short, and pytest's are not.
        self.unix_path = f"/tmp/{self.token}.socket"
        self.unix.bind(self.unix_path)
        self.abstract.bind(f"\0{self.token}")
        for server in (self.tcp, self.udp, self.unix, self.abstract):
            server.setblocking(False)
        self.unix.listen()
        self.abstract.listen()

    def names(self) -> str:
        """Python lines that tell a program what to go for."""
        values = {
            "TOKEN": self.token,
            "SECRET_FILE": str(self.secret_file),
            "REPOSITORY": str(Path(__file__).resolve().parents[2]),
            "CANARY": self.canary.pid,
            "PARENT": os.getpid(),
            "TCP": self.tcp.getsockname(),
            "UDP": self.udp.getsockname(),
            "UNIX": self.unix_path,
        }
        return "".join(f"{name} = {value!r}\n" for name, value in values.items())

    def attack(self, program: str, limits: Limits) -> SandboxResult:
        """Runs a hostile program, with the token in its command line so that what it leaves can be found."""
        code = PRELUDE + self.names() + textwrap.dedent(program)
        return run_sandboxed([sys.executable, "hostile.py", self.token], files={"hostile.py": code}, limits=limits)

    def processes(self) -> list[str]:
        """The processes that have the token in their command line."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.token.encode() in (folder / "cmdline").read_bytes():
                    found.append(folder.name)
        return found

    def check(self) -> None:
        """Asserts that nothing reached it and that nothing of the program is left."""
        assert self.canary.poll() is None, "a process of the host was killed"
        assert self.secret_file.read_text() == SECRET
        for server in (self.tcp, self.unix, self.abstract):
            with pytest.raises(BlockingIOError):
                server.accept()
        with pytest.raises(BlockingIOError):
            self.udp.recv(1)
        for folder in ("/tmp", "/dev/shm", "/", os.getcwd(), sys.prefix, str(Path.home())):
            left = [name for name in os.listdir(folder) if self.token in name]
            assert left == ([os.path.basename(self.unix_path)] if folder == "/tmp" else [])
        assert self.processes() == []

    def close(self) -> None:
        self.canary.kill()
        self.canary.wait()
        for server in (self.tcp, self.udp, self.unix, self.abstract):
            server.close()
        os.unlink(self.unix_path)


@pytest.fixture
def host(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    host = Host(tmp_path)
    yield host
    try:
        host.check()
    finally:
        host.close()
