"""Trials of a sweep: each is an ordinary `pretrain` run in a folder of its own, which the same command resumes."""

import contextlib
import dataclasses
import fcntl
import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, config_to_dict
from cpm_jax.common.files import write_json
from cpm_jax.common.gin_utils import Settings
from cpm_jax.common.metrics import METRICS_FILE, read_metrics
from cpm_jax.data.loader import open_datasets
from cpm_jax.modeling.model_size import train_flops_per_token
from cpm_jax.scaling.extra import import_extra
from cpm_jax.scaling.runs import Run, run_id, summarise_run
from cpm_jax.scaling.space import Bindings, Points, Range, Space, parse_space
from experiments import pretrain

TRIALS_DIR, TRIAL_FILE, LOG_FILE, LOCK_FILE = "trials", "trial.json", "log.txt", "lock"
_POLL_SECONDS = 0.5
_SAVE_SECONDS = 60.0  # a training that is told to stop takes that long at most
_WRITE_SECONDS = 5.0  # what a kill loses of a trial's bill
# They decide what is shown, kept or laid out where, not what is trained and measured.
_FREE_TRAIN_FIELDS = (
    "log_every",
    "eval_every",
    "watchdog_seconds",
    "watchdog_compile_seconds",
    "profile_start",
    "profile_steps",
    "average_last",
    "compilation_cache_dir",
)
_FREE_MODEL_FIELDS = ("remat", "scan_layers")


@dataclasses.dataclass(frozen=True)
class Base:
    """What all trials share.

    Attributes:
        gin_files: of `pretrain`, in order.
        bindings: macros and bindings.
        space: what trials set beyond these.
    """

    gin_files: tuple[str, ...]
    bindings: Mapping[str, Any]
    space: Space


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A trial with everything decided.

    Attributes:
        id: hash of what is trained: the same however it was spelled, and wherever its data lies.
        bindings: what the trial sets.
        flags: of its command.
        config: of its run.
        seq_len: tokens of a row.
        flops_per_token: of its training.
    """

    id: str
    bindings: Bindings
    flags: tuple[str, ...]
    config: pretrain.PretrainConfig
    seq_len: int
    flops_per_token: int

    @property
    def batch_tokens(self) -> int:
        """Tokens of a step."""
        return self.config.train.batch_size * self.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of the whole training."""
        return self.config.train.steps * self.batch_tokens

    @property
    def evaluated_at(self) -> tuple[int, ...]:
        """Numbers of tokens at which the held-out loss is measured."""
        train = self.config.train
        steps = sorted({*range(train.eval_every, train.steps + 1, train.eval_every), train.steps})
        return tuple(step * self.batch_tokens for step in steps)


def make_base(gin_files: tuple[str, ...], bindings: Mapping[str, Any], space: str) -> Base:
    """Reads a space: an expression, or a Python file that has `SPACE`, and may have `GIN_FILES` and `BINDINGS`.

    Raises:
        ConfigError: it is neither, or empty.
    """
    if not space.strip().endswith(".py"):
        return Base(gin_files, bindings, parse_space(space))
    try:
        names = runpy.run_path(space.strip())
    except OSError as error:
        raise ConfigError(f"SweepConfig.space = {space!r}: {error.strerror}", field="SweepConfig.space") from error
    found: Any = names.get("SPACE")
    if isinstance(found, str):
        found = parse_space(found)
    if not isinstance(found, Points | Range) and not hasattr(found, "parts"):
        raise ConfigError(f"{space}: SPACE = {found!r}: accepted is a space of cpm_jax.scaling.space", field="space")
    return Base(tuple(names.get("GIN_FILES", gin_files)), dict(bindings) | names.get("BINDINGS", {}), found)


def resolve(base: Base, bindings: Bindings, gin_files: tuple[str, ...] = ()) -> Resolved:
    """Decides everything of a trial.

    Args:
        base: of the sweep.
        bindings: of the trial; they win over those of the base.
        gin_files: that come after those of the base.

    Raises:
        ConfigError: a binding that no gin file knows, or values that do not go together.
        InputError: its data cannot be read.
    """
    flags = tuple(f"--gin.{name}={value!r}" for name, value in (dict(base.bindings) | bindings).items())
    config = Settings([*base.gin_files, *gin_files], flags, pretrain.PretrainConfig).build()
    if not config.train.eval_every:
        raise ConfigError(
            "TrainConfig.eval_every = 0: trials are compared by their held-out loss; must be above 0",
            field="TrainConfig.eval_every",
        )
    datasets = open_datasets(config.mixture)
    pretrain.check_fits(config.model, config.train, datasets)
    manifest = datasets[0].manifest
    whole = config_to_dict(config)
    what = {name: whole[name] for name in ("schedule", "optimizer", "loss", "init_from", "init")}
    what["model"] = {name: value for name, value in whole["model"].items() if name not in _FREE_MODEL_FIELDS}
    what["train"] = {name: value for name, value in whole["train"].items() if name not in _FREE_TRAIN_FIELDS}
    what["data"] = pretrain.describe_data(config.mixture, datasets)
    what["tokenizer_sha256"] = manifest.tokenizer_sha256
    return Resolved(
        id=run_id(what),
        bindings=bindings,
        flags=flags,
        config=config,
        seq_len=manifest.seq_len,
        flops_per_token=train_flops_per_token(config.model, manifest.seq_len),
    )


def trial_folder(workdir: Path, id: str) -> Path:
    """Where a trial lies."""
    return workdir / TRIALS_DIR / id


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What `train_trial` calls while it trains.

    Attributes:
        report: once with tokens and loss of each evaluation; True ends the trial, which keeps its checkpoint.
        alive: all the time, with `Outcome.progress` so far.
        stopping: whether to save and stop.
    """

    report: Callable[[int, float], bool]
    alive: Callable[[Mapping[str, float]], None]
    stopping: Callable[[], bool]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train_trial` ended.

    Attributes:
        status: "stopped": this process was told to stop; the trial is saved.
        loss: held-out, at the end of a trial that is done.
        error: one line, of a trial that failed.
        progress: "tokens" so far; "seconds" of wall and "cpu_seconds" of processor time over all attempts.
    """

    status: Literal["done", "pruned", "diverged", "failed", "stopped"]
    loss: float | None = None
    error: str = ""
    progress: Mapping[str, float] = dataclasses.field(default_factory=dict)


def train_trial(base: Base, trial: Resolved, workdir: Path, hooks: Hooks, max_restarts: int = 3) -> Outcome:
    """Trains a trial to its end, from its checkpoint where there is one, in a process of its own.

    Only one process at a time trains in a trial's folder: its lock is held as long as this one or its child lives.

    Args:
        base: of the sweep.
        trial: the trial.
        workdir: of the sweep.
        hooks: what is called meanwhile.
        max_restarts: so often a training that asks for it (stuck, another process lost) is started again.
    """
    folder = trial_folder(workdir, trial.id)
    with _claimed(folder, hooks) as lock:
        if lock is None:
            return Outcome("stopped")
        attempts = read_trial(folder).get("attempts", [])
        outcome = None
        for _ in range(max_restarts + 1):
            outcome = _attempt(base, trial, folder, lock, attempts, hooks)
            if outcome is not None:
                break
        outcome = outcome or Outcome("failed", error=f"it asked to be started again {max_restarts} times")
        _write_trial(folder, trial, attempts, outcome.status, outcome.error)
        return dataclasses.replace(outcome, progress={"tokens": tokens_so_far(trial, folder)} | _spent(attempts))


def _attempt(
    base: Base, trial: Resolved, folder: Path, lock: Any, attempts: list[dict[str, float]], hooks: Hooks
) -> Outcome | None:
    """One start of the training, which is added to the attempts; None if it has to be started again."""
    psutil = import_extra("psutil")
    attempts.append(attempt := {"seconds": 0.0, "cpu_seconds": 0.0})
    begin = written = time.monotonic()
    _write_trial(folder, trial, attempts)
    ending: Literal["pruned", "stopped"] | None = None
    reported: set[int] = set()
    metrics = folder / METRICS_FILE
    command = [sys.executable, "-m", "experiments.run", *arguments(base, trial, folder)]
    with (folder / LOG_FILE).open("ab") as log:
        process = subprocess.Popen(
            ends_with_this_process(command, signal.SIGKILL),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=(lock.fileno(),),
            start_new_session=True,  # a Ctrl-C reaches this process, which passes it on when it has said so
        )
    try:
        size, tokens, code = -1, 0, None
        while code is None:
            code = process.poll()
            with contextlib.suppress(psutil.Error):
                times = psutil.Process(process.pid).cpu_times()
                attempt["cpu_seconds"] = times.user + times.system
            attempt["seconds"] = time.monotonic() - begin
            if metrics.exists() and metrics.stat().st_size != size:
                size, tokens = metrics.stat().st_size, tokens_so_far(trial, folder)
                if _report_new(trial, folder, hooks.report, reported) and ending is None:
                    ending = "pruned"
                    process.terminate()
            hooks.alive({"tokens": tokens} | _spent(attempts))
            if ending is None and hooks.stopping():
                ending = "stopped"
                process.terminate()
            if time.monotonic() - written >= _WRITE_SECONDS:
                written = time.monotonic()
                _write_trial(folder, trial, attempts)
            if code is None:
                time.sleep(_POLL_SECONDS)
    finally:
        if process.poll() is None:  # this process can no longer look after it: the database is gone, say
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SAVE_SECONDS)
            process.kill()
            process.wait()
    if code == exit_codes.OK:
        loss = final_loss(trial, folder)
        if loss is not None:
            return Outcome("done", loss)
        if trial.tokens not in dict(evaluations(trial, folder)):
            return Outcome("failed", error="it ended without a held-out loss")
    if code in (exit_codes.OK, exit_codes.NON_FINITE):
        return Outcome("diverged", error="its loss is not finite")
    if ending is not None:
        return Outcome(ending)
    if code in (exit_codes.PREEMPTED, exit_codes.STUCK, exit_codes.PROCESS_LOST):
        return None
    return Outcome("failed", error=f"exit code {code}: {log_tail(folder, 1)}")


def ends_with_this_process(command: list[str], signal_number: int) -> list[str]:
    """A command that Linux sends a signal to when this process dies, even by SIGKILL."""
    setpriv = shutil.which("setpriv")  # of util-linux; setting it between fork and exec is not safe beside threads
    return [setpriv, f"--pdeathsig={signal.Signals(signal_number).name[3:]}", "--", *command] if setpriv else command


def _spent(attempts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(attempt[name] for attempt in attempts) for name in ("seconds", "cpu_seconds")}


def _write_trial(
    folder: Path, trial: Resolved, attempts: Sequence[Mapping[str, float]], status: str = "running", error: str = ""
) -> None:
    about = {"bindings": repr(trial.bindings), "status": status, "error": error, "attempts": attempts}
    write_json(folder / TRIAL_FILE, about)


def arguments(base: Base, trial: Resolved, folder: Path) -> list[str]:
    """What follows `python -m experiments.run` in the command that trains a trial, and resumes it."""
    files = [f"--gin_file={name}" for name in base.gin_files]
    return ["pretrain", f"--workdir={folder}", *files, *trial.flags]


def evaluations(trial: Resolved, folder: Path) -> list[tuple[int, float | None]]:
    """Tokens and held-out loss of each evaluation so far; None where it was not finite."""
    rows = read_metrics(folder / METRICS_FILE)
    return [(row["step"] * trial.batch_tokens, row["eval/loss"]) for row in rows if "eval/loss" in row]


def final_loss(trial: Resolved, folder: Path) -> float | None:
    """Held-out loss at the end; None before that."""
    return dict(evaluations(trial, folder)).get(trial.tokens)


def tokens_so_far(trial: Resolved, folder: Path) -> int:
    """Tokens of the last step that was logged."""
    return max((row["step"] for row in read_metrics(folder / METRICS_FILE)), default=0) * trial.batch_tokens


def read_trial(folder: Path) -> dict[str, Any]:
    """What train_trial keeps about a trial; {} where there is nothing."""
    try:
        return json.loads((folder / TRIAL_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def log_tail(folder: Path, lines: int = 20) -> str:
    """The last lines of a trial's log."""
    try:
        text = (folder / LOG_FILE).read_text("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def as_run(trial: Resolved, folder: Path) -> Run | None:
    """The line of runs.jsonl of a trial that has ended, from its own files; None of one that has not."""
    about = read_trial(folder)
    if about.get("status") not in ("done", "pruned", "diverged", "failed"):
        return None
    config = trial.config
    line = summarise_run(
        read_metrics(folder / METRICS_FILE),
        id=trial.id,
        model=config.model,
        schedule=config.schedule,
        seq_len=trial.seq_len,
        batch_size=config.train.batch_size,
        steps=config.train.steps,
        seed=config.train.seed,
        config=trial.bindings,
        error=about["status"] == "failed",
    )
    # Its last logged loss may have been finite, where the gradient was not.
    return dataclasses.replace(line, status="diverged", loss=None) if about["status"] == "diverged" else line


def _report_new(trial: Resolved, folder: Path, report: Callable[[int, float], bool], reported: set[int]) -> bool:
    ends = False
    for tokens, loss in evaluations(trial, folder):
        if tokens not in reported and loss is not None:
            reported.add(tokens)
            ends = (report(tokens, loss) and tokens < trial.tokens) or ends
    return ends


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
