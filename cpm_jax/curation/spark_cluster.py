"""A standalone Spark cluster on this machine, or one more machine for a cluster; Ctrl-C ends it.

    python -m cpm_jax.curation.spark_cluster                                  # a master and two workers, here
    python -m cpm_jax.curation.spark_cluster --join spark://head:7077 --workers 1 --cores 64 --memory 128g

The first prints the URL for `--gin.SPARK_MASTER`. Everything comes with the package `pyspark`; Java is needed.
"""

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from cpm_jax.common.config import InputError
from cpm_jax.common.extras import how_to_install
from cpm_jax.data.errors import DataError

_MASTER = "org.apache.spark.deploy.master.Master"
_WORKER = "org.apache.spark.deploy.worker.Worker"
_START_SECONDS = 120


class Cluster:
    """Processes of a standalone cluster.

    Attributes:
        url: of the master.
        workers: the processes of the workers; each leads a process group, in which its executors are, too.
    """

    def __init__(self, folder: Path, host: str, port: int = 0, url: str = ""):
        """Starts a master, unless there is one.

        Args:
            folder: for logs and what executors write.
            host: name or address that the processes bind to.
            port: of the master; 0 for a free one.
            url: of a master that runs already.
        """
        self._folder = folder
        self._host = host
        self._master: subprocess.Popen[bytes] | None = None
        self.url = url
        self.workers: list[subprocess.Popen[bytes]] = []
        if not url:
            port = port or _free_port(host)
            self._master = self._start(_MASTER, "master", "--host", host, "--port", str(port), "--webui-port", "0")
            self.url = f"spark://{host}:{port}"
            self._wait_for(self._master, "master", "I have been elected leader")

    def add_worker(self, cores: int, memory: str) -> None:
        """Starts a worker and waits until the master has it.

        Args:
            cores: how many tasks it runs at once.
            memory: of its executors' JVM, as "1g"; Python's is beside it.

        Raises:
            DataError: it does not come up.
        """
        name = f"worker{len(self.workers)}"
        folder = self._folder / name
        options = ("--host", self._host, "--webui-port", "0", "--cores", str(cores), "--memory", memory)
        worker = self._start(_WORKER, name, *options, "--work-dir", str(folder), self.url)
        self.workers.append(worker)
        self._wait_for(worker, name, "Successfully registered with master")

    def stop(self) -> None:
        """Ends all processes."""
        for process in [*self.workers, *([self._master] if self._master else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in [*self.workers, *([self._master] if self._master else [])]:
            process.wait()

    def _start(self, main: str, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        home = _spark_home()
        environment = os.environ | {"SPARK_HOME": str(home), "SPARK_LOCAL_IP": self._host}
        environment.setdefault("PYSPARK_PYTHON", sys.executable)
        with open(self._folder / f"{name}.log", "wb") as log:
            return subprocess.Popen(
                [str(home / "bin" / "spark-class"), main, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _wait_for(self, process: subprocess.Popen[bytes], name: str, said: str) -> None:
        log = self._folder / f"{name}.log"
        end = time.monotonic() + _START_SECONDS
        while said not in (text := log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise DataError(f"the {name} of the Spark cluster did not start: {text[-2000:]}")
            time.sleep(0.1)


def _spark_home() -> Path:
    found = importlib.util.find_spec("pyspark")
    if found is None or found.origin is None:
        raise DataError(f"Apache Spark is needed for a cluster: {how_to_install('spark')}")
    return Path(found.origin).parent


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def cluster(
    workers: int = 2, cores: int = 1, memory: str = "1g", host: str = "127.0.0.1", port: int = 0, join: str = ""
) -> Iterator[Cluster]:
    """Runs a cluster while the block does.

    Args:
        workers: how many to start.
        cores: of each.
        memory: of each, for the JVM of executors.
        host: name or address that the processes bind to; others reach it by this.
        port: of the master; 0 for a free one.
        join: the URL of a master that runs already, to which the workers go.

    Raises:
        DataError: Spark or Java is missing, or a process does not start.
    """
    from cpm_jax.curation.spark import check_java

    check_java()
    folder = Path(tempfile.mkdtemp(prefix="spark_cluster_"))
    started = Cluster(folder, host, port, join)
    try:
        for _ in range(workers):
            started.add_worker(cores, memory)
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a cluster until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="workers to start on this machine")
    parser.add_argument("--cores", type=int, default=1, help="of each worker: tasks at once")
    parser.add_argument("--memory", default="1g", help="of each worker, for the JVM; Python's is beside it")
    parser.add_argument("--host", default="127.0.0.1", help="address of this machine; others reach it by this")
    parser.add_argument("--port", type=int, default=7077, help="of the master")
    parser.add_argument("--join", default="", metavar="URL", help="start no master; the workers go to this one")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with cluster(args.workers, args.cores, args.memory, args.host, args.port, args.join) as started:
            print(f"{len(started.workers)} workers at {started.url}", flush=True)
            signal.pause()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
