"""AdamW with µP parameter groups; docs/mup.md has the table of what happens to which tensor and why."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from pydantic import Field, NonNegativeFloat, PositiveFloat

from cpm_jax.common.config import config_dataclass
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.schedules import Schedule, ScheduleConfig, make_schedule

Group = Literal["matrix", "embedding", "head", "norm", "bias"]
Beta = Annotated[float, Field(ge=0, lt=1)]


@config_dataclass
class OptimizerConfig:
    """AdamW with clipping; the defaults are MiMo's (§2.3) and MiniCPM's.

    Attributes:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the second moment.
        weight_decay: decoupled weight decay, multiplied by the learning rate as in `torch.optim.AdamW`. Norms and
            biases have none.
        max_grad_norm: gradients of a larger global L2 norm are scaled down to it; None does not clip.
        decay_embeddings: whether the embedding decays too; OLMo 2 (arXiv:2501.00656 §3.4) leaves it out.
        width_independent_decay: under µP, whether hidden matrices lose the same share of themselves in a step at every
            width. Their weight decay is then multiplied by the width multiplier, which undoes the division of their
            learning rate (as the `mup` package does; docs/mup.md). Under standard parametrisation both are the same.
    """

    b1: Beta = 0.9
    b2: Beta = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1
    max_grad_norm: PositiveFloat | None = 1.0
    decay_embeddings: bool = True
    width_independent_decay: bool = False


class Optimizer(NamedTuple):
    """An optax transformation whose learning rate is that of the global step.

    `init(params)` and `update(grads, opt_state, params, step=step)` are optax's. The step is given, not counted in
    the optimizer's state, so that skipped steps do not shift the schedule.
    """

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, Any]]
    learning_rate: Schedule


class ParameterGroup(NamedTuple):
    """How the parameters of one group start and learn.

    Attributes:
        init_std: standard deviation of the initial values.
        lr: factor on the learning rate.
        decay: weight decay; an update subtracts learning rate · lr · decay · parameter.
    """

    init_std: float
    lr: float
    decay: float


def parameter_groups(optimizer: OptimizerConfig, model: ModelConfig) -> dict[Group, ParameterGroup]:
    """The table of parameter groups for a model. With m = d_model / dim_model_base (1 without µP):

    Hidden matrices, whose both sides grow with width, learn at 1/m of the learning rate and start at 1/sqrt(m) of
    the standard deviation. Embedding, head, norms and biases are as at the base width: the width of the head is
    accounted for by the factor 1/m on its input, which also is what allows it to share the embedding's matrix
    (Tensor Programs V, arXiv:2203.03466, Table 8; MiniCPM, arXiv:2404.06395, Table 7). docs/mup.md has it by tensor.
    """
    m, std, decay = model.width_multiplier, model.initializer_range, optimizer.weight_decay
    return {
        "matrix": ParameterGroup(
            init_std=std / m**0.5, lr=1 / m, decay=decay * m if optimizer.width_independent_decay else decay
        ),
        "embedding": ParameterGroup(init_std=std, lr=1.0, decay=decay if optimizer.decay_embeddings else 0.0),
        "head": ParameterGroup(init_std=std, lr=1.0, decay=decay),
        "norm": ParameterGroup(init_std=0.0, lr=1.0, decay=0.0),
        "bias": ParameterGroup(init_std=0.0, lr=1.0, decay=0.0),
    }


def group_of(path: tuple[str, ...]) -> Group:
    """The group of a parameter, from the keys that lead to it."""
    if path[-1] == "kernel":
        return "head" if path[0] == "lm_head" else "matrix"
    groups: dict[str, Group] = {"embedding": "embedding", "scale": "norm", "bias": "bias"}
    if path[-1] not in groups:
        raise ValueError(
            f"parameter {'/'.join(path)}: its group is unknown; known names are kernel, {', '.join(groups)}"
        )
    return groups[path[-1]]


def _group_tree(params: Any) -> Any:
    """The tree of `params` with the name of each parameter's group."""
    return jax.tree_util.tree_map_with_path(lambda path, _: group_of(tuple(key.key for key in path)), params)


def make_optimizer(optimizer: OptimizerConfig, schedule: ScheduleConfig, model: ModelConfig) -> Optimizer:
    """Builds the optimizer: clip by global norm, Adam, weight decay, factors of the groups, learning rate.

    Moments are float32 whatever the type of the parameters, and so are the updates.

    Args:
        optimizer: AdamW's constants.
        schedule: learning rate by global step.
        model: gives the width multiplier.
    """
    return adamw(
        parameter_groups(optimizer, model),
        make_schedule(schedule),
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        max_grad_norm=optimizer.max_grad_norm,
    )


def adamw(
    table: Mapping[Group, ParameterGroup],
    learning_rate: Schedule,
    *,
    b1: Any,
    b2: Any,
    eps: Any,
    max_grad_norm: float | None,
) -> Optimizer:
    """The optimizer of `make_optimizer`, from numbers or, where trainings share a program, traced scalars.

    Args:
        table: factor on the learning rate and decay of each group.
        learning_rate: by global step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the square root of the second moment.
        max_grad_norm: see `OptimizerConfig`.
    """

    def add_weight_decay(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda u, p, group: u + table[cast(Group, group)].decay * p, updates, params, _group_tree(params)
        )

    def scale(updates: Any, step: Int[Array, ""]) -> Any:
        lr = learning_rate(step)
        return jax.tree.map(lambda u, group: -lr * table[cast(Group, group)].lr * u, updates, _group_tree(updates))

    tx = optax.chain(
        optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm),
        optax.scale_by_adam(b1, b2, eps),
        optax.stateless(add_weight_decay),
    )

    def init(params: Any) -> Any:
        return tx.init(optax.tree.cast(params, jnp.float32))

    def update(grads: Any, opt_state: Any, params: Any, *, step: Int[Array, ""]) -> tuple[Any, Any]:
        grads, params = (optax.tree.cast(tree, jnp.float32) for tree in (grads, params))
        updates, opt_state = tx.update(grads, opt_state, params)
        return scale(updates, step), opt_state

    return Optimizer(init, update, learning_rate)


def global_norm(tree: Any) -> Float[Array, ""]:
    """L2 norm over all elements of a tree, summed in float32."""
    return optax.tree.norm(optax.tree.cast(tree, jnp.float32))
