"""The verb `worker`: takes trials of a sweep and trains them, on any machine, until none is left.

    python -m experiments.run worker --workdir=DIR

is the whole command, on a laptop, in a SLURM job or on a TPU VM, where DIR is the sweep's folder; workers may come, go
and be killed at any time. docs/sweep.md says what machines without a common folder need.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

from pydantic import NonNegativeInt

from cpm_jax.common import exit_codes
from cpm_jax.common.config import InputError, config_dataclass, config_to_dict
from cpm_jax.scaling import study as studies
from cpm_jax.scaling.extra import import_extra
from cpm_jax.scaling.runs import RUNS_FILE, Run, append_run, merge_runs, read_runs
from cpm_jax.scaling.space import Bindings
from cpm_jax.scaling.storage import open_storage, patiently, storage_url
from experiments import sweep_trials
from experiments.sweep import SETTINGS_FILE, SweepConfig, open_sweep, read_settings

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
        self._study, self._url = open_sweep(sweep, self._base, workdir)
        self._reused = _runs_to_reuse(sweep)
        self._resolved: dict[str, sweep_trials.Resolved] = {}

    def claim(self) -> studies.Claim | Literal["wait", "done"]:
        """The next trial, see `study.next_trial`."""
        sweep, space = self._sweep, self._base.space
        return self._patiently(
            lambda: studies.next_trial(self._study, sweep.study, space, self._workdir, self._identify)
        )

    def train(self, claim: studies.Claim) -> None:
        """Trains a trial and tells the study how it ended.

        Should another worker have been given the trial, as this one was silent for too long, it is left to that one.
        """
        trial = claim.trial
        job = self._resolved[trial.user_attrs[studies.ID]]
        folder = sweep_trials.trial_folder(self._workdir, job.id)
        said = ", ".join(f"{name}={value!r}" for name, value in claim.bindings.items())
        print(f"trial {trial.number} ({job.id}): {said}", flush=True)
        try:
            if job.id in self._reused:
                run: Run | None = self._reused[job.id]
                outcome = sweep_trials.Outcome("done", self._reused[job.id].loss)
            else:
                hooks = self._hooks(trial)
                outcome = sweep_trials.train_trial(
                    self._base, job, self._workdir, hooks, max_restarts=self._sweep.max_restarts
                )
                run = sweep_trials.as_run(job, folder)
            if run is not None:
                append_run(self._workdir / RUNS_FILE, run)
            self._patiently(lambda: self._tell(trial, outcome, run, sweep_trials.log_tail(folder)))
        except import_extra("optuna").exceptions.UpdateFinishedTrialError:
            print(f"trial {trial.number}: given to another worker, as this one was silent for too long", flush=True)
            return
        loss = "" if outcome.loss is None else f", loss {outcome.loss:.4f}"
        print(f"trial {trial.number}: {outcome.status}{loss} {outcome.error}", flush=True)

    def _hooks(self, trial: Any) -> sweep_trials.Hooks:
        reported = set(self._study._storage.get_trial(trial._trial_id).intermediate_values)  # by an attempt before
        prunes = self._sweep.study.pruner != "none" and studies.PROMOTED not in trial.user_attrs
        last_beat = -math.inf

        def report(tokens: int, loss: float) -> bool:
            def tell() -> bool:
                if tokens not in reported:
                    trial.report(loss, tokens)
                    reported.add(tokens)
                return prunes and trial.should_prune()

            return self._patiently(tell)

        def alive(progress: Mapping[str, float]) -> None:
            nonlocal last_beat
            if time.monotonic() - last_beat >= self._sweep.heartbeat_seconds:
                self._patiently(lambda: studies.beat(self._study, trial, progress))
                last_beat = time.monotonic()

        return sweep_trials.Hooks(report, alive, self._stopping)

    def _tell(self, trial: Any, outcome: sweep_trials.Outcome, run: Run | None, log: str) -> None:
        state = import_extra("optuna").trial.TrialState
        trial.set_user_attr(studies.PROGRESS, outcome.progress)
        if outcome.status == "stopped":
            studies.give_back(self._study, trial)
            return
        trial.set_user_attr(studies.STATUS, outcome.status)
        trial.set_user_attr(studies.ERROR, outcome.error)
        if run is not None:
            trial.set_user_attr(studies.RUN, config_to_dict(run))
        if outcome.status in ("failed", "diverged"):
            trial.set_user_attr(studies.LOG, log)
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


def _runs_to_reuse(sweep: SweepConfig) -> dict[str, Run]:
    """What other sweeps have trained to its end, by id."""
    paths = [Path(other) / RUNS_FILE if Path(other).is_dir() else other for other in sweep.reuse]
    return {run.id: run for run in merge_runs(*map(read_runs, paths)) if run.status == "done"}


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
