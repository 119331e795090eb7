"""Trainings that have ended, one JSON object a line: what sweeps write, and laws are fitted to."""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cpm_jax.common.config import ConfigError, InputError, config_dataclass, config_from_dict, config_to_dict
from cpm_jax.common.files import write_text
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import count_params, train_flops_per_token
from cpm_jax.training.schedules import ScheduleConfig

RUNS_FILE = "runs.jsonl"

Status = Literal["done", "diverged", "failed", "stopped"]


@config_dataclass
class Run:
    """One training that has ended, well or not.

    Attributes:
        id: hash of its resolved config (`run_id`): the same training has the same id wherever it was made.
        num_params: N, the non-embedding parameters, as `modeling.model_size` counts them.
        num_embedding_params: those of the token embedding and of an untied head.
        d_model: width.
        num_layers: depth.
        tokens: D, tokens that it was trained on.
        flops: of its training, `train_flops_per_token` times `tokens`.
        batch_tokens: tokens of a batch.
        learning_rate: the peak of its schedule.
        seed: of parameters and data order.
        loss: held-out loss of the last evaluation, in nats per token; None where there is none that is finite.
        bits_per_byte: of the same text, where known.
        config: what was varied, flat, and the share of its decay: {"SEED": 1, "decay_share": 0.1}.
        seconds: of training.
        status: "done": to the end, with a finite loss. "diverged": its loss was not finite. "failed": it ended with
            an error. "stopped": it was ended before all its tokens (pruned, or out of budget).
    """

    id: str
    num_params: PositiveInt
    num_embedding_params: NonNegativeInt
    d_model: PositiveInt
    num_layers: PositiveInt
    tokens: NonNegativeInt
    flops: NonNegativeFloat
    batch_tokens: PositiveInt
    learning_rate: PositiveFloat
    seed: int
    loss: PositiveFloat | None
    bits_per_byte: PositiveFloat | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: NonNegativeFloat = 0.0
    status: Status = "done"

    def __post_init__(self) -> None:
        if self.status == "done" and (self.loss is None or not self.tokens):
            raise ConfigError(
                f"Run.loss = {self.loss!r}, Run.tokens = {self.tokens} of the run {self.id}: a run that is done has a "
                "finite held-out loss and tokens; others are 'diverged', 'failed' or 'stopped'",
                field="Run.loss",
            )


class Selection(NamedTuple):
    """Runs that a fit may use, and the others by reason.

    Attributes:
        runs: those that are done.
        left_out: reason to ids: {"diverged": ["3f2a…"]}.
    """

    runs: list[Run]
    left_out: dict[str, list[str]]


def run_id(config: Mapping[str, Any]) -> str:
    """The id of a training: 16 hex digits of the SHA-256 of its resolved config, whatever the order of its keys.

    Raises:
        ConfigError: a value is no JSON, or not finite.
    """
    try:
        text = json.dumps(config, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"run_id.config: {error}; accepted are finite JSON values", field="run_id.config") from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def summarise_run(
    metrics: Sequence[Mapping[str, Any]],
    *,
    id: str,
    model: ModelConfig,
    schedule: ScheduleConfig,
    seq_len: int,
    batch_size: int,
    steps: int,
    seed: int,
    config: Mapping[str, Any],
    error: bool = False,
) -> Run:
    """Makes the line of a training from its own files.

    Args:
        metrics: lines of its metrics.jsonl (`common.metrics.read_metrics`).
        id: of the run.
        model: its model.
        schedule: its learning rate.
        seq_len: tokens of a row.
        batch_size: rows of a batch.
        steps: that it should make.
        seed: of it.
        config: what was varied.
        error: it ended with one that is no divergence, and will not go on.
    """
    counts, batch_tokens = count_params(model), batch_size * seq_len
    step = max((row["step"] for row in metrics), default=0)
    evaluations = [row["eval/loss"] for row in metrics if row["step"] == step and "eval/loss" in row]
    trained = [row["loss"] for row in metrics if "loss" in row]
    loss = evaluations[-1] if evaluations else None
    if (evaluations and loss is None) or (trained and trained[-1] is None):
        status: Status = "diverged"
    elif error or (step >= steps and loss is None):
        status = "failed"
    else:
        status = "done" if step >= steps else "stopped"
    per_step = [row["seconds_per_step"] for row in metrics if row.get("seconds_per_step")]
    return Run(
        id=id,
        num_params=counts.non_embedding,
        num_embedding_params=counts.embedding,
        d_model=model.d_model,
        num_layers=model.num_layers,
        tokens=step * batch_tokens,
        flops=float(step * batch_tokens * train_flops_per_token(model, seq_len)),
        batch_tokens=batch_tokens,
        learning_rate=max(max(phase.end, phase.start or 0.0) for phase in schedule.phases),
        seed=seed,
        loss=loss,
        config=dict(config),
        seconds=step * float(np.median(per_step)) if per_step else 0.0,
        status=status,
    )


def read_runs(path: str | os.PathLike[str]) -> list[Run]:
    """Reads a runs.jsonl, whose lines may be of several sweeps; the last line of an id is what counts.

    A last line that a kill cut short is left out, and so are blank ones.

    Raises:
        InputError: there is no such file, or a line is no run; names the line and what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file; give the runs.jsonl of a sweep")
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a runs.jsonl: {error}") from error
    if not _is_json(lines[-1]):
        lines.pop()
    runs: dict[str, Run] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if isinstance(values.get("loss"), float) and not math.isfinite(values["loss"]):
                values["loss"] = None  # NaN is no JSON, but Python's writers give it
            run = config_from_dict(Run, values)
        except (ValueError, AttributeError, ConfigError) as error:
            raise InputError(f"{path}, line {number}: not a run: {error}") from error
        runs.pop(run.id, None)
        runs[run.id] = run
    return list(runs.values())


def append_run(path: str | os.PathLike[str], run: Run) -> None:
    """Adds a line; several processes of one machine may do so at once.

    What a killed writer left of a line is removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        last = text.rfind(b"\n") + 1
        if _is_json(text[last:]):
            file.write(b"\n")  # written by hand, without its end
        else:
            file.truncate(last)
        file.write(_line(run).encode())
        os.fsync(file.fileno())


def write_runs(path: str | os.PathLike[str], runs: Iterable[Run]) -> None:
    """Writes the whole file atomically."""
    write_text(path, "".join(map(_line, runs)))


def merge_runs(*families: Iterable[Run]) -> list[Run]:
    """All runs of several sweeps, each id once: the later one, but never one that is not done for one that is."""
    merged: dict[str, Run] = {}
    for run in (run for family in families for run in family):
        if run.id not in merged or run.status == "done" or merged[run.id].status != "done":
            merged[run.id] = run
    return list(merged.values())


def finished(runs: Iterable[Run]) -> Selection:
    """Tells the runs that are done from the others, which keep their status as the reason."""
    kept: list[Run] = []
    left_out: dict[str, list[str]] = {}
    for run in runs:
        if run.status == "done":
            kept.append(run)
        else:
            left_out.setdefault(run.status, []).append(run.id)
    return Selection(kept, left_out)


def but_seed(run: Run) -> Hashable:
    """What a run of some size shares with those that differ from it in their seed alone."""
    varied = {name: value for name, value in run.config.items() if "seed" not in name.lower() and name != "stable_run"}
    return (run.learning_rate, run.batch_tokens, run.d_model, run.num_layers, repr(sorted(varied.items())))


def check_equal_tokens(runs: Sequence[Run], what: str) -> None:
    """Checks that runs are compared at one number of tokens.

    Args:
        runs: to be compared.
        what: that compares them, for the message.

    Raises:
        InputError: they differ by more than a batch; names the run of fewest and of most tokens.
    """
    if not runs:
        return
    low, high = min(runs, key=lambda run: run.tokens), max(runs, key=lambda run: run.tokens)
    if high.tokens - low.tokens > max(low.batch_tokens, high.batch_tokens):
        raise InputError(
            f"{what} compares runs of unequal token counts: {low.id} has {low.tokens}, {high.id} has {high.tokens}; "
            "accepted are runs whose tokens differ by one batch at most"
        )


def _is_json(text: str | bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _line(run: Run) -> str:
    return json.dumps(config_to_dict(run), ensure_ascii=False, allow_nan=False) + "\n"
