"""`--dry_run`: what a job would be, from shapes alone. No parameter is made and no data is read."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from cpm_jax.checkpoints.hf_config import find_layout, read_config
from cpm_jax.checkpoints.manager import CHECKPOINTS_DIR, find_checkpoint, list_steps, read_meta
from cpm_jax.checkpoints.sources import open_source
from cpm_jax.checkpoints.weights import is_foreign
from cpm_jax.common.config import config_from_dict
from cpm_jax.common.sharding import MeshConfig, make_abstract_mesh
from cpm_jax.data.loader import open_datasets
from cpm_jax.data.manifest import FILE_NAME as MANIFEST
from cpm_jax.data.mixture import MixtureConfig
from cpm_jax.data.prepare import PrepareConfig
from cpm_jax.data.sources import estimate_bytes, read_documents
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import count_params, train_flops_per_token
from cpm_jax.training.losses import loss_sums
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import ScheduleConfig, make_schedule
from cpm_jax.training.train_state import abstract_state
from experiments import plan, sft
from experiments.convert import ConvertConfig
from experiments.export import ExportConfig
from experiments.generate import GenerateConfig
from experiments.plan import PlanConfig
from experiments.pretrain import PretrainConfig, check_divides, check_fits
from experiments.quickstart import QuickstartConfig
from experiments.sft import SftConfig
from experiments.sweep import SweepConfig

_GIB = 2**30


def describe(config: Any, workdir: Path) -> str:
    """Says what a job would be.

    Args:
        config: of any verb.
        workdir: the folder that the job would write to.

    Returns:
        Lines for the terminal: size, cost, memory, schedule and data, as far as the job has them.

    Raises:
        ConfigError: parts of the config do not fit each other, or the data that is there.
        InputError: data or a checkpoint that is there cannot be read; or, to generate from or to convert, is not there.
    """
    describers: dict[type, Callable[[Any, Path], list[str]]] = {
        PrepareConfig: _describe_prepare,
        PretrainConfig: _describe_pretrain,
        SftConfig: _describe_sft,
        QuickstartConfig: _describe_quickstart,
        GenerateConfig: _describe_generate,
        PlanConfig: _describe_plan,
        ConvertConfig: _describe_convert,
        ExportConfig: _describe_export,
        SweepConfig: _describe_sweep,
    }
    lines = describers[type(config)](config, workdir) if type(config) in describers else []
    return "\n".join([f"dry run      {workdir}, {_state(workdir)}", *lines])


def _state(workdir: Path) -> str:
    steps = list_steps(workdir / CHECKPOINTS_DIR)
    if steps:
        return f"which has a checkpoint of step {steps[-1]:,} to go on from"
    return "which is there" if workdir.exists() else "which is new"


def _describe_sweep(config: SweepConfig, workdir: Path) -> list[str]:
    space = config.base().space
    size = "a range" if space.size is None else f"{space.size:,} points"
    trials = "all of them" if config.study.num_trials is None else f"{config.study.num_trials:,} trials"
    return [
        f"space        {', '.join(space.names)}: {size}",
        f"study        {config.study.sampler}, {trials}; pruning: {config.study.pruner}; {config.workers} workers",
    ]


def _describe_prepare(config: PrepareConfig, workdir: Path) -> list[str]:
    lines = [f"dataset      {config.format}, rows of {config.seq_len:,} tokens"]
    for source in config.source_list:
        size = estimate_bytes(source, config.extensions)
        first = next(
            read_documents(
                source,
                format=config.format,
                text_field=config.text_field,
                extensions=config.extensions,
                tfds_data_dir=config.tfds_data_dir,
            ),
            None,
        )
        about = "no document" if first is None else "size known after reading" if size is None else f"{size:,} bytes"
        lines.append(f"source       {source}: {about}")
    if config.tokenizer is not None:
        tokenizer = Tokenizer.load(config.tokenizer)
        lines.append(f"tokenizer    {config.tokenizer}: {tokenizer.vocab_size:,} ids")
    else:
        lines.append(f"tokenizer    to be trained: {config.vocab_size:,} ids")
    return lines


def _model_at(path: Path) -> tuple[ModelConfig, str]:
    """The model of a checkpoint, a Hugging Face folder or a GGUF file, and what it lies in."""
    if is_foreign(path):
        source = open_source(path)
        return read_config(source.config), f"{path}: {find_layout(source.config).architecture}"
    checkpoint = find_checkpoint(path)
    return config_from_dict(ModelConfig, read_meta(checkpoint)["model"]), f"{checkpoint}: checkpoint"


def _describe_generate(config: GenerateConfig, workdir: Path) -> list[str]:
    model, described = _model_at(Path(config.checkpoint or workdir))
    mesh = make_abstract_mesh(config.mesh)
    held = _bytes_per_device(decoder.abstract_params(model, mesh)) / 2**20
    return [
        f"source       {described}",
        *model_lines(model, model.max_position_embeddings),
        *mesh_lines(mesh),
        f"memory       {held:,.1f} MiB of parameters on each device, in {model.param_dtype}",
    ]


def _describe_convert(config: ConvertConfig, workdir: Path) -> list[str]:
    model, described = _model_at(Path(config.source))
    return [f"source       {described}", *model_lines(model, model.max_position_embeddings)]


def _describe_export(config: ExportConfig, workdir: Path) -> list[str]:
    model, described = _model_at(Path(config.source or workdir))
    return [f"source       {described}", *model_lines(model, model.max_position_embeddings)]


def _describe_plan(config: PlanConfig, workdir: Path) -> list[str]:
    guesses, chosen = plan.find_candidates(config), plan.chosen(config)
    lines = [f"candidates   {len(guesses):,} on {config.topology}; by formulas {len(chosen)} are to be compiled"]
    lines += [f"  {guess.candidate.label}: {guess.memory / _GIB:.1f} GiB per chip" for guess in chosen]
    return [*model_lines(config.workload.model, config.workload.seq_len), *lines]


def _describe_quickstart(config: QuickstartConfig, workdir: Path) -> list[str]:
    rows, seq_len = config.train.batch_size // config.train.num_microbatches, config.prepare.seq_len
    return [
        *_describe_prepare(config.prepare, workdir),
        *model_lines(config.model, seq_len),
        *memory_lines(config.model, config.optimizer, config.schedule, rows, seq_len, make_abstract_mesh(MeshConfig())),
        *schedule_lines(config.schedule, config.train.steps, config.train.batch_size * seq_len),
    ]


def _describe_sft(config: SftConfig, workdir: Path) -> list[str]:
    model, tokenizer = sft.starting_model(config)
    preparation = sft.preparation_of(config, tokenizer)
    lines = _describe_prepare(preparation, workdir) if preparation else []
    training = sft.as_pretraining(config, model, sft.mixture_of(config, tokenizer, workdir))
    return [*lines, *_describe_pretrain(training, workdir, config.seq_len)]


def _describe_pretrain(config: PretrainConfig, workdir: Path, seq_len: int | None = None) -> list[str]:
    """Describes a training; `seq_len` holds where the data is not there to tell, else the model's longest rows."""
    present = [c for c in config.mixture.components if (Path(c.path) / MANIFEST).exists()]
    seq_len, tokens = seq_len or config.model.max_position_embeddings, dict[str, int]()
    if len(present) == len(config.mixture.components):
        datasets = open_datasets(config.mixture)
        check_fits(config.model, config.train, datasets)
        seq_len = datasets[0].manifest.seq_len
        tokens = {dataset.name: dataset.manifest.splits["train"].tokens for dataset in datasets}
    mesh = make_abstract_mesh(config.mesh)
    check_divides(config.model, config.train, mesh, seq_len)
    rows = config.train.batch_size // config.train.num_microbatches
    tokens_per_step = config.train.batch_size * seq_len
    starts = [f"starts from  {find_checkpoint(config.init_from)}"] if Path(config.init_from or "?").exists() else []
    return [
        *model_lines(config.model, seq_len),
        *mesh_lines(mesh),
        *memory_lines(config.model, config.optimizer, config.schedule, rows, seq_len, mesh),
        *schedule_lines(config.schedule, config.train.steps, tokens_per_step),
        *data_lines(config.mixture, tokens, config.train.steps * tokens_per_step),
        *starts,
    ]


def model_lines(model: ModelConfig, seq_len: int) -> list[str]:
    """Size and cost of a model.

    Args:
        model: the model.
        seq_len: tokens per row, on which the cost of attention depends.
    """
    counts = count_params(model)
    heads = f"{model.num_heads} heads of {model.head_size}, {model.num_kv_heads} for keys and values"
    mtp = f", {model.num_nextn_predict_layers} MTP" if model.num_nextn_predict_layers else ""
    return [
        f"model        {model.num_layers} layers{mtp}, width {model.d_model}, {heads}, vocabulary {model.vocab_size:,}",
        f"parameters   {counts.total:,} in all, {counts.non_embedding:,} without embeddings",
        f"FLOPs/token  {train_flops_per_token(model, seq_len):.4g} to train at {seq_len:,} tokens",
    ]


def mesh_lines(mesh: AbstractMesh) -> list[str]:
    """How devices are arranged, and whether this machine has as many."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    here = jax.device_count()
    note = "" if mesh.size == here else f"; {here} seen here"
    return [f"mesh         {axes}: {mesh.size:,} devices{note}"]


def memory_lines(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    rows: int,
    seq_len: int,
    mesh: AbstractMesh,
) -> list[str]:
    """Memory of a training: over all devices together, and on each.

    Parameters, optimizer and gradients are those of the arrays' shardings. Activations are estimated, on each device
    as if only rows and their lengths were divided: tensor parallelism divides some of them further.

    Args:
        model: the model.
        optimizer: its state is counted.
        schedule: learning rate, without which no optimizer can be made.
        rows: rows whose activations are held at once: a micro-batch.
        seq_len: tokens per row.
        mesh: how the devices are arranged.
    """
    state = abstract_state(model, make_optimizer(optimizer, schedule, model), mesh)
    # Accumulated in float32, and laid out as the parameters.
    gradients = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=p.sharding), state.params)
    activations = activation_bytes(model, rows, seq_len)
    rows_parts = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "context"))
    parts = {
        "parameters": (_bytes(state.params), _bytes_per_device(state.params)),
        "optimizer": (_bytes(state.opt_state), _bytes_per_device(state.opt_state)),
        "gradients": (_bytes(gradients), _bytes_per_device(gradients)),
        f"activations of {rows} x {seq_len:,} tokens (estimate)": (activations, activations // rows_parts),
    }
    parts["in all"] = (sum(whole for whole, _ in parts.values()), sum(one for _, one in parts.values()))
    unit, name = (_GIB, "GiB") if parts["in all"][1] >= _GIB else (_GIB / 1024, "MiB")
    return [
        "memory           one copy      per device",
        *(f"  {whole / unit:11,.2f} {name} {one / unit:11,.2f} {name}  {what}" for what, (whole, one) in parts.items()),
    ]


def activation_bytes(model: ModelConfig, rows: int, seq_len: int) -> int:
    """Estimates what the forward pass keeps for the backward pass, and what of it remat computes again at once.

    These are the residuals that JAX's reverse mode asks for, before XLA fuses or drops any, without the parameters
    themselves; with remat, those of the one layer that is being recomputed are added.

    Args:
        model: the model.
        rows: rows of a micro-batch.
        seq_len: tokens per row.
    """
    kept = _residual_bytes(model, rows, seq_len)
    if model.remat == "none":
        return kept
    one, two = (dataclasses.replace(model, remat="none", num_layers=layers) for layers in (1, 2))
    return kept + _residual_bytes(two, rows, seq_len) - _residual_bytes(one, rows, seq_len)


def _residual_bytes(model: ModelConfig, rows: int, seq_len: int) -> int:
    ints = jax.ShapeDtypeStruct((rows, seq_len), jnp.int32)
    batch = {
        **dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ints),
        "loss_weights": jax.ShapeDtypeStruct((rows, seq_len), jnp.float32),
        "source_ids": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    params = decoder.abstract_params(model)

    def residuals(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            sums = loss_sums(decoder.bind(model, params), batch, 1)
            return sums.nll + jnp.sum(sums.mtp_nll)

        return jax.vjp(loss, params)[1]  # a pytree: its leaves are the residuals

    kept = collections.Counter(_kind(leaf) for leaf in jax.tree.leaves(jax.eval_shape(residuals, params, batch)))
    kept.subtract(_kind(leaf) for leaf in jax.tree.leaves(params))
    return sum(max(n, 0) * math.prod(shape) * jnp.dtype(dtype).itemsize for (shape, dtype), n in kept.items())


def schedule_lines(schedule: ScheduleConfig, steps: int, tokens_per_step: int) -> list[str]:
    """The phases of a schedule in steps and tokens.

    Args:
        schedule: the schedule.
        steps: where this run ends in it.
        tokens_per_step: batch size times sequence length.
    """
    rate, first = make_schedule(schedule), schedule.first_step
    lines = [f"schedule     {steps:,} steps of {tokens_per_step:,} tokens: {steps * tokens_per_step:.4g} tokens"]
    for phase in schedule.phases:
        if phase.steps:
            last = first + phase.steps
            shape = f"{float(rate(first)):.3g} to {phase.end:.3g}, {phase.shape}"
            lines.append(f"  steps {first:,} to {last:,}: {phase.steps * tokens_per_step:.4g} tokens, {shape}")
            first = last
    if schedule.total_steps != steps:
        lines.append(f"  the schedule ends at step {schedule.total_steps:,}, this run at step {steps:,}")
    return lines


def data_lines(mixture: MixtureConfig, tokens: Mapping[str, int], total: int) -> list[str]:
    """The components of a mixture and their shares.

    Args:
        mixture: the mixture.
        tokens: number of training tokens of each component; empty where not all datasets are there.
        total: tokens that the run reads.
    """
    lines = ["data"]
    for component in mixture.components:
        there = (Path(component.path) / MANIFEST).exists()
        about = f"{tokens[component.name]:,} tokens" if component.name in tokens else "" if there else "NOT THERE"
        lines.append(f"  {component.name}: {component.path} {about}".rstrip())
    if tokens:
        lines.append(f"  {total / sum(tokens.values()):.2f} epochs over all of it")
    for stage in mixture.stages:
        shares = [
            f"{c.name} {w / sum(stage.weights):.1%}" for c, w in zip(mixture.components, stage.weights, strict=True)
        ]
        lines.append(f"  from step {stage.start_step:,}: {', '.join(shares)}")
    return lines


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _bytes_per_device(tree: Any) -> int:
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(leaf.shape), str(leaf.dtype)
