"""The verb `verify`: which candidate data set makes a model better; the same command resumes.

Every candidate and seed is a cell, a folder with a training (`pretrain`'s) and an evaluation (`evaluate`'s), both of
which resume by themselves.
"""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from cpm_jax.checkpoints.manager import CheckpointConfig, find_checkpoint, find_tokenizer, read_meta
from cpm_jax.common import provenance
from cpm_jax.common.config import (
    ConfigError,
    config_dataclass,
    config_differences,
    config_from_dict,
    config_to_dict,
)
from cpm_jax.common.files import write_json
from cpm_jax.common.metrics import METRICS_FILE, read_metrics
from cpm_jax.common.sharding import MeshConfig
from cpm_jax.curation.verification import (
    BITS_PER_BYTE,
    DEFAULT,
    POINTS,
    Pair,
    Scores,
    Unit,
    anneal_mixture,
    compare_pairs,
    more_tokens,
    sentence,
    verdict,
)
from cpm_jax.data.errors import DataError
from cpm_jax.data.manifest import FILE_NAME, Manifest
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import train_flops_per_token
from cpm_jax.training.loop import TrainConfig
from cpm_jax.training.losses import LossConfig
from cpm_jax.training.optimizer import OptimizerConfig
from cpm_jax.training.schedules import DecayShape, Phase, ScheduleConfig, make_schedule
from experiments import evaluate, pretrain
from experiments.verify_report import write_verification_report

CELLS_DIR = "cells"
CANDIDATES_DIR = "candidates"
RESULTS_FILE = "results.json"
SETTINGS_FILE = "settings.json"


@config_dataclass
class VerifyConfig:
    """What to compare, and how much to spend on it.

    Attributes:
        checkpoint: a run in the stable phase of its schedule: a workdir, its checkpoints, or one of them. Model,
            optimizer, losses and batch size are its own.
        default: dataset folders of the default mix, in proportion to their sizes.
        candidates: by name, what to compare: dataset folders, or anything that `prepare` reads, which is then prepared
            with the checkpoint's tokenizer.
        tasks: what the annealed models are measured on, as in `evaluate`: held-out dataset folders and texts, or tasks
            with right answers; not both kinds.
        decay_steps: steps of an annealing: the budget.
        share: of the candidate in the annealing's mixture.
        num_seeds: annealings of each candidate, each with another order of the data. A later run may ask for more.
        decay_shape: how the learning rate falls.
        final_lr_ratio: the last learning rate as a fraction of the checkpoint's.
        limit: items of each task at most; 0 is all.
        batch_size: requests that an evaluation reads together.
        text_field: field of the text in candidates' records.
        num_workers: processes that prepare candidates; None for one per core, 0 for none but this one.
        checkpoint_every: steps between an annealing's checkpoints: what a kill costs at most.
        mesh: how devices are arranged.
    """

    checkpoint: str
    default: str | tuple[str, ...] | list[str]
    candidates: dict[str, str]
    tasks: str | tuple[str, ...] | list[str]
    decay_steps: PositiveInt
    share: Annotated[float, Field(gt=0, lt=1)] = 0.3
    num_seeds: PositiveInt = 3
    decay_shape: DecayShape = "exponential"
    final_lr_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.1
    limit: NonNegativeInt = 0
    batch_size: PositiveInt = 32
    text_field: str = "text"
    num_workers: NonNegativeInt | None = None
    checkpoint_every: PositiveInt = 1000
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ConfigError("VerifyConfig.candidates = {}: give at least one", "VerifyConfig.candidates")
        for name in self.candidates:
            if name == DEFAULT or not name or not name.replace("_", "").replace("-", "").isalnum():
                raise ConfigError(
                    f"VerifyConfig.candidates has the name {name!r}: accepted are letters, digits, - and _ (it becomes "
                    f"a folder's name), but not {DEFAULT!r}, which is the default mix",
                    field="VerifyConfig.candidates",
                )

    @property
    def default_paths(self) -> tuple[str, ...]:
        """`default`, also when it is one."""
        return (self.default,) if isinstance(self.default, str) else tuple(self.default)


class Start(NamedTuple):
    """Where all annealings start.

    Attributes:
        path: the checkpoint.
        meta: its metadata.
        learning_rate: at its step.
    """

    path: Path
    meta: dict[str, Any]
    learning_rate: float


def run(config: VerifyConfig, workdir: Path) -> dict[str, Any]:
    """Trains and evaluates the cells that `workdir` lacks, compares, writes results.json and report.html.

    Raises:
        ConfigError: the checkpoint is not in its stable phase, a data set has another tokenizer, or the workdir holds
            cells of another budget or start.
        InputError: the checkpoint, a data set or a task cannot be used.
        exit_codes.Stop: it was told to stop; the same command goes on.
    """
    start = check(config)
    settings = _settings(workdir, config, start)
    folders = {DEFAULT: ""} | prepare_candidates(config, start, workdir)
    write_json(workdir / SETTINGS_FILE, settings)  # not before: a candidate that cannot be used has claimed no name
    for seed in range(1, config.num_seeds + 1):  # seed by seed, so that there is something to compare early
        for name, folder in folders.items():
            run_cell(config, start, folder, seed, cell_folder(workdir, name, seed))
    scores = read_scores(workdir, list(folders), config.num_seeds)
    results = summarise(config, start, folders, scores, workdir)
    write_json(workdir / RESULTS_FILE, results)
    report = write_verification_report(workdir, results)
    print(f"{results['verdict']}\nreport: {report}")
    return results


def check(config: VerifyConfig) -> Start:
    """Finds where the annealings start, and says before anything is trained which tasks cannot be measured on.

    Raises:
        ConfigError: the checkpoint is not in its stable phase, or the tasks are of both kinds, or of neither.
        InputError: there is no such checkpoint or task.
    """
    from cpm_jax.evaluation.tasks import TaskOptions, make_tasks

    tasks = make_tasks(_tuple(config.tasks), TaskOptions(0, config.limit))
    for task in tasks:
        if task.main_metric != "bits_per_byte" and not task.higher_is_better(task.main_metric):
            raise ConfigError(
                f"VerifyConfig.tasks has {task.name!r}, whose figure is {task.main_metric!r}: accepted are bits per "
                "byte of texts, or shares of right answers",
                field="VerifyConfig.tasks",
            )
    _unit({task.name: task.main_metric for task in tasks})
    return find_start(config.checkpoint)


def _unit(metrics: Mapping[str, str]) -> Unit:
    """The unit of tasks, by the metric of each.

    Raises:
        ConfigError: tasks of both kinds, whose figures have no common mean.
    """
    in_bits = {metric == "bits_per_byte" for metric in metrics.values()}
    if len(in_bits) > 1:
        raise ConfigError(
            f"VerifyConfig.tasks = {list(metrics)}: bits per byte and right answers have no common mean; verify with "
            "one kind at a time",
            field="VerifyConfig.tasks",
        )
    return BITS_PER_BYTE if in_bits == {True} else POINTS


def find_start(checkpoint: str) -> Start:
    """Finds the checkpoint and checks that its learning rate has not begun to fall.

    Raises:
        ConfigError: it has, or is not yet at its peak.
        CheckpointError: there is no such checkpoint.
    """
    path = find_checkpoint(checkpoint)
    meta = read_meta(path)
    schedule = config_from_dict(ScheduleConfig, meta["schedule"])
    rate = float(make_schedule(schedule)(meta["step"]))
    peak = max(max(phase.end, phase.start or 0.0) for phase in schedule.phases)
    if rate < 0.99 * peak:
        raise ConfigError(
            f"VerifyConfig.checkpoint = {checkpoint!r}: at step {meta['step']} its learning rate is {rate:.3g}, not "
            f"the {peak:.3g} of its stable phase; give a checkpoint between warm-up and decay",
            field="VerifyConfig.checkpoint",
        )
    return Start(path, meta, rate)


def prepare_candidates(config: VerifyConfig, start: Start, workdir: Path) -> dict[str, str]:
    """The dataset folder of each candidate; those that are none yet are prepared with the checkpoint's tokenizer.

    Raises:
        ConfigError: a dataset folder does not fit the default mix.
        DataError: a candidate does not exist, or nothing of it can be used.
    """
    tokenizer = find_tokenizer(start.path)
    default = Manifest.load(config.default_paths[0])
    folders = {name: source for name, source in config.candidates.items() if (Path(source) / FILE_NAME).exists()}
    for name, source in folders.items():
        found = Manifest.load(source)
        if (found.tokenizer_sha256, found.seq_len) != (default.tokenizer_sha256, default.seq_len):
            raise ConfigError(
                f"VerifyConfig.candidates: {name} ({source}) was prepared with another tokenizer than the checkpoint's "
                f"or another seq_len ({found.seq_len}) than the default mix; prepare it with {tokenizer} and seq_len "
                f"{default.seq_len}, or give its texts",
                field="VerifyConfig.candidates",
            )
    for name, source in config.candidates.items():
        if name in folders:
            continue
        folders[name] = str(workdir / CANDIDATES_DIR / name)
        settings = PrepareConfig(
            sources=source,
            seq_len=default.seq_len,
            tokenizer=str(tokenizer),
            text_field=config.text_field,
            validation_fraction=0.0,
            num_workers=config.num_workers,
        )
        try:
            prepare(settings, folders[name])
        except DataError as error:
            raise DataError(f"candidate {name}: {error}") from error
    return {name: folders[name] for name in config.candidates}


def cell_folder(workdir: Path, candidate: str, seed: int) -> Path:
    """Where a cell lies."""
    return workdir / CELLS_DIR / candidate / f"seed{seed}"


def run_cell(config: VerifyConfig, start: Start, candidate: str, seed: int, folder: Path) -> None:
    """Anneals and evaluates one candidate with one seed, as far as that is not done.

    Args:
        config: of the verification.
        start: where it starts.
        candidate: dataset folder; "" is the default mix alone.
        seed: of the order of the data.
        folder: of the cell.
    """
    tasks = _tuple(config.tasks)
    if (folder / "evaluation" / evaluate_results_file()).exists():
        return
    pretrain.run(annealing(config, start, candidate, seed), folder / "train")
    evaluate.run(
        evaluate.EvaluateConfig(
            checkpoint=str(folder / "train"), tasks=tasks, limit=config.limit, batch_size=config.batch_size
        ),
        folder / "evaluation",
    )


def evaluate_results_file() -> str:
    """The file that an evaluation writes last."""
    from cpm_jax.evaluation.results import RESULTS_FILE

    return RESULTS_FILE


def annealing(config: VerifyConfig, start: Start, candidate: str, seed: int) -> pretrain.PretrainConfig:
    """The training of a cell: the checkpoint's own run, gone on with on another mixture while its rate decays."""
    meta, step = start.meta, start.meta["step"]
    records = [Manifest.load(path).splits["train"].records for path in config.default_paths]
    return pretrain.PretrainConfig(
        model=config_from_dict(ModelConfig, meta["model"]),
        mixture=anneal_mixture(config.default_paths, records, candidate, config.share),
        schedule=ScheduleConfig(
            phases=(
                Phase(
                    steps=config.decay_steps,
                    start=start.learning_rate,
                    end=start.learning_rate * config.final_lr_ratio,
                    shape=config.decay_shape,
                ),
            ),
            first_step=step,
        ),
        train=TrainConfig(
            steps=step + config.decay_steps, batch_size=meta["fixed"]["train"]["batch_size"], seed=seed, log_every=10
        ),
        optimizer=config_from_dict(OptimizerConfig, meta["fixed"]["optimizer"]),
        loss=config_from_dict(LossConfig, meta["fixed"]["loss"]),
        checkpoint=CheckpointConfig(every=config.checkpoint_every, keep_last=2),
        mesh=config.mesh,
        init_from=str(start.path),
        init="state",
    )


def read_scores(workdir: Path, candidates: Sequence[str], num_seeds: int) -> Scores:
    """The items of all cells, as arrays."""
    from cpm_jax.evaluation.results import items_path, read_items

    about = _evaluation(workdir, candidates[0], 1)["tasks"]
    weights: dict[str, np.ndarray] = {}
    values: dict[str, dict[str, np.ndarray]] = {name: {} for name in candidates}
    for task, summary in about.items():
        for candidate in candidates:
            rows = []
            for seed in range(1, num_seeds + 1):
                items = read_items(items_path(cell_folder(workdir, candidate, seed) / "evaluation", task))
                chosen = [items[index].metrics[summary["main_metric"]] for index in sorted(items)][: summary["items"]]
                rows.append([measured.value for measured in chosen])
                weights[task] = np.array([measured.weight for measured in chosen], np.float64)
            values[candidate][task] = np.array(rows, np.float64)
    return Scores(_unit({name: task["main_metric"] for name, task in about.items()}), weights, values)


def summarise(
    config: VerifyConfig, start: Start, folders: Mapping[str, str], scores: Scores, workdir: Path
) -> dict[str, Any]:
    """What results.json holds."""
    meta = start.meta
    tokens = config.decay_steps * meta["tokens_per_step"]
    passes = {name: _passes(folder, config.share * tokens) for name, folder in folders.items() if folder}
    pairs = compare_pairs(scores)
    return {
        "verdict": verdict(scores, pairs, tokens, passes),
        "unit": dataclasses.asdict(scores.unit),
        "ranking": scores.ranking(),
        "scores": {
            name: {"mean": scores.figure(name), "tasks": {task: scores.figure(name, task) for task in scores.weights}}
            for name in scores.ranking()
        },
        "pairs": [_pair(pair, scores, tokens) for pair in pairs],
        "items": {task: len(weights) for task, weights in scores.weights.items()},
        "candidates": {name: _contents(folder) for name, folder in folders.items() if folder},
        "passes": passes,
        "cost": _cost(config, start, list(folders), workdir),
        "config": config_to_dict(config),
        "checkpoint": {"path": str(start.path), "step": meta["step"], "tokens_seen": meta["tokens_seen"]},
        "learning_rate": start.learning_rate,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_revision": provenance.git_revision(),
        "versions": provenance.versions(),
        "machine": provenance.machine(),
    }


def _pair(pair: Pair, scores: Scores, tokens: int) -> dict[str, Any]:
    return {
        "first": pair.first,
        "second": pair.second,
        **dataclasses.asdict(pair.difference),
        "interval": list(pair.difference.interval),
        "adjusted_p_value": pair.adjusted_p_value,
        "significant": pair.significant,
        "more_tokens": more_tokens(pair, tokens),
        "sentence": sentence(pair, scores.unit, tokens),
    }


def _cost(config: VerifyConfig, start: Start, candidates: Sequence[str], workdir: Path) -> dict[str, Any]:
    """Tokens, FLOPs and training seconds of all cells, beside those of training each candidate from the beginning."""
    model, meta = config_from_dict(ModelConfig, start.meta["model"]), start.meta
    seq_len = Manifest.load(config.default_paths[0]).seq_len
    per_cell = config.decay_steps * meta["tokens_per_step"]
    cells = len(candidates) * config.num_seeds
    per_token = train_flops_per_token(model, seq_len)
    seconds = 0.0
    for candidate in candidates:
        for seed in range(1, config.num_seeds + 1):
            lines = read_metrics(cell_folder(workdir, candidate, seed) / "train" / METRICS_FILE)
            steps = [line["seconds_per_step"] for line in lines if line.get("seconds_per_step")]
            seconds += config.decay_steps * float(np.median(steps)) if steps else 0.0
    return {
        "cells": cells,
        "tokens_per_cell": per_cell,
        "tokens": cells * per_cell,
        "flops": cells * per_cell * per_token,
        "train_seconds": seconds,
        "from_scratch_ratio": (meta["tokens_seen"] + per_cell) / per_cell,
    }


def _passes(folder: str, tokens: float) -> float:
    return tokens / max(1, Manifest.load(folder).splits["train"].tokens)


def _contents(folder: str) -> dict[str, Any]:
    """What a candidate's annealings could read, and what of its sources was set aside, counted by reason."""
    manifest = Manifest.load(folder)
    train = manifest.splits["train"]
    return {
        "documents": train.documents,
        "tokens": train.tokens,
        "duplicates": manifest.duplicates,
        "set_aside": manifest.rejects,
    }


def _evaluation(workdir: Path, candidate: str, seed: int) -> dict[str, Any]:
    path = cell_folder(workdir, candidate, seed) / "evaluation" / evaluate_results_file()
    return json.loads(path.read_text("utf-8"))


def _settings(workdir: Path, config: VerifyConfig, start: Start) -> dict[str, Any]:
    """What the workdir is taken for: this start and budget, and all candidates that it had or gets.

    Raises:
        ConfigError: it was taken for others, or the default mix has another tokenizer.
    """
    tokenizer = find_tokenizer(start.path)
    sha256 = Tokenizer.load(tokenizer).sha256
    if others := [path for path in config.default_paths if Manifest.load(path).tokenizer_sha256 != sha256]:
        raise ConfigError(
            f"VerifyConfig.default: {others[0]} was prepared with another tokenizer than the checkpoint's; prepare it "
            f"with {tokenizer}",
            field="VerifyConfig.default",
        )
    free = ("num_seeds", "batch_size", "num_workers", "checkpoint_every", "mesh", "checkpoint")
    settings = {name: value for name, value in config_to_dict(config).items() if name not in free}
    settings["start"] = {name: start.meta[name] for name in ("step", "tokens_seen", "config_sha256")}
    path = workdir / SETTINGS_FILE
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        # Candidates may be added, or left out for now; those that have cells must be what they were.
        settings["candidates"] = before["candidates"] | settings["candidates"]
        before["candidates"] = settings["candidates"] | before["candidates"]
        if changed := config_differences(before, settings):
            said = "; ".join(f"{name}: {was!r} at the last start, now {now!r}" for name, (was, now) in changed.items())
            raise ConfigError(f"{workdir} holds cells of another verification: {said}; take another --workdir")
    return settings


def _tuple(names: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
