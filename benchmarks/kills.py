"""How many of 100 kills a run survives: killed at random moments, it must end as if it never had been.

    python -m benchmarks.kills [number of kills]

A small model is trained once without a break, and once by the same command over and over, each time killed by SIGKILL.
A quarter of the kills come at a random time after the start, a quarter after a random number of steps, a quarter while
a checkpoint is being written and a quarter while none is. Then all arrays of the last checkpoint and all lines of
metrics.jsonl (but for timings) must be equal to those of the unbroken run, bit for bit.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cpm_jax.checkpoints.manager import CHECKPOINTS_DIR
from cpm_jax.common.metrics import METRICS_FILE, read_metrics

TIMINGS = ("seconds_per_step", "tokens_per_second", "mfu")

GIN = """
from __gin__ import dynamic_registration
from cpm_jax.checkpoints import manager
from cpm_jax.data import mixture
from cpm_jax.modeling import config
from cpm_jax.training import loop
from cpm_jax.training import schedules
from experiments import pretrain

pretrain.PretrainConfig:
    model = @config.ModelConfig()
    mixture = @mixture.from_folders()
    schedule = @schedules.ScheduleConfig()
    train = @loop.TrainConfig()
    checkpoint = @manager.CheckpointConfig()
config.ModelConfig:
    vocab_size = 300
    num_layers = 1
    d_model = 32
    num_heads = 2
    num_kv_heads = 1
    d_ff = 64
    dtype = 'float32'
    scan_layers = False
mixture.from_folders.paths = '{dataset}'
schedules.ScheduleConfig.phases = (@up/schedules.Phase(), @down/schedules.Phase())
up/schedules.Phase.steps = 10
up/schedules.Phase.end = 0.01
up/schedules.Phase.shape = 'linear'
down/schedules.Phase.steps = {steps}
down/schedules.Phase.end = 0.001
down/schedules.Phase.shape = 'exponential'
loop.TrainConfig:
    steps = {steps}
    batch_size = 4
    log_every = 1
    eval_every = 50
    eval_batches = 2
manager.CheckpointConfig.every = {every}
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A pretraining command.

    Attributes:
        gin_file: its config.
        every: steps between its checkpoints.
        environment: of the process.
    """

    gin_file: Path
    every: int
    environment: dict[str, str]

    def start(self, workdir: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Starts the command, with further arguments, in a process of its own."""
        command = [sys.executable, "-m", "experiments.run", "pretrain"]
        command += [f"--gin_file={self.gin_file}", f"--workdir={workdir}", *arguments]
        return subprocess.Popen(command, env=self.environment, text=True, **options)

    def finish(self, workdir: Path) -> None:
        """Runs the command until it ends by itself.

        Raises:
            RuntimeError: it failed; the end of its output is in the message.
        """
        process = self.start(workdir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"the run failed with exit code {process.returncode}:\n{output[-3000:]}")


def make_job(folder: Path, steps: int, every: int) -> Job:
    """Prepares a dataset of this package's own source files, and a config to train on it.

    Args:
        folder: where to.
        steps: optimizer steps of the run.
        every: steps between checkpoints.
    """
    from cpm_jax.data.prepare import PrepareConfig, prepare

    root = Path(__file__).resolve().parents[1]
    prepare(
        PrepareConfig(
            sources=str(root / "cpm_jax" / "common"),
            extensions=(".py",),
            seq_len=32,
            vocab_size=300,
            validation_fraction=0.2,
            num_workers=0,
        ),
        folder / "dataset",
        progress=False,
    )
    gin_file = folder / "job.gin"
    gin_file.write_text(GIN.format(dataset=folder / "dataset", steps=steps, every=every))
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    return Job(gin_file, every, environment)


def _steps_logged(workdir: Path) -> int:
    """The step of the last whole line of metrics.jsonl; asked all the time, so it reads the end only."""
    try:
        with open(workdir / METRICS_FILE, "rb") as file:
            file.seek(max(os.path.getsize(file.fileno()) - 4096, 0))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return 0
    return json.loads(lines[-2])["step"] if len(lines) > 1 else 0


def _saving(workdir: Path) -> bool:
    return any((workdir / CHECKPOINTS_DIR).glob("*.orbax-checkpoint-tmp*"))


def _freeze(process: subprocess.Popen[str]) -> None:
    """Stops a process, so that what it does can be looked at and does not change before the kill."""
    process.send_signal(signal.SIGSTOP)
    if process.returncode is None:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def kill_once(job: Job, workdir: Path, moment: str, rng: random.Random, seconds: float) -> str:
    """Starts the command and kills it.

    Args:
        job: the command.
        workdir: of the run.
        moment: "time" kills at a random time, "step" some steps further than any life before, "save" while a checkpoint
            is written, "between" while none is: in the first steps of this life, before the first is due.
        rng: draws the moment.
        seconds: how long a start usually takes, for "time".

    Returns:
        "save" if a checkpoint was being written when it died, else "step" if it had trained, else "start"; "end" if it
        had ended before.
    """
    before = _steps_logged(workdir)
    with job.start(workdir, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        until = time.monotonic() + rng.uniform(0.1, 1.3) * seconds
        steps = rng.randint(1, round(1.5 * job.every))
        while process.poll() is None:
            progress = _steps_logged(workdir)
            if moment == "time" and time.monotonic() >= until:
                break
            if moment == "step" and progress >= before + steps:
                break
            if progress >= before + 3 * job.every:  # enough for one life
                break
            if moment in ("save", "between") and progress != before and _saving(workdir) == (moment == "save"):
                if moment == "save":  # not always at its beginning
                    time.sleep(rng.uniform(0, 0.02))
                _freeze(process)
                if _saving(workdir) == (moment == "save") and _steps_logged(workdir) != before:
                    break
                process.send_signal(signal.SIGCONT)
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode != -signal.SIGKILL:
            return "end"
    if _saving(workdir):
        return "save"
    return "step" if _steps_logged(workdir) != before else "start"


def run_with_kills(job: Job, workdir: Path, kills: int, seed: int) -> Counter[str]:
    """Kills a run that often, then lets it end.

    Args:
        job: the command.
        workdir: of the run.
        kills: how often to kill it.
        seed: of the moments.

    Returns:
        Number of kills by what the run was doing.

    Raises:
        RuntimeError: the run failed by itself, or was over before it was killed that often.
    """
    rng = random.Random(seed)
    seconds = 5.0
    moments = [("save", "between", "step", "time")[i % 4] for i in range(kills)]
    rng.shuffle(moments)
    counts: Counter[str] = Counter()
    for moment in moments:
        start = time.monotonic()
        done = kill_once(job, workdir, moment, rng, seconds)
        if moment != "time":
            seconds = time.monotonic() - start
        if done == "end":
            job.finish(workdir)  # tells of a failure
            raise RuntimeError(f"the run was over after {sum(counts.values())} kills: give it more steps")
        counts[done] += 1
    job.finish(workdir)
    return counts


def figures(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without timings."""
    rows = read_metrics(workdir / METRICS_FILE)
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def newest_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint by name: parameters, optimizer moments, counters."""
    import jax
    import orbax.checkpoint as ocp

    from cpm_jax.checkpoints.manager import find_checkpoint

    path = find_checkpoint(workdir) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(path).item_metadata.tree
        to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = reader.restore(path, restore_args=to_numpy)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(name): np.asarray(leaf) for name, leaf in leaves}


def differences(workdir: Path, unbroken: Path) -> list[str]:
    """What differs between two runs; empty if nothing does.

    Args:
        workdir: of the run that was killed.
        unbroken: of the one that was not.
    """
    ours, theirs = newest_arrays(workdir), newest_arrays(unbroken)
    found = [name for name in ours.keys() | theirs.keys() if not _same(ours.get(name), theirs.get(name))]
    if figures(workdir) != figures(unbroken):
        found.append(METRICS_FILE)
    return sorted(found)


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def main(kills: int = 100) -> None:
    """Runs the benchmark and writes results/kills.json."""
    from benchmarks.results import Benchmark

    every = 20
    with tempfile.TemporaryDirectory() as folder:
        # A life between two kills gets on by about one checkpoint.
        job = make_job(Path(folder), steps=every * (kills + 10), every=every)
        job.finish(Path(folder) / "unbroken")
        counts = run_with_kills(job, Path(folder) / "killed", kills, seed=0)
        found = differences(Path(folder) / "killed", Path(folder) / "unbroken")
    for name in found:
        print(f"differs: {name}")
    benchmark = Benchmark("kills")
    benchmark.add(
        "kills survived, bit for bit",
        "kills",
        0 if found else counts.total(),
        larger_is_better=True,
        baseline_name="kills",
        baseline=kills,
        goal=1.0,
    )
    for moment, what in (("start", "before the first step"), ("step", "between saves"), ("save", "during a save")):
        benchmark.add(f"of these {what}", "kills", counts[moment], larger_is_better=True)
    benchmark.write()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
