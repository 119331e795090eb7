"""The verb `sweep`: many small trainings over a space of settings, and one page that says what to take.

This process makes the study, starts workers (`experiments/worker.py`), keeps the report fresh, and ends with the
recommendation and the bill. docs/sweep.md.
"""

import ast
import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError, config_dataclass
from cpm_jax.common.files import write_json, write_text
from cpm_jax.scaling import study as studies
from cpm_jax.scaling.extra import import_extra
from cpm_jax.scaling.runs import RUNS_FILE, merge_runs, read_runs, write_runs
from cpm_jax.scaling.space import expression, points, sample
from cpm_jax.scaling.storage import open_storage, patiently, shown, storage_url
from cpm_jax.scaling.study import StudyConfig
from experiments import sweep_report, sweep_training, sweep_trials

SETTINGS_FILE = "sweep.txt"  # within a workdir: what its workers read
WORKERS_DIR = "workers"  # within a workdir: their logs
_MOST_CHECKED = 1000  # points of a space that are resolved before anything is trained
_TICK_SECONDS = 2.0


@config_dataclass
class SweepConfig:
    """A sweep.

    Attributes:
        gin_files: of the `pretrain` run that all trials share, in order.
        bindings: its macros and bindings: {'DATA': '/data/set', 'TRAIN_STEPS': 500}.
        space: what trials set beyond these: an expression of `cpm_jax.scaling.space`, or a Python file with `SPACE`.
        study: how trials are chosen.
        group_by: binding such as 'D_MODEL': trials are compared within its values, and the best of each is reported.
        name: of the study in its database.
        storage: URL of the database: "" is SQLite in the workdir; postgresql://user@host/name.
        workers: how many to start; 0 starts none, and waits for those that are started elsewhere.
        trials_per_program: so many trials that differ in scalars only (learning rate, seed, …) a worker trains as one
            program (`cpm_jax.scaling.stacked`).
        launcher: "processes" on this machine; "slurm" through submitit; "local" and "debug" are submitit's own
            executors on this machine.
        slurm: parameters of submitit's executor: {'timeout_min': 60, 'slurm_partition': 'gpu'}.
        max_restarts: so often a worker that ended badly, or a training that asks for it, is started again.
        heartbeat_seconds: how often a worker says that it lives.
        grace_seconds: a trial whose worker has been silent for so long is given to another, from its checkpoint.
        patience_seconds: how long a database may be locked or out of reach.
        report_seconds: how often the report is written.
        reuse: other sweeps' workdirs, or runs.jsonl: trials that they have trained are not trained again.
        full_size_gin_files: files after those of the base that make a trial one of full size, for the bill.
        full_size_bindings: likewise bindings; without either the largest trial is full size.
    """

    gin_files: tuple[str, ...]
    bindings: dict[str, Any]
    space: str
    study: StudyConfig = StudyConfig()
    group_by: str = ""
    name: str = "sweep"
    storage: str = ""
    workers: NonNegativeInt = 1
    trials_per_program: PositiveInt = 1
    launcher: Literal["processes", "slurm", "local", "debug"] = "processes"
    slurm: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_restarts: NonNegativeInt = 3
    heartbeat_seconds: PositiveInt = 15
    grace_seconds: PositiveInt = 60
    patience_seconds: PositiveFloat = 60.0
    report_seconds: PositiveFloat = 20.0
    reuse: tuple[str, ...] = ()
    full_size_gin_files: tuple[str, ...] = ()
    full_size_bindings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.grace_seconds < 2 * self.heartbeat_seconds:
            raise ConfigError(
                f"SweepConfig.grace_seconds = {self.grace_seconds}: must be at least twice heartbeat_seconds = "
                f"{self.heartbeat_seconds}, or living workers lose their trials",
                field="SweepConfig.grace_seconds",
            )
        if self.trials_per_program > 1 and self.study.pruner != "none":
            raise ConfigError(
                f"SweepConfig.trials_per_program = {self.trials_per_program}: a trial that the pruner "
                f"{self.study.pruner!r} ends would go on in its program; must be 1 with a pruner",
                field="SweepConfig.trials_per_program",
            )

    def base(self) -> sweep_trials.Base:
        """What trials share, and their space."""
        return sweep_trials.make_base(self.gin_files, self.bindings, self.space)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a sweep before it is trained.

    Attributes:
        tokens: numbers of tokens of its trials, ascending.
        evaluated_at: numbers of tokens at which the trials are measured, of each kind of trial.
        full_flops: of one training at full size; 0 if that is the largest trial.
    """

    tokens: tuple[int, ...]
    evaluated_at: tuple[tuple[int, ...], ...]
    full_flops: float


def run(config: SweepConfig, workdir: Path) -> None:
    """Runs a sweep in `workdir`, or goes on with it.

    Raises:
        ConfigError: the space is empty, a binding is unknown, a sampler cannot draw from the space, trials of unequal
            tokens would have to be compared while they run, or the workdir's study has another space.
        InputError: the database cannot be used, or workers ended with trials left.
        exit_codes.Stop: it was told to stop, and so were the workers that it had started.
    """
    base = config.base()
    studies.check_space(config.study, base.space)
    plan = make_plan(config, base)
    if len(plan.tokens) > 1:
        print(
            f"trials of unequal tokens ({', '.join(f'{n:,}' for n in plan.tokens)}): only the most common is compared"
        )
    fixed = dataclasses.replace(
        config, gin_files=base.gin_files, bindings=dict(base.bindings), space=expression(base.space)
    )
    study, url = open_sweep(fixed, base, workdir, plan)
    write_text(workdir / SETTINGS_FILE, _settings_text(fixed))
    patiently(lambda: study.set_user_attr(studies.EXHAUSTED, False), url, config.patience_seconds)
    if config.study.sampler == "grid":
        patiently(
            lambda: studies.enqueue_grid(study, base.space, config.study.num_trials), url, config.patience_seconds
        )
    print(
        f"study {config.name!r} in {shown(url)}\n"
        f"a worker, anywhere that sees this folder: python -m experiments.run worker --workdir={workdir}\n"
        f"report, while it runs: {workdir / sweep_report.REPORT_FILE}",
        flush=True,
    )
    view = sweep_report.View(fixed, base, study, plan.full_flops)
    crew = _Crew(config, workdir)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _watch(config, workdir, url, view, crew)
    except KeyboardInterrupt as error:
        raise exit_codes.Stop(
            exit_codes.PREEMPTED, "stopped; trials are saved, and the same command goes on"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)
        crew.stop()
    report = view.write(workdir, finished=True)
    write_json(workdir / sweep_report.SUMMARY_FILE, view.summary())
    path = workdir / RUNS_FILE
    known = read_runs(path) if path.exists() else []  # this folder may have had a study of another name
    write_runs(path, merge_runs(view.runs(), known))
    print(f"{view.conclusion()}\nreport: {report}")


def make_plan(config: SweepConfig, base: sweep_trials.Base, most: int = _MOST_CHECKED) -> Plan:
    """Resolves the points of the space, or some of them, so that what is wrong is said before anything is trained.

    Args:
        config: of the sweep.
        base: of the sweep.
        most: points that are resolved at most.

    Raises:
        ConfigError: see `run`.
    """
    space = base.space
    if config.group_by and config.group_by not in space.names:
        raise ConfigError(
            f"SweepConfig.group_by = {config.group_by!r}: accepted is '' or what the space binds: "
            f"{', '.join(space.names)}",
            field="SweepConfig.group_by",
        )
    chosen = points(space if space.size is not None and space.size <= most else sample(space, min(most, 30)))
    resolved = [sweep_trials.resolve(base, bindings) for bindings in chosen]
    tokens = tuple(sorted({trial.tokens for trial in resolved}))
    measured = tuple(sorted({trial.evaluated_at for trial in resolved}))
    adapts = config.study.pruner != "none" or config.study.sampler in ("tpe", "cma-es")
    if adapts and len(tokens) > 1:
        who = config.study.pruner if config.study.pruner != "none" else config.study.sampler
        raise ConfigError(
            f"space: its trials have unequal tokens ({', '.join(map(str, tokens))}), which {who} would compare; "
            "bind TRAIN_STEPS together with what changes the batch, or use a grid or random sampler without a pruner",
            field="space",
        )
    if config.study.pruner != "none" and len(measured) > 1:
        raise ConfigError(
            "space: its trials are evaluated at different numbers of tokens, which the pruner "
            f"{config.study.pruner!r} would compare; bind EVAL_EVERY together with what changes the batch",
            field="space",
        )
    full_flops = 0.0
    if config.full_size_gin_files or config.full_size_bindings:
        full = sweep_trials.resolve(base, dict(config.full_size_bindings), config.full_size_gin_files)
        full_flops = float(full.tokens * full.flops_per_token)
    return Plan(tokens, measured, full_flops)


def open_sweep(
    config: SweepConfig, base: sweep_trials.Base, workdir: Path, plan: Plan | None = None
) -> tuple[Any, str]:
    """The study of a sweep and the URL of its database; makes both where they are missing.

    Raises:
        ConfigError: the study has another space.
        StorageError: the database cannot be used.
    """
    plan = plan or make_plan(config, base, 1)
    url = storage_url(config.storage, workdir)
    storage = open_storage(
        url,
        heartbeat_seconds=config.heartbeat_seconds,
        grace_seconds=config.grace_seconds,
        patience=config.patience_seconds,
    )
    most = plan.tokens[-1]
    measured = {n for numbers in plan.evaluated_at for n in numbers}
    least = min(n for n in measured if n >= config.study.min_share * most)
    study = patiently(
        lambda: studies.open_study(
            storage,
            config.name,
            config.study,
            base.space,
            min_tokens=least,
            max_tokens=most,
            shared={"gin_files": list(base.gin_files)} | {name: repr(value) for name, value in base.bindings.items()},
            # Without its address: other machines may know the database under another one, and it may hold a password.
            about=_settings_text(dataclasses.replace(config, storage="")),
        ),
        url,
        config.patience_seconds,
    )
    return study, url


def read_settings(text: str) -> SweepConfig:
    """The config that `_settings_text` wrote."""
    values = ast.literal_eval(text)
    return SweepConfig(**(values | {"study": StudyConfig(**values["study"])}))


def _settings_text(config: SweepConfig) -> str:
    """The config as a Python literal, which unlike JSON keeps tuples."""
    return repr(dataclasses.asdict(config)) + "\n"


def _watch(config: SweepConfig, workdir: Path, url: str, view: sweep_report.View, crew: "_Crew") -> None:
    """Keeps the report fresh until no trial is left.

    Raises:
        InputError: the workers that were started have ended, with trials left.
    """
    shown_at, said = 0.0, ""
    while True:
        over = patiently(view.refresh, url, config.patience_seconds)
        crew.look_after()
        if time.monotonic() - shown_at >= config.report_seconds or over:
            shown_at = time.monotonic()
            view.write(workdir, finished=False)
            if (line := view.line()) != said:
                print(line, flush=True)
                said = line
        if over and not crew.busy():
            return
        if config.workers and not crew.busy() and not over:
            over = patiently(view.refresh, url, config.patience_seconds)
            if over:
                continue
            raise InputError(
                f"all workers have ended, with trials left; the end of {crew.last_log}:\n{crew.tail()}\n"
                "The same command goes on."
            )
        time.sleep(_TICK_SECONDS)


class _Crew:
    """The workers that this process started."""

    def __init__(self, config: SweepConfig, workdir: Path):
        self._config, self._folder = config, workdir / WORKERS_DIR
        self._command = [sys.executable, "-m", "experiments.run", "worker", f"--workdir={workdir}"]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._restarts = 0
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._jobs: list[Any] = []
        self.last_log = self._folder / "worker0.txt"
        if config.launcher == "processes":
            for index in range(config.workers):
                self._start(index)
        elif config.workers:
            self._submit()

    def _start(self, index: int) -> None:
        self.last_log = self._folder / f"worker{index}.txt"
        with self.last_log.open("ab") as log:
            # Its end is told to them even where this process is killed, so that the same command does not add others.
            command = sweep_training.ends_with_this_process(self._command, signal.SIGTERM)
            self._processes[index] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def _submit(self) -> None:
        submitit = import_extra("submitit")
        executor = submitit.AutoExecutor(folder=self._folder, cluster=self._config.launcher)
        executor.update_parameters(name=self._config.name, **({"timeout_min": 60} | self._config.slurm))
        work = submitit.helpers.CommandFunction(self._command, verbose=False)
        with executor.batch():
            self._jobs = [executor.submit(work) for _ in range(self._config.workers)]
        print(
            f"{len(self._jobs)} jobs by submitit ({self._config.launcher}); their logs are in {self._folder}",
            flush=True,
        )
        if self._config.launcher == "debug":
            for job in self._jobs:
                job.result()  # this executor does the work here and now

    def look_after(self) -> None:
        """Starts workers again that ended badly."""
        for index, process in list(self._processes.items()):
            if process.poll() not in (None, 0) and self._restarts < self._config.max_restarts:
                self._restarts += 1
                self._start(index)

    def busy(self) -> bool:
        """Whether one of them is at work."""
        return any(p.poll() is None for p in self._processes.values()) or not all(job.done() for job in self._jobs)

    def tail(self) -> str:
        """The end of the log of the worker that was started last."""
        logs = [self.last_log] if self._processes else sorted(self._folder.glob("*.err"))[-1:]
        return "\n".join(log.read_text("utf-8", errors="replace")[-2000:] for log in logs if log.exists())

    def stop(self) -> None:
        """Asks those that still work to save and stop, and waits for them."""
        running = [p for p in self._processes.values() if p.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        for job in self._jobs:
            if not job.done():
                job.cancel()
