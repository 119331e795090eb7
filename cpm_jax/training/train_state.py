"""What a training step reads and writes, and what a checkpoint holds of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.optimizer import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A plain pytree.

    Attributes:
        step: number of steps taken, skipped ones too; the next batch is batch(step).
        params: the model's parameters.
        opt_state: the optimizer's moments, float32.
        nonfinite_run: steps just skipped in a row because loss or gradient was not finite.
        nonfinite_total: all steps skipped for that reason.
    """

    step: Int[Array, ""]
    params: Any
    opt_state: Any
    nonfinite_run: Int[Array, ""]
    nonfinite_total: Int[Array, ""]


def abstract_state(config: ModelConfig, optimizer: Optimizer, mesh: Mesh | AbstractMesh | None = None) -> TrainState:
    """Shapes and types of the whole state, with shardings where a mesh is given; what a checkpoint is restored to."""
    state = jax.eval_shape(lambda: _make_state(config, optimizer, jax.random.key(0)))
    if mesh is None:
        return state
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_sharding(config, optimizer, mesh),
    )


def state_sharding(config: ModelConfig, optimizer: Optimizer, mesh: Mesh | AbstractMesh) -> TrainState:
    """The state's tree of shardings: moments lie as their parameters, counters everywhere.

    Raises:
        ConfigError: naming a parameter, or the heads, that the mesh does not divide.
    """
    state = abstract_state(config, optimizer)
    params = jax.tree.map(lambda leaf: leaf.sharding, decoder.abstract_params(config, mesh))
    everywhere: Any = NamedSharding(mesh, PartitionSpec())
    return TrainState(
        step=everywhere,
        params=params,
        opt_state=optax.tree.map_params(
            optimizer, lambda _, sharding: sharding, state.opt_state, params, transform_non_params=lambda _: everywhere
        ),
        nonfinite_run=everywhere,
        nonfinite_total=everywhere,
    )


def _make_state(config: ModelConfig, optimizer: Optimizer, key: jax.Array) -> TrainState:
    params = decoder.init_params(config, key)
    return state_from_params(params, optimizer)


def state_from_params(params: Any, optimizer: Optimizer) -> TrainState:
    """The state at step 0 of a training that starts from given parameters."""
    # Each counter is an array of its own: the train step donates them all.
    step, nonfinite_run, nonfinite_total = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, optimizer.init(params), nonfinite_run, nonfinite_total)


def init_state(config: ModelConfig, optimizer: Optimizer, key: jax.Array, mesh: Mesh | None = None) -> TrainState:
    """Draws the initial state, each device making only its part where a mesh is given.

    Args:
        config: the model.
        optimizer: from `make_optimizer`.
        key: PRNG key of the initial parameters; the values do not depend on the mesh.
        mesh: from `common.sharding.make_mesh`; None is one device.
    """
    shardings = None if mesh is None else state_sharding(config, optimizer, mesh)
    return jax.jit(lambda k: _make_state(config, optimizer, k), out_shardings=shardings)(key)
