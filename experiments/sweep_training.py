"""Training the trials of a sweep: in processes of their own, or many in one, looked after by a worker."""

import contextlib
import dataclasses
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cpm_jax.common import exit_codes
from cpm_jax.common.files import write_json
from cpm_jax.common.metrics import METRICS_FILE, read_metrics
from cpm_jax.scaling.extra import import_extra
from experiments.sweep_trials import (
    LOG_FILE,
    TRIAL_FILE,
    Base,
    Resolved,
    evaluations,
    final_loss,
    log_tail,
    pretrain_arguments,
    read_trial,
    tokens_so_far,
    trial_folder,
)

LOCK_FILE = "lock"  # within a trial's folder
_POLL_SECONDS = 0.5
_SAVE_SECONDS = 60.0  # a training that is told to stop takes that long at most
_WRITE_SECONDS = 5.0  # what a kill loses of a trial's bill
_NOT_FINITE = "its loss is not finite"


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What `train_trials` calls while it trains.

    Attributes:
        report: once with tokens and loss of each evaluation; True ends a trial that is trained by itself, which keeps
            its checkpoint.
        alive: all the time, with `Outcome.progress` so far.
        stopping: whether to save and stop.
    """

    report: Callable[[int, float], bool]
    alive: Callable[[Mapping[str, float]], None]
    stopping: Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial came out of a call of `train_trials`.

    Attributes:
        status: "stopped": this process was told to stop, or the program of several trials ended early; a trial with a
            checkpoint goes on from there, by itself.
        loss: held-out, at the end of a trial that is done.
        error: one line, of a trial that failed.
        progress: "tokens" so far; "seconds" of wall and "cpu_seconds" of processor time over all attempts, of those
            in one program an equal share.
    """

    status: Literal["done", "pruned", "diverged", "failed", "stopped"]
    loss: float | None = None
    error: str = ""
    progress: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Job:
    """A trial while it is trained.

    Attributes:
        attempts: all starts of it, this one too.
        tokens: so far.
        size: of the metrics' file when it was last read.
        reported: numbers of tokens of the evaluations that were reported.
    """

    trial: Resolved
    folder: Path
    hooks: Hooks
    attempts: list[dict[str, float]]
    tokens: int = 0
    size: int = -1
    reported: set[int] = dataclasses.field(default_factory=set)

    @property
    def progress(self) -> dict[str, float]:
        """As in `Outcome`."""
        spent = {name: sum(attempt[name] for attempt in self.attempts) for name in ("seconds", "cpu_seconds")}
        return {"tokens": self.tokens} | spent

    def write(self, status: str = "running", error: str = "") -> None:
        """Writes what is kept about the trial."""
        about = {"bindings": repr(self.trial.bindings), "status": status, "error": error, "attempts": self.attempts}
        write_json(self.folder / TRIAL_FILE, about)

    def look(self) -> bool:
        """Reports what is new in the trial's metrics; whether to end it."""
        path = self.folder / METRICS_FILE
        if not path.exists() or path.stat().st_size == self.size:
            return False
        self.size, self.tokens = path.stat().st_size, tokens_so_far(self.trial, self.folder)
        ends = False
        for tokens, loss in evaluations(self.trial, self.folder):
            if tokens not in self.reported and loss is not None:
                self.reported.add(tokens)
                ends = (self.hooks.report(tokens, loss) and tokens < self.trial.tokens) or ends
        return ends

    def ended(self) -> Outcome | None:
        """How a training that ended without an error ended; None where it has no end."""
        loss = final_loss(self.trial, self.folder)
        if loss is not None:
            return Outcome("done", loss)
        last = max(read_metrics(self.folder / METRICS_FILE), key=lambda row: row["step"], default={})
        limit = self.trial.config.train.max_consecutive_nonfinite
        if last.get("nonfinite_run", 0) >= limit or self.trial.tokens in dict(evaluations(self.trial, self.folder)):
            return Outcome("diverged", error=_NOT_FINITE)
        return None


def train_trials(
    base: Base, trials: Sequence[Resolved], workdir: Path, hooks: Sequence[Hooks], max_restarts: int = 3
) -> list[Outcome]:
    """Trains a trial to its end in a process of its own, from its checkpoint where there is one; or several at once.

    Several share a program (`program_key`, `experiments/sweep_program.py`) and begin at their beginning. Should it end
    early, their outcome is "stopped", and each can go on by itself. Only one process at a time trains in a trial's
    folder: its lock is held as long as this one or its child lives.

    Args:
        base: of the sweep.
        trials: the trials.
        workdir: of the sweep.
        hooks: of each trial, what is called meanwhile.
        max_restarts: so often the training of a single trial that asks for it (stuck, another process lost) is started
            again.
    """
    folders = [trial_folder(workdir, trial.id) for trial in trials]
    with contextlib.ExitStack() as stack:
        locks = [stack.enter_context(_claimed(*claim)) for claim in zip(folders, hooks, strict=True)]
        if not all(locks):
            return [Outcome("stopped")] * len(trials)
        jobs = [
            _Job(trial, folder, hook, read_trial(folder).get("attempts", []))
            for trial, folder, hook in zip(trials, folders, hooks, strict=True)
        ]
        if len(jobs) > 1:
            outcomes = _train_together(base, jobs, locks)
        else:
            outcomes = [_train_alone(base, jobs[0], locks, max_restarts)]
        for job, outcome in zip(jobs, outcomes, strict=True):
            job.write(outcome.status, outcome.error)
        return [
            dataclasses.replace(outcome, progress=job.progress) for job, outcome in zip(jobs, outcomes, strict=True)
        ]


def _train_alone(base: Base, job: _Job, locks: Sequence[Any], max_restarts: int) -> Outcome:
    command = ["experiments.run", *pretrain_arguments(base.gin_files, job.trial.flags, job.folder)]
    for _ in range(max_restarts + 1):
        code, ending = _attempt(command, "", [job], locks)
        if code == exit_codes.OK:
            return job.ended() or Outcome("failed", error="it ended without a held-out loss")
        if code == exit_codes.NON_FINITE:
            return Outcome("diverged", error=_NOT_FINITE)
        if ending is not None:
            return Outcome(ending)
        if code not in (exit_codes.PREEMPTED, exit_codes.STUCK, exit_codes.PROCESS_LOST):
            return Outcome("failed", error=f"exit code {code}: {log_tail(job.folder, 1)}")
    return Outcome("failed", error=f"it asked to be started again {max_restarts} times")


def _train_together(base: Base, jobs: Sequence[_Job], locks: Sequence[Any]) -> list[Outcome]:
    what = {"gin_files": base.gin_files, "trials": [(str(job.folder), job.trial.flags) for job in jobs]}
    code, _ = _attempt(["experiments.sweep_program"], json.dumps(what), jobs, locks)
    for job in jobs[1:]:
        shutil.copyfile(jobs[0].folder / LOG_FILE, job.folder / LOG_FILE)
    # One that has no end after an error may be another's fault.
    without = (
        Outcome("failed", error="it ended without a held-out loss") if code == exit_codes.OK else Outcome("stopped")
    )
    return [job.ended() or without for job in jobs]


def _attempt(
    command: Sequence[str], stdin: str, jobs: Sequence[_Job], locks: Sequence[Any]
) -> tuple[int, Literal["pruned", "stopped"] | None]:
    """One start of a process that trains trials, which is added to the attempts of each.

    Args:
        command: module and arguments.
        stdin: what the process reads.
        jobs: what it trains; its output goes to the log of the first.
        locks: which it holds too.

    Returns:
        Its exit code; and whether it was told to end, because of a trial's losses or with this process.
    """
    psutil = import_extra("psutil")
    for job in jobs:
        job.attempts.append({"seconds": 0.0, "cpu_seconds": 0.0})
        job.write()
    begin = written = time.monotonic()
    ending: Literal["pruned", "stopped"] | None = None
    with (jobs[0].folder / LOG_FILE).open("ab") as log, tempfile.TemporaryFile() as told:
        told.write(stdin.encode())
        told.seek(0)
        process = subprocess.Popen(
            ends_with_this_process([sys.executable, "-m", *command], signal.SIGKILL),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=told,
            pass_fds=[lock.fileno() for lock in locks],
            start_new_session=True,  # a Ctrl-C reaches this process, which passes it on when it has said so
        )
    try:
        code = None
        while code is None:
            code = process.poll()
            spent = {"seconds": (time.monotonic() - begin) / len(jobs)}
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(process.pid).cpu_times()
                spent["cpu_seconds"] = (times.user + times.system) / len(jobs)
            for job in jobs:
                job.attempts[-1] |= spent
                ends = job.look() and len(jobs) == 1
                if ends and ending is None:
                    ending = "pruned"
                    process.terminate()
                job.hooks.alive(job.progress)
            if ending is None and jobs[0].hooks.stopping():
                ending = "stopped"
                process.terminate()
            if time.monotonic() - written >= _WRITE_SECONDS:
                written = time.monotonic()
                for job in jobs:
                    job.write()
            if code is None:
                time.sleep(_POLL_SECONDS)
    finally:
        if process.poll() is None:  # this process can no longer look after it: the database is gone, say
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SAVE_SECONDS)
            process.kill()
            process.wait()
    return code, ending


def ends_with_this_process(command: list[str], signal_number: int) -> list[str]:
    """A command that Linux sends a signal to when this process dies, even by SIGKILL."""
    setpriv = shutil.which("setpriv")  # of util-linux; setting it between fork and exec is not safe beside threads
    return [setpriv, f"--pdeathsig={signal.Signals(signal_number).name[3:]}", "--", *command] if setpriv else command


@contextlib.contextmanager
def _claimed(folder: Path, hooks: Hooks) -> Iterator[Any]:
    """The lock of a trial's folder, which its last worker may still hold for a moment; None if told to stop."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("ab") as file:
        while not hooks.stopping():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                hooks.alive({})
                time.sleep(_POLL_SECONDS)
                continue
            yield file
            return
        yield None
