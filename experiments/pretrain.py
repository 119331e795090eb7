"""The verb `pretrain`: dataset folders in, checkpoints and metrics out; the same command resumes."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import AbstractMesh, Mesh
from pydantic import NonNegativeInt

from cpm_jax.checkpoints.hf_config import without_token_ids
from cpm_jax.checkpoints.manager import CheckpointConfig, Restored, restore_params, restore_state
from cpm_jax.common.config import ConfigError, config_dataclass, config_to_dict
from cpm_jax.common.sharding import MeshConfig, data_shard, make_mesh
from cpm_jax.common.training_report import write_training_report
from cpm_jax.data.loader import Dataset, make_loader, make_validation_loader, open_datasets
from cpm_jax.data.mixture import MixtureConfig
from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import train_state_bytes
from cpm_jax.training.loop import TrainConfig, TrainData, train
from cpm_jax.training.losses import LossConfig
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import ScheduleConfig
from cpm_jax.training.train_state import TrainState, state_from_params
from cpm_jax.training.train_step import check_batch_size

TOKENIZER_DIR = "tokenizer"  # within a workdir: a copy of that of the data


@config_dataclass
class PretrainConfig:
    """A pre-training run, or a later stage of one.

    Attributes:
        model: the model.
        mixture: dataset folders and their weights.
        schedule: learning rate.
        train: steps, batch size, logging, evaluation.
        optimizer: the optimizer.
        loss: weights of the losses.
        checkpoint: when to save and what to keep.
        mesh: how devices are arranged.
        init_from: a workdir, checkpoints folder or checkpoint of another run to start from; "" starts from random
            parameters. Once this run has a checkpoint of its own, that is what it goes on from.
        init: what is taken from there. "params": the parameters; steps count from 0 and the optimizer starts anew,
            with whatever warm-up the schedule has. "state": optimizer moments and step count too, as if that run went
            on with this config; `train.steps` and the schedule then count from the other run's beginning.
        num_workers: processes that read data; 0 reads in threads of this one.
    """

    model: ModelConfig
    mixture: MixtureConfig
    schedule: ScheduleConfig
    train: TrainConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: str = ""
    init: Literal["params", "state"] = "params"
    num_workers: NonNegativeInt = 0


def run(config: PretrainConfig, workdir: Path) -> None:
    """Trains in `workdir`, or goes on there, or says that it is done.

    Raises:
        ConfigError: sizes that do not fit each other, or settings that changed since the last start.
        InputError: data or checkpoints that cannot be read.
        exit_codes.Stop: the run was told to stop, or its loss is not finite.
    """
    mesh = make_mesh(config.mesh)
    datasets = open_datasets(config.mixture)
    check_fits(config.model, config.train, datasets)
    check_divides(config.model, config.train, mesh, datasets[0].manifest.seq_len)
    if jax.process_index() == 0:
        shutil.copytree(datasets[0].tokenizer_path, workdir / TOKENIZER_DIR, dirs_exist_ok=True)
    steps = train(
        config.train,
        model=config.model,
        optimizer=config.optimizer,
        schedule=config.schedule,
        loss=config.loss,
        checkpoint=config.checkpoint,
        data=train_data(config.mixture, config.train, datasets, config.num_workers, mesh),
        mesh=mesh,
        workdir=workdir,
        fixed=fixed_settings(config, datasets),
        initial_state=starting_point(config, datasets[0].manifest.tokenizer_sha256),
    )
    if jax.process_index() == 0:
        report = write_report(config, workdir)
        done = f"trained {steps} steps" if steps else "nothing to do: this run is done"
        print(f"{done}; {config.train.steps} steps in all in {workdir}, report in {report}")


def write_report(config: PretrainConfig, workdir: Path) -> Path:
    """Writes `report.html` with the run's curves, memory and config; returns its path."""
    held = train_state_bytes(config.model)
    return write_training_report(
        workdir,
        title="Pre-training",
        config=json.dumps(config_to_dict(config), indent=2),
        memory={"parameters": held.params, "gradients": held.gradients, "optimizer": held.optimizer},
    )


def check_fits(model: ModelConfig, train: TrainConfig, datasets: Sequence[Dataset]) -> None:
    """Checks that a model can be trained on datasets.

    Raises:
        ConfigError: the tokenizer has ids that the model lacks, rows are longer than its positions, or there is
            nothing held out to evaluate on.
    """
    manifest = datasets[0].manifest  # open_datasets has checked that the others agree
    if manifest.vocab_size > model.vocab_size:
        raise ConfigError(
            f"ModelConfig.vocab_size = {model.vocab_size}: the tokenizer of {datasets[0].path} has "
            f"{manifest.vocab_size} ids; must be at least that (--gin.VOCAB_SIZE={manifest.vocab_size})",
            field="ModelConfig.vocab_size",
        )
    if manifest.seq_len > model.max_position_embeddings:
        raise ConfigError(
            f"ModelConfig.max_position_embeddings = {model.max_position_embeddings}: the rows of {datasets[0].path} "
            f"have {manifest.seq_len} tokens; must be at least that, or prepare the data with a smaller seq_len",
            field="ModelConfig.max_position_embeddings",
        )
    if train.eval_every and not any("validation" in dataset.manifest.splits for dataset in datasets):
        raise ConfigError(
            f"TrainConfig.eval_every = {train.eval_every}: {', '.join(d.path for d in datasets)} has no validation "
            "split; set it to 0, or prepare the data with a validation_fraction above 0",
            field="TrainConfig.eval_every",
        )


def check_divides(model: ModelConfig, train: TrainConfig, mesh: Mesh | AbstractMesh, seq_len: int) -> None:
    """Checks that a mesh divides the parameters and the batch of a training.

    Raises:
        ConfigError: naming what it does not divide.
    """
    decoder.abstract_params(model, mesh)
    check_batch_size(train.batch_size, seq_len, mesh, train.num_microbatches)


def train_data(
    mixture: MixtureConfig, train: TrainConfig, datasets: Sequence[Dataset], num_workers: int, mesh: Mesh
) -> TrainData:
    """The batches of this process: of the rows that its devices hold."""
    index, count = data_shard(mesh)
    place = {"process_index": index, "process_count": count, "num_workers": num_workers}
    return TrainData(
        batches=lambda step: make_loader(mixture, train.batch_size, seed=train.seed, start_step=step, **place),
        eval_batches=lambda: make_validation_loader(mixture, train.batch_size, **place),
        sources=tuple(dataset.name for dataset in datasets),
        seq_len=datasets[0].manifest.seq_len,
    )


def fixed_settings(config: PretrainConfig, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """What must be the same at each start of a run, as JSON."""
    return {
        "data": describe_data(config.mixture, datasets),
        "tokenizer_sha256": datasets[0].manifest.tokenizer_sha256,
        "optimizer": config_to_dict(config.optimizer),
        "loss": config_to_dict(config.loss),
        "train": {"batch_size": config.train.batch_size, "seed": config.train.seed},
        "init_from": config.init_from,
        "init": config.init,
    }


def describe_data(mixture: MixtureConfig, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """What decides the content of batches, as JSON: hashes instead of paths, so that folders may be moved."""

    def content(dataset: Dataset) -> str:
        shards = dataset.manifest.splits["train"].shards
        return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()

    return {
        "components": {dataset.name: content(dataset) for dataset in datasets},
        "order": [dataset.name for dataset in datasets],
        "stages": [config_to_dict(stage) for stage in mixture.stages],
    }


def starting_point(config: PretrainConfig, tokenizer_sha256: str) -> Callable[[TrainState], Restored] | None:
    """How a run without a checkpoint gets its first state; None draws parameters by the seed.

    Args:
        config: the run.
        tokenizer_sha256: of its data's tokenizer.
    """
    if not config.init_from:
        return None
    optimizer = make_optimizer(config.optimizer, config.schedule, config.model)

    def from_params(abstract: TrainState) -> Restored:
        params, meta = restore_params(config.init_from, abstract.params)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        make = jax.jit(lambda params: state_from_params(params, optimizer), out_shardings=shardings)
        return Restored(0, make(params), {"tokens_seen": 0} | kept(meta))

    def from_state(abstract: TrainState) -> Restored:
        restored = restore_state(config.init_from, abstract)
        return restored._replace(meta=restored.meta | kept(restored.meta))

    def kept(meta: Mapping[str, Any]) -> dict[str, Any]:
        """What an imported model was published with, for the export; not the type of weights that now change."""
        if not (imported := meta.get("imported")):
            return {}
        if meta["fixed"]["tokenizer_sha256"] != tokenizer_sha256:
            imported = without_token_ids(imported)
        return {"imported": {name: value for name, value in imported.items() if name != "dtype"}}

    return from_state if config.init == "state" else from_params
