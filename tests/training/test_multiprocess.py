"""Two real processes joined by jax.distributed: one is told to stop, one is killed, and nothing is lost."""

import signal
import socket
import subprocess
import time

import pytest

from benchmarks.kills import differences, figures, make_job
from cpm_jax.checkpoints.manager import list_steps, read_meta
from cpm_jax.common import exit_codes

pytestmark = pytest.mark.slow

STEPS, EVERY = 60, 10


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"), STEPS, EVERY)


def start(job, workdir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    join = [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return [job.start(workdir, *join, f"--process_id={i}", **streams) for i in range(2)]


def ends(processes):
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    return [process.returncode for process in processes], "\n".join(outputs)


def wait_for_step(workdir, step):
    while not (rows := figures(workdir)) or rows[-1]["step"] < step:
        time.sleep(0.01)


def test_two_processes_stopped_and_killed_end_bit_identical(job, tmp_path):
    codes, output = ends(start(job, tmp_path / "unbroken"))
    assert codes == [0, 0], output
    meta = read_meta(tmp_path / "unbroken" / "checkpoints" / str(STEPS))
    assert meta["process_count"] == 2
    assert meta["mesh"]["fsdp"] == 2
    steps = [row["step"] for row in figures(tmp_path / "unbroken") if "loss" in row]
    assert steps == list(range(1, STEPS + 1))  # only process 0 writes

    broken = tmp_path / "broken"
    processes = start(job, broken)
    wait_for_step(broken, EVERY + 2)
    processes[1].send_signal(signal.SIGTERM)
    codes, output = ends(processes)
    assert codes == [exit_codes.PREEMPTED] * 2, output
    stopped = list_steps(broken / "checkpoints")[-1]
    assert output.count(f"stopped and saved at step {stopped}") == 2

    processes = start(job, broken)
    wait_for_step(broken, stopped + EVERY + 2)
    processes[1].kill()
    codes, output = ends(processes)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0, output  # it does not hang, nor go on alone

    codes, output = ends(start(job, broken))
    assert codes == [0, 0], output
    assert differences(broken, tmp_path / "unbroken") == []
