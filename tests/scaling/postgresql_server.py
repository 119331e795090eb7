"""A PostgreSQL server for tests, with a folder and a port of its own."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def server() -> Iterator[tuple[str, Callable[[], None]]]:
    """Starts a server, and ends it; gives its URL and a function that stops it before.

    Where PostgreSQL is not installed the test is skipped, or fails if REQUIRE_POSTGRESQL is set.
    """
    if _binary("initdb") is None:
        if os.environ.get("REQUIRE_POSTGRESQL"):
            pytest.fail("PostgreSQL is not installed")
        pytest.skip("PostgreSQL is not installed")
    user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}  # it refuses to run as root
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "data"
        folder.mkdir()
        if user:
            os.chmod(parent, 0o755)
            shutil.chown(folder, "postgres", "postgres")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        made = ["-D", folder, "-U", "sweeper", "--auth=trust", "--no-sync"]
        subprocess.run([_binary("initdb"), *made], check=True, capture_output=True, cwd=folder, **user)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        control = [_binary("pg_ctl"), "-D", folder, "-w", "-l", folder / "log"]
        # Not captured: the server keeps these files open, and so would the call wait for its end.
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*control, "-o", options, "start"], check=True, cwd=folder, **quiet, **user)

        def stop() -> None:
            subprocess.run([*control, "-m", "immediate", "stop"], check=False, cwd=folder, **quiet, **user)

        try:
            yield f"postgresql://sweeper@127.0.0.1:{port}/postgres", stop
        finally:
            stop()


def _binary(name: str) -> str | None:
    found = shutil.which(name) or next(iter(sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))[::-1]), None)
    return str(found) if found else None
