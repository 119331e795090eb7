"""A SLURM cluster of one node on this machine, for tests: munged, slurmctld and slurmd from Debian's slurm-wlm."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Starts the daemons, and ends them; gives the environment in which `sbatch` finds them.

    Where SLURM is not installed, or this user may not start it, the test is skipped, or fails if REQUIRE_SLURM is set.

    Args:
        folder: for their state and logs.
    """
    if os.geteuid() != 0 or not all(shutil.which(name, path=_PATH) for name in _PROGRAMS):
        absent = "SLURM is not installed, or cannot be started by this user"
        if os.environ.get("REQUIRE_SLURM"):
            pytest.fail(absent)
        pytest.skip(absent)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("ctld", "d", "munge"):
        (folder / part).mkdir(exist_ok=True)
    key, socket_path = folder / "munge" / "key", folder / "munge" / "socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname()
    ports = [_free_port(), _free_port()]
    conf = folder / "slurm.conf"
    conf.write_text(
        f"""ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={socket_path}
CredType=cred/munge
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/d
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""
    )
    environment = os.environ | {"SLURM_CONF": str(conf), "PATH": _PATH}
    commands = [
        ["munged", "-F", "--force", f"--key-file={key}", f"--socket={socket_path}"]
        + [f"--{name}-file={folder}/munge/{name}" for name in ("pid", "log", "seed")],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf), "-N", host],
    ]
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.txt").open("wb") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment))
            time.sleep(1.0)
        _wait_until_idle(environment, folder)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        said = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, env=environment, check=False)
        if said.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in folder.glob("*.txt"))
    raise AssertionError(f"SLURM did not start: {said.stdout}{said.stderr}\n{logs}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
