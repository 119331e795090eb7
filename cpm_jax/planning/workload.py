"""What is planned, and one way of laying it out on the chips; how both become a program to compile."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from pydantic import PositiveInt

from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.common.sharding import MeshConfig, logical_sharding, make_abstract_mesh, make_mesh
from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.kv_cache import Cache, cache_specs, init_cache
from cpm_jax.training.losses import LossConfig
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import Phase, ScheduleConfig
from cpm_jax.training.train_state import abstract_state
from cpm_jax.training.train_step import batch_sharding, check_batch_size, make_train_step

Remat = Literal["none", "dots", "full"]
# Tokens of each sequence that one call gives: what the call does before and after its loop is shared by them.
DECODE_STEPS = 32


@config_dataclass
class Workload:
    """What runs.

    Attributes:
        kind: "train", the whole step with loss, gradients and optimizer; or "decode", one token for each sequence.
        model: the model. Its `remat` is each candidate's.
        seq_len: tokens per row in training; slots of the cache in decoding.
        optimizer: of training.
        loss: of training.
    """

    kind: Literal["train", "decode"]
    model: ModelConfig
    seq_len: PositiveInt
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()

    def __post_init__(self) -> None:
        if self.seq_len > self.model.max_position_embeddings:
            raise ConfigError(
                f"Workload.seq_len = {self.seq_len}: must be at most ModelConfig.max_position_embeddings = "
                f"{self.model.max_position_embeddings}",
                field="Workload.seq_len",
            )

    @property
    def steps_per_call(self) -> int:
        """Steps that one call of the program takes."""
        return DECODE_STEPS if self.kind == "decode" else 1


@config_dataclass
class Candidate:
    """One way to run a workload.

    Attributes:
        mesh: sizes of the mesh axes, all given.
        batch_size: rows per step over all chips; sequences in decoding.
        num_microbatches: parts of the batch whose gradients are accumulated.
        remat: what the backward pass recomputes.
    """

    mesh: MeshConfig
    batch_size: PositiveInt
    num_microbatches: PositiveInt = 1
    remat: Remat = "full"

    @property
    def label(self) -> str:
        """A few words for tables."""
        names = ("data", "fsdp", "tensor", "context")
        mesh = " x ".join(f"{name} {size}" for name, size in zip(names, self.mesh.sizes, strict=True) if size > 1)
        micro = f" in {self.num_microbatches}" if self.num_microbatches > 1 else ""
        return f"{mesh or 'one chip'}, {self.batch_size:,} rows{micro}, remat {self.remat}"


def model_of(workload: Workload, candidate: Candidate) -> ModelConfig:
    """The model as the candidate runs it: inference holds its parameters in the compute type."""
    if workload.kind == "decode":
        return dataclasses.replace(workload.model, param_dtype=workload.model.dtype, remat="none")
    return dataclasses.replace(workload.model, remat=candidate.remat)


def state_bytes(workload: Workload, candidate: Candidate) -> dict[str, int]:
    """Bytes on each chip of what lives from step to step, counted from shapes and shardings; no device is needed.

    Returns:
        "parameters", and "optimizer" in training or "cache" in decoding.
    """
    model = model_of(workload, candidate)
    mesh = make_abstract_mesh(candidate.mesh)
    if workload.kind == "decode":
        cache = _abstract_cache(workload, candidate, model, mesh)
        return {"parameters": _bytes_per_chip(decoder.abstract_params(model, mesh)), "cache": _bytes_per_chip(cache)}
    state = abstract_state(model, _optimizer(workload, model), mesh)
    return {"parameters": _bytes_per_chip(state.params), "optimizer": _bytes_per_chip(state.opt_state)}


def lower(workload: Workload, candidate: Candidate, devices: list[jax.Device]) -> jax.stages.Lowered:
    """Lowers the program that would run on the devices, which need not exist.

    Raises:
        ConfigError: the mesh does not fit the devices, the model or the batch.
    """
    mesh = make_mesh(candidate.mesh, devices)
    check_batch_size(candidate.batch_size, workload.seq_len, mesh, candidate.num_microbatches)
    model = model_of(workload, candidate)
    return (_lower_train if workload.kind == "train" else _lower_decode)(workload, candidate, model, mesh)


def _lower_train(workload: Workload, candidate: Candidate, model: ModelConfig, mesh: Mesh) -> jax.stages.Lowered:
    optimizer = _optimizer(workload, model)
    rows, shardings = candidate.batch_size, batch_sharding(mesh)
    batch = {
        key: jax.ShapeDtypeStruct(
            (rows,) if key == "source_ids" else (rows, workload.seq_len),
            jnp.float32 if key == "loss_weights" else jnp.int32,
            sharding=sharding,
        )
        for key, sharding in shardings.items()
    }
    step = make_train_step(model, optimizer, loss=workload.loss, num_microbatches=candidate.num_microbatches, mesh=mesh)
    return step.lower(abstract_state(model, optimizer, mesh), batch)  # type: ignore[attr-defined]


def _lower_decode(workload: Workload, candidate: Candidate, model: ModelConfig, mesh: Mesh) -> jax.stages.Lowered:
    params, cache = decoder.abstract_params(model, mesh), _abstract_cache(workload, candidate, model, mesh)
    rows = jax.ShapeDtypeStruct((candidate.batch_size,), jnp.int32, sharding=logical_sharding(("batch",), mesh))

    def decode(params: Any, tokens: jax.Array, positions: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            bound = decoder.bind(model, params)

            def one_token(step: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
                tokens, cache = carry
                hidden, cache = bound.decode(tokens[:, None], positions[:, None] + step, cache)
                return jnp.argmax(bound.logits(hidden)[:, 0], axis=-1).astype(jnp.int32), cache

            return jax.lax.fori_loop(0, DECODE_STEPS, one_token, (tokens, cache))

    layouts = jax.tree.map(lambda leaf: leaf.sharding, (rows, cache))
    return jax.jit(decode, donate_argnums=3, out_shardings=layouts).lower(params, rows, rows, cache)


def _optimizer(workload: Workload, model: ModelConfig) -> Any:
    # The learning rate changes neither memory nor time.
    return make_optimizer(workload.optimizer, ScheduleConfig(phases=(Phase(steps=1, end=1e-3),)), model)


def _abstract_cache(workload: Workload, candidate: Candidate, model: ModelConfig, mesh: Mesh | AbstractMesh) -> Any:
    cache = jax.eval_shape(lambda: init_cache(model, candidate.batch_size, workload.seq_len))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        specs = cache_specs(cache)
    if specs is None:
        specs = jax.tree.map(lambda _: PartitionSpec(), cache)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), cache, specs
    )


def _bytes_per_chip(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total
