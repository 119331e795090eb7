"""Trials of a sweep: each is an ordinary `pretrain` run in a folder of its own, which the same command resumes."""

import dataclasses
import json
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpm_jax.common.config import ConfigError, config_to_dict
from cpm_jax.common.gin_utils import Settings
from cpm_jax.common.metrics import METRICS_FILE, read_metrics
from cpm_jax.data.loader import open_datasets
from cpm_jax.modeling.model_size import train_flops_per_token
from cpm_jax.scaling import stacked_program
from cpm_jax.scaling.runs import Run, run_id, summarise_run
from cpm_jax.scaling.space import Bindings, Chain, Points, Product, Range, Space, parse_space
from experiments import pretrain

TRIALS_DIR, TRIAL_FILE, LOG_FILE = "trials", "trial.json", "log.txt"
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
    except (OSError, SyntaxError) as error:
        raise ConfigError(f"SweepConfig.space = {space!r}: {error}", field="SweepConfig.space") from error
    found: Any = names.get("SPACE")
    if isinstance(found, str):
        found = parse_space(found)
    if not isinstance(found, Points | Range | Product | Chain):
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


def program_key(trial: Resolved) -> str | None:
    """What trials must agree in to share a program, see `cpm_jax.scaling.stacked`; None of one that cannot."""
    config = trial.config
    alone = config.init_from or config.loss.distillation or config.train.average_last
    if alone or config.train.profile_start is not None:
        return None
    rest: dict[str, Any] = {
        name: config_to_dict(getattr(config, name)) for name in ("mixture", "train", "loss", "checkpoint", "mesh")
    }
    rest["train"] |= {"seed": 0}
    return repr((stacked_program.program_key(as_stacked(trial.id, config)), rest, config.num_workers))


def as_stacked(name: str, config: pretrain.PretrainConfig) -> stacked_program.Trial:
    """A run as a trial of a program."""
    return stacked_program.Trial(name, config.model, config.optimizer, config.schedule, config.train.seed)


def pretrain_arguments(gin_files: Sequence[str], flags: Sequence[str], folder: Path) -> list[str]:
    """What follows `python -m experiments.run` in the command that trains a trial, and resumes it."""
    return ["pretrain", f"--workdir={folder}", *(f"--gin_file={name}" for name in gin_files), *flags]


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
    """What `train_trials` keeps about a trial; {} where there is nothing."""
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
        config=trial.bindings | {"decay_share": config.schedule.decay_share},
        error=about["status"] == "failed",
    )
    # Its last logged loss may have been finite, where the gradient was not.
    return dataclasses.replace(line, status="diverged", loss=None) if about["status"] == "diverged" else line
