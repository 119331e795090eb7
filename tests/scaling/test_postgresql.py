"""The same races on a real PostgreSQL server, which this file starts where it is installed."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from cpm_jax.scaling.space import values
from cpm_jax.scaling.storage import StorageError, open_storage, patiently, storage_url
from cpm_jax.scaling.study import StudyConfig
from tests.scaling import test_study


def binary(name) -> str | None:
    found = shutil.which(name) or next(iter(sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))[::-1]), None)
    return str(found) if found else None


@pytest.fixture(scope="module")
def server():
    """URL of a server of its own, and a function that stops it."""
    if binary("initdb") is None:
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
        subprocess.run([binary("initdb"), *made], check=True, capture_output=True, cwd=folder, **user)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
        control = [binary("pg_ctl"), "-D", folder, "-w", "-l", folder / "log"]
        subprocess.run([*control, "-o", options, "start"], check=True, capture_output=True, cwd=folder, **user)

        def stop():
            subprocess.run([*control, "-m", "immediate", "stop"], check=False, capture_output=True, cwd=folder, **user)

        try:
            yield f"postgresql://sweeper@127.0.0.1:{port}/postgres", stop
        finally:
            stop()


def test_racing_workers_take_each_trial_once_and_a_dead_ones_trial_once(server, tmp_path):
    test_study.check_race(tmp_path, server[0])


def test_machines_without_a_common_folder_take_each_trial_once(server, tmp_path):
    """Row locks alone keep claims apart: each process has a lock file of its own."""
    import psycopg

    with psycopg.connect(server[0], autocommit=True) as connection:
        connection.execute("CREATE DATABASE apart")
    url = server[0].replace("/postgres", "/apart")
    test_study.make(tmp_path, StudyConfig(), test_study.GRID, url=url)
    folders = [tmp_path / str(n) for n in range(3)]
    got = test_study.race(folders, 3, url)
    everything = [bindings for part in got for _, bindings in part]
    assert len(everything) == len({test_study.identify(b) for b in everything}) == 15


def test_a_server_that_dies_is_named(server, tmp_path):
    url, stop = server
    study = test_study.make(tmp_path, StudyConfig(), values("A", 1), url=url.replace("/postgres", "/template1"))
    stop()
    with pytest.raises(StorageError, match=r"cannot be used"):
        patiently(study.get_trials, url, 1.0)
    with pytest.raises(StorageError, match=r"cannot be used: .*refused"):
        open_storage(storage_url(url, tmp_path), heartbeat_seconds=1, grace_seconds=2, patience=0.5)
