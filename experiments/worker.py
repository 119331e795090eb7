"""The verb `worker`: takes trials of a sweep and trains them, on any machine, until none is left.

    python -m experiments.run worker --workdir=DIR

is the whole command, on a laptop, in a SLURM job or on a TPU VM, where DIR is the sweep's folder; workers may come, go
and be killed at any time. docs/sweep.md says what machines without a common folder need.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

from pydantic import NonNegativeInt

from cpm_jax.common import exit_codes
from cpm_jax.common.config import InputError, config_dataclass
from cpm_jax.scaling import study as studies
from cpm_jax.scaling.extra import import_extra
from cpm_jax.scaling.runs import RUNS_FILE, append_run, read_runs
from cpm_jax.scaling.space import Bindings
from cpm_jax.scaling.storage import open_storage, patiently, storage_url
from experiments import sweep_trials
from experiments.sweep import SETTINGS_FILE, SweepConfig, opened, read_settings

T = TypeVar("T")
_WAIT_SECONDS = 1.0


@config_dataclass
class WorkerConfig:
    """A worker of a sweep.

    Attributes:
        storage: URL of the study's database, for a machine whose --workdir is not the sweep's; "" is what the sweep in
            --workdir uses.
        name: of the study there; only read where `storage` is given.
        max_trials: it ends after so many; 0 for as many as there are.
    """

    storage: str = ""
    name: str = "sweep"
    max_trials: NonNegativeInt = 0


def run(config: WorkerConfig, workdir: Path) -> None:
    """Trains trials until none is left.

    Raises:
        InputError: there is no sweep, or its database cannot be used.
        exit_codes.Stop: it was told to stop; its trial is saved and given back.
    """
    sweep = _find_sweep(config, workdir)
    with _told_to_stop() as stopping:
        worker = Worker(sweep, workdir, stopping)
        taken = 0
        while not config.max_trials or taken < config.max_trials:
            if stopping():
                raise exit_codes.Stop(exit_codes.PREEMPTED, "stopped; the same command takes trials again")
            claim = worker.claim()
            if claim == "done":
                return
            if claim == "wait":
                time.sleep(_WAIT_SECONDS)
                continue
            assert isinstance(claim, studies.Claim)
            taken += 1
            worker.train(claim)


class Worker:
    """Takes trials of a sweep, one after the other."""

    def __init__(self, sweep: SweepConfig, workdir: Path, stopping: Callable[[], bool]):
        """Opens the study.

        Args:
            sweep: settings of the sweep.
            workdir: where trials lie.
            stopping: whether to save and stop.
        """
        self._sweep, self._workdir, self._stopping = sweep, workdir, stopping
        self._base = sweep.base()
        self._study, self._url = opened(sweep, self._base, workdir)
        self._known = known_losses(sweep)
        self._resolved: dict[str, sweep_trials.Resolved] = {}

    def claim(self) -> studies.Claim | Literal["wait", "done"]:
        """The next trial, see `study.next_trial`."""
        sweep, space = self._sweep, self._base.space
        return self._patiently(
            lambda: studies.next_trial(self._study, sweep.study, space, self._workdir, self._identify)
        )

    def train(self, claim: studies.Claim) -> None:
        """Trains a trial and tells the study how it ended."""
        trial = claim.trial
        job = self._resolved[trial.user_attrs[studies.ID]]
        beaten = [-math.inf]

        def alive() -> None:
            if time.monotonic() - beaten[0] >= self._sweep.heartbeat_seconds:
                self._patiently(lambda: self._study._storage.record_heartbeat(trial._trial_id))
                beaten[0] = time.monotonic()

        # Of an attempt before this one.
        known = self._study._storage.get_trial(trial._trial_id).intermediate_values
        prunes = self._sweep.study.pruner != "none" and studies.PROMOTED not in trial.user_attrs

        def report(tokens: int, loss: float) -> bool:
            def tell() -> bool:
                if tokens not in known:
                    trial.report(loss, tokens)
                return prunes and trial.should_prune()

            return self._patiently(tell)

        said = ", ".join(f"{name}={value!r}" for name, value in claim.bindings.items())
        print(f"trial {trial.number} ({job.id}): {said}", flush=True)
        if job.id in self._known:
            outcome = sweep_trials.Outcome("done", self._known[job.id])
        else:
            outcome = sweep_trials.train_trial(
                self._base,
                job,
                self._workdir,
                report=report,
                alive=alive,
                stopping=self._stopping,
                max_restarts=self._sweep.max_restarts,
            )
            if line := sweep_trials.as_run(job, sweep_trials.trial_folder(self._workdir, job.id)):
                append_run(self._workdir / RUNS_FILE, line)
        self._patiently(lambda: self._tell(trial, outcome))
        loss = "" if outcome.loss is None else f", loss {outcome.loss:.4f}"
        print(f"trial {trial.number}: {outcome.status}{loss} {outcome.error}", flush=True)

    def _tell(self, trial: Any, outcome: sweep_trials.Outcome) -> None:
        state = import_extra("optuna").trial.TrialState
        if outcome.status == "stopped":
            studies.give_back(self._study, trial)
            return
        trial.set_user_attr(studies.STATUS, outcome.status)
        trial.set_user_attr(studies.ERROR, outcome.error)
        if outcome.status == "done":
            self._study.tell(trial, outcome.loss, skip_if_finished=True)
        else:
            # A diverged trial counts as one that was ended: samplers then keep away, as they do not from failures.
            ended = state.FAIL if outcome.status == "failed" else state.PRUNED
            self._study.tell(trial, state=ended, skip_if_finished=True)

    def _identify(self, bindings: Bindings) -> str:
        trial = sweep_trials.resolve(self._base, bindings)
        self._resolved[trial.id] = trial
        return trial.id

    def _patiently(self, call: Callable[[], T]) -> T:
        return patiently(call, self._url, self._sweep.patience_seconds)


def known_losses(sweep: SweepConfig) -> dict[str, float]:
    """Losses, by id, of trials that other sweeps have trained to their end."""
    found: dict[str, float] = {}
    for other in sweep.known:
        path = Path(other)
        for line in read_runs(path / RUNS_FILE if path.is_dir() else path):
            if line.status == "done" and line.loss is not None:
                found[line.id] = line.loss
    return found


def _find_sweep(config: WorkerConfig, workdir: Path) -> SweepConfig:
    if not config.storage:
        if not (workdir / SETTINGS_FILE).exists():
            raise InputError(f"--workdir={workdir}: no sweep there; start it first with: sweep --workdir={workdir}")
        return read_settings((workdir / SETTINGS_FILE).read_text("utf-8"))
    url = storage_url(config.storage, workdir)
    storage = open_storage(url, heartbeat_seconds=30, grace_seconds=120, patience=30.0)
    study = patiently(lambda: studies.load_study(storage, config.name), url, 30.0)
    return read_settings(study.user_attrs["about"])


@contextmanager
def _told_to_stop() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM or SIGINT has come."""
    told: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        told.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
