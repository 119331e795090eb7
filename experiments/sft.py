"""The verb `sft`: conversations and a checkpoint in, a model that answers out; the loss is on assistant turns only.

It prepares the conversations with the checkpoint's tokenizer, and then is a pre-training job that starts from the
checkpoint's parameters: there is one training loop.
"""

from pathlib import Path
from typing import Literal

import jax
from jax.experimental import multihost_utils
from pydantic import NonNegativeInt, PositiveInt

from cpm_jax.checkpoints.manager import CheckpointConfig, find_checkpoint, find_tokenizer, read_meta
from cpm_jax.common.config import ConfigError, InputError, config_dataclass, config_from_dict
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.data.encoding import LongConversations
from cpm_jax.data.manifest import FILE_NAME as MANIFEST
from cpm_jax.data.manifest import Manifest
from cpm_jax.data.mixture import MixtureConfig, from_folders
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.loop import TrainConfig
from cpm_jax.training.losses import LossConfig
from cpm_jax.training.optimizer import OptimizerConfig
from cpm_jax.training.schedules import ScheduleConfig
from experiments import pretrain

DATA_DIR = "data"  # within a workdir: what raw conversations were prepared into


@config_dataclass
class SftConfig:
    """A supervised fine-tuning run.

    Attributes:
        init_from: a workdir, checkpoints folder or checkpoint to start from; its model and tokenizer are taken.
        data: conversations, in anything that `prepare` reads (records with `messages`), which are prepared into the
            workdir; or dataset folders that were prepared with format "chat" and the same tokenizer.
        schedule: learning rate.
        train: steps, batch size, logging, evaluation.
        seq_len: tokens per row that conversations are packed into; of dataset folders their own counts.
        validation_fraction: share of the conversations held out when they are prepared.
        long_conversations: what to do with a conversation that is longer than a row.
        optimizer: the optimizer.
        loss: weights of the losses.
        checkpoint: when to save and what to keep.
        mesh: how devices are arranged.
        remat: what the backward pass recomputes; None as in the run of the checkpoint.
        num_workers: processes that read data; 0 reads in threads of this one.
    """

    init_from: str
    data: str | tuple[str, ...] | list[str]
    schedule: ScheduleConfig
    train: TrainConfig
    seq_len: PositiveInt = 4096
    validation_fraction: float = 0.01
    long_conversations: LongConversations = "reject"
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    remat: Literal["none", "dots", "full"] | None = None
    num_workers: NonNegativeInt = 0

    @property
    def paths(self) -> tuple[str, ...]:
        """`data`, also when it is one."""
        return (self.data,) if isinstance(self.data, str) else tuple(self.data)


def run(config: SftConfig, workdir: Path) -> None:
    """Prepares the conversations where they are not yet, and trains on them; goes on with what an earlier call began.

    Raises:
        ConfigError: sizes that do not fit each other, or settings that changed since the last start.
        InputError: conversations, checkpoint or tokenizer that cannot be read or do not fit each other.
        exit_codes.Stop: the run was told to stop, or its loss is not finite.
    """
    model, tokenizer = starting_model(config)
    pretrain.check_divides(model, config.train, make_mesh(config.mesh), config.seq_len)
    if (preparation := preparation_of(config, tokenizer)) and jax.process_index() == 0:
        prepare(preparation, workdir / DATA_DIR)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("conversations prepared")
    pretrain.run(as_pretraining(config, model, mixture_of(config, tokenizer, workdir)), workdir)


def starting_model(config: SftConfig) -> tuple[ModelConfig, Path]:
    """The model of the checkpoint to start from, and the folder of its tokenizer.

    Raises:
        CheckpointError: there is no checkpoint, none that is whole, or no tokenizer with it.
        InputError: the tokenizer does not fit the model.
        ConfigError: rows are longer than the model's positions.
    """
    checkpoint = find_checkpoint(config.init_from)
    meta, folder = read_meta(checkpoint), find_tokenizer(checkpoint)
    model = config_from_dict(ModelConfig, meta["model"] | ({"remat": config.remat} if config.remat else {}))
    tokenizer = Tokenizer.load(folder)
    trained_with = meta.get("fixed", {}).get("tokenizer_sha256", tokenizer.sha256)
    if trained_with != tokenizer.sha256 or tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"the tokenizer in {folder} ({tokenizer.vocab_size:,} ids, sha256 {tokenizer.sha256[:12]}…) is not the one "
            f"that the model of {checkpoint} was trained with ({model.vocab_size:,} ids, sha256 {trained_with[:12]}…)"
        )
    if config.seq_len > model.max_position_embeddings:
        raise ConfigError(
            f"SftConfig.seq_len = {config.seq_len}: must be at most {model.max_position_embeddings}, the positions "
            f"of the model in {checkpoint}",
            field="SftConfig.seq_len",
        )
    return model, folder


def preparation_of(config: SftConfig, tokenizer: Path) -> PrepareConfig | None:
    """How the conversations are to be prepared; None where dataset folders are given.

    Raises:
        InputError: some are dataset folders and some are not.
    """
    prepared = [path for path in config.paths if (Path(path) / MANIFEST).exists()]
    if prepared and len(prepared) < len(config.paths):
        raise InputError(
            f"{', '.join(prepared)}: prepared already, and the rest of {config.data} is not; give dataset folders or "
            "conversations, not both"
        )
    if prepared:
        return None
    return PrepareConfig(
        sources=config.paths,
        seq_len=config.seq_len,
        tokenizer=str(tokenizer),
        format="chat",
        validation_fraction=config.validation_fraction,
        long_conversations=config.long_conversations,
        seed=config.train.seed,
    )


def mixture_of(config: SftConfig, tokenizer: Path, workdir: Path) -> MixtureConfig:
    """The dataset folders to train on.

    Raises:
        InputError: one was prepared from texts, or with another tokenizer than the checkpoint's.
    """
    if preparation_of(config, tokenizer):
        return from_folders(str(workdir / DATA_DIR))
    ours = Tokenizer.load(tokenizer).sha256
    for path in config.paths:
        manifest = Manifest.load(path)
        if manifest.format != "chat":
            raise InputError(f"{path} was prepared with format {manifest.format!r}: prepare it with --gin.FORMAT=chat")
        if manifest.tokenizer_sha256 != ours:
            raise InputError(
                f"{path} was prepared with another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}…) than that of "
                f"the checkpoint, {tokenizer} ({ours[:12]}…): prepare it with --gin.TOKENIZER={tokenizer}"
            )
    return from_folders(config.paths)


def as_pretraining(config: SftConfig, model: ModelConfig, mixture: MixtureConfig) -> pretrain.PretrainConfig:
    """The same run as the pre-training job knows it."""
    return pretrain.PretrainConfig(
        model=model,
        mixture=mixture,
        schedule=config.schedule,
        train=config.train,
        optimizer=config.optimizer,
        loss=config.loss,
        checkpoint=config.checkpoint,
        mesh=config.mesh,
        init_from=config.init_from,
        num_workers=config.num_workers,
    )
