"""The whole job in processes of its own, killed, stopped, torn and stuck; it must end as if nothing had happened."""

import signal
import subprocess
import sys
import time

import pytest

from benchmarks.kills import differences, figures, make_job, newest_arrays, run_with_kills
from cpm_jax.checkpoints.manager import list_steps
from cpm_jax.common import exit_codes

pytestmark = pytest.mark.slow

STEPS, EVERY, KILLS = 300, 20, 10


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("job"), STEPS, EVERY)


@pytest.fixture(scope="module")
def unbroken(job, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    job.finish(workdir)
    return workdir


def end_of(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def start(job, workdir):
    return job.start(workdir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_step(workdir, step):
    while not (rows := figures(workdir)) or rows[-1]["step"] < step:
        time.sleep(0.01)


def test_killed_at_random_moments_ends_bit_identical(job, unbroken, tmp_path):
    counts = run_with_kills(job, tmp_path, KILLS, seed=1)
    assert counts.total() == KILLS
    # A quarter are aimed at saves and a quarter between them; where the others fall is the machine's affair.
    assert counts["save"] >= 3, counts
    assert counts["step"] >= 3, counts
    assert differences(tmp_path, unbroken) == []
    steps = [row["step"] for row in figures(tmp_path) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))


def test_all_of_the_state_is_compared(unbroken):
    arrays = newest_arrays(unbroken)
    assert len(arrays) > 30
    assert any("opt_state" in name for name in arrays)
    assert figures(unbroken)[-1]["step"] == STEPS


def test_terminated_saves_and_the_same_command_goes_on(job, unbroken, tmp_path):
    process = start(job, tmp_path)
    wait_for_step(tmp_path, 7)
    process.send_signal(signal.SIGTERM)
    code, output = end_of(process)
    assert code == exit_codes.PREEMPTED, output
    last = list_steps(tmp_path / "checkpoints")[-1]
    assert f"stopped and saved at step {last}" in output
    assert figures(tmp_path)[-1]["step"] == last
    code, output = end_of(start(job, tmp_path))
    assert code == exit_codes.OK, output
    assert f"going on from step {last}" in output
    assert differences(tmp_path, unbroken) == []
    code, output = end_of(start(job, tmp_path))
    assert code == exit_codes.OK
    assert "nothing to do: this run is done" in output


def test_torn_and_unreadable_checkpoints(job, unbroken, tmp_path):
    process = start(job, tmp_path)
    wait_for_step(tmp_path, 4 * EVERY)
    process.kill()
    process.communicate()
    steps = list_steps(tmp_path / "checkpoints")
    for step in steps:
        (tmp_path / "checkpoints" / str(step) / "meta" / "metadata").rename(tmp_path / str(step))
    code, output = end_of(start(job, tmp_path))
    assert code == exit_codes.BAD_INPUT
    assert "none is readable" in output
    for step in steps:
        assert f"step {step}: meta/metadata is missing" in output
    for step in steps[:-1]:  # all but the newest are mended
        (tmp_path / str(step)).rename(tmp_path / "checkpoints" / str(step) / "meta" / "metadata")
    code, output = end_of(start(job, tmp_path))
    assert code == exit_codes.OK, output
    assert f"checkpoint {steps[-1]} is unreadable" in output
    assert f"going on from step {steps[-2]}" in output
    assert differences(tmp_path, unbroken) == []


HANGING = """
import sys, time
from experiments import pretrain, run

def hang(*args, start_step, **kwargs):
    loader = make_loader(*args, start_step=start_step, **kwargs)
    class Hanging(type(loader)):
        def __next__(self):
            if self.left == 0:
                wait_for_a_disk_that_never_answers()
            self.left -= 1
            return super().__next__()
    loader.__class__, loader.left = Hanging, 30
    return loader

def wait_for_a_disk_that_never_answers():
    time.sleep(1000)

make_loader, pretrain.make_loader = pretrain.make_loader, hang
sys.exit(run.main(sys.argv[1:]))
"""


def test_a_stuck_loader_is_ended_by_the_watchdog(job, unbroken, tmp_path):
    command = [sys.executable, "-c", HANGING, "pretrain", f"--gin_file={job.gin_file}", f"--workdir={tmp_path}"]
    stuck = subprocess.run(
        [*command, "--gin.TrainConfig.watchdog_seconds=2.0"],
        check=False,
        env=job.environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert stuck.returncode == exit_codes.STUCK, stuck.stderr
    for text in (stuck.stderr, (tmp_path / "stacks.txt").read_text()):
        assert "no progress in time (step 30)" in text
        assert "wait_for_a_disk_that_never_answers" in text
    assert end_of(start(job, tmp_path))[0] == exit_codes.OK
    assert differences(tmp_path, unbroken) == []
