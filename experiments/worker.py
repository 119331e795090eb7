"""The verb `worker`: takes trials of a sweep and trains them, on any machine, until none is left.

    python -m experiments.run worker --workdir=DIR

is the whole command, on a laptop, in a SLURM job or on a TPU VM, where DIR is the sweep's folder; workers may come, go
and be killed at any time. docs/sweep.md says what machines without a common folder need.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from experiments import sweep_training, sweep_trials
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
                worker.give_back()
                raise exit_codes.Stop(exit_codes.PREEMPTED, "stopped; the same command takes trials again")
            left = config.max_trials - taken if config.max_trials else sweep.trials_per_program
            claims = worker.claim(min(sweep.trials_per_program, left))
            if claims == "done":
                return
            if claims == "wait":
                time.sleep(_WAIT_SECONDS)
                continue
            assert not isinstance(claims, str)
            taken += len(claims)
            worker.train(claims)
        worker.give_back()


class Worker:
    """Takes trials of a sweep, one after the other, or several that share a program."""

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
        self._kept: studies.Claim | None = None

    def claim(self, most: int = 1) -> list[studies.Claim] | Literal["wait", "done"]:
        """The next trial, see `study.next_trial`, with those after it that share its program.

        Args:
            most: how many at most. The first that does not share the program is kept for the next call.
        """
        claim = self._kept or self._next()
        if not isinstance(claim, studies.Claim):
            return claim
        self._kept, claims, key = None, [claim], self._program_key(claim)
        while key is not None and len(claims) < most:
            claim = self._next()
            if not isinstance(claim, studies.Claim):
                break
            if self._program_key(claim) != key:
                self._kept = claim
                break
            claims.append(claim)
        return claims

    def give_back(self) -> None:
        """Puts back a trial that was taken and not begun."""
        if self._kept is not None:
            trial, self._kept = self._kept.trial, None
            self._patiently(lambda: studies.give_back(self._study, trial))

    def train(self, claims: Sequence[studies.Claim]) -> None:
        """Trains trials and tells the study how they ended.

        Should another worker have been given one, as this one was silent for too long, it is left to that one.
        """
        jobs = [self._job(claim) for claim in claims]
        for claim, job in zip(claims, jobs, strict=True):
            said = ", ".join(f"{name}={value!r}" for name, value in claim.bindings.items())
            print(f"trial {claim.trial.number} ({job.id}): {said}", flush=True)
        if jobs[0].id in self._reused:
            runs: list[Run | None] = [self._reused[jobs[0].id]]
            outcomes = [sweep_training.Outcome("done", self._reused[jobs[0].id].loss)]
        else:
            hooks = [self._hooks(claim.trial) for claim in claims]
            try:
                outcomes = sweep_training.train_trials(
                    self._base, jobs, self._workdir, hooks, max_restarts=self._sweep.max_restarts
                )
            except import_extra("optuna").exceptions.UpdateFinishedTrialError:
                outcomes = [sweep_training.Outcome("stopped")] * len(jobs)
            runs = [sweep_trials.as_run(job, self._folder(job)) for job in jobs]
        for claim, job, run, outcome in zip(claims, jobs, runs, outcomes, strict=True):
            if run is not None:
                append_run(self._workdir / RUNS_FILE, run)
            self._end(claim.trial, outcome, run, sweep_trials.log_tail(self._folder(job)))

    def _next(self) -> studies.Claim | Literal["wait", "done"]:
        sweep, space = self._sweep, self._base.space
        return self._patiently(
            lambda: studies.next_trial(self._study, sweep.study, space, self._workdir, self._identify)
        )

    def _job(self, claim: studies.Claim) -> sweep_trials.Resolved:
        return self._resolved[claim.trial.user_attrs[studies.ID]]

    def _folder(self, job: sweep_trials.Resolved) -> Path:
        return sweep_trials.trial_folder(self._workdir, job.id)

    def _program_key(self, claim: studies.Claim) -> str | None:
        """What trials of one program agree in; None of one to train by itself, as it was begun or is there already."""
        job = self._job(claim)
        begun = bool(sweep_trials.read_trial(self._folder(job)))
        return None if begun or job.id in self._reused else sweep_trials.program_key(job)

    def _end(self, trial: Any, outcome: sweep_training.Outcome, run: Run | None, log: str) -> None:
        """Tells the study of a trial, unless it is another worker's by now."""

        def tell() -> bool:
            lost = self._study._storage.get_trial(trial._trial_id).state.is_finished()
            if not lost:
                self._tell(trial, outcome, run, log)
            return lost

        try:
            lost = self._patiently(tell)
        except import_extra("optuna").exceptions.UpdateFinishedTrialError:
            lost = True
        loss = "" if outcome.loss is None else f", loss {outcome.loss:.4f}"
        said = "given to another worker, as this one was silent for too long" if lost else f"{outcome.status}{loss}"
        print(f"trial {trial.number}: {said} {outcome.error}".rstrip(), flush=True)

    def _hooks(self, trial: Any) -> sweep_training.Hooks:
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
                if self._kept is not None:
                    kept = self._kept.trial
                    self._patiently(lambda: studies.beat(self._study, kept, {}))
                last_beat = time.monotonic()

        return sweep_training.Hooks(report, alive, self._stopping)

    def _tell(self, trial: Any, outcome: sweep_training.Outcome, run: Run | None, log: str) -> None:
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
    return dataclasses.replace(read_settings(study.user_attrs["about"]), storage=config.storage)


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
