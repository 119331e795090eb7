"""The training step and the evaluation step, compiled functions of state and batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from cpm_jax.common.config import ConfigError
from cpm_jax.common.sharding import constrain, data_shard, logical_sharding
from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import ModelConfig, Multipliers
from cpm_jax.training.distillation import DistillationConfig
from cpm_jax.training.losses import Batch, LossConfig, LossSums, loss_sums, loss_weights, mean, mtp_weight
from cpm_jax.training.optimizer import Optimizer, global_norm
from cpm_jax.training.train_state import TrainState, state_sharding

Metrics = dict[str, Array]

# Axes of the arrays of a batch.
BATCH_AXES = {
    **dict.fromkeys(("tokens", "targets", "loss_weights", "segment_ids", "positions"), ("batch", "length")),
    "source_ids": ("batch",),
}


def batch_sharding(mesh: Mesh) -> dict[str, NamedSharding]:
    """How the arrays of a batch lie on the mesh."""
    return {key: logical_sharding(axes, mesh) for key, axes in BATCH_AXES.items()}


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Puts a process's rows of a batch on its devices, as part of the global batch.

    Args:
        batch: numpy arrays of the part of the batch that `common.sharding.data_shard` names.
        mesh: from `common.sharding.make_mesh`.
    """
    shardings, num_parts = batch_sharding(mesh), data_shard(mesh)[1]
    return {
        key: jax.make_array_from_process_local_data(shardings[key], x, (x.shape[0] * num_parts, *x.shape[1:]))
        for key, x in batch.items()
    }


def check_batch_size(batch_size: int, seq_len: int, mesh: Mesh | AbstractMesh, num_microbatches: int = 1) -> None:
    """Checks that a global batch can be divided over micro-batches and devices.

    Raises:
        ConfigError: naming batch size or sequence length, and what would divide it.
    """
    data, fsdp, context = (mesh.shape[axis] for axis in ("data", "fsdp", "context"))
    if batch_size % (num_microbatches * data * fsdp):
        raise ConfigError(
            f"batch_size = {batch_size}: must be a multiple of num_microbatches x MeshConfig.data x MeshConfig.fsdp = "
            f"{num_microbatches} x {data} x {fsdp} = {num_microbatches * data * fsdp}",
            field="batch_size",
        )
    if seq_len % context:
        raise ConfigError(
            f"seq_len = {seq_len}: must be a multiple of MeshConfig.context = {context}", field="MeshConfig.context"
        )


def _split(batch: Batch, num: int) -> Batch:
    """Splits rows into micro-batches, [B, ...] -> [num, B / num, ...], every num-th row to the same one.

    So each device's contiguous rows give it an equal part of each micro-batch, and nothing moves between devices.
    """
    return {
        key: constrain(jnp.swapaxes(x.reshape(x.shape[0] // num, num, *x.shape[1:]), 0, 1), (None, *BATCH_AXES[key]))
        for key, x in batch.items()
    }


def _loss_and_grads(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    num_sources: int,
    num_microbatches: int,
    mtp_factor: Float[Array, ""],
    multipliers: Multipliers | None,
    distillation: DistillationConfig | None,
    teacher: decoder.Decoder | None,
) -> tuple[LossSums, Float[Array, ""], Float[Array, " M"], Any]:
    """Loss sums, the two total weights, and float32 gradients of the weighted mean loss of the whole batch."""
    num_mtp = config.num_nextn_predict_layers
    weight, mtp_weights = loss_weights(batch, num_mtp)

    def loss(params: Any, batch: Batch) -> tuple[Float[Array, ""], LossSums]:
        model = decoder.bind(config, params, multipliers)
        if distillation is None:
            sums = loss_sums(model, batch, num_sources)
        else:
            sums = loss_sums(model, batch, num_sources, teacher=teacher, temperature=distillation.temperature)
        # Divided by the weights of the whole batch, micro-batches with different numbers of loss tokens add up to
        # the loss and the gradient of the batch taken at once.
        mtp = jnp.sum(mean(sums.mtp_nll, mtp_weights)) / max(num_mtp, 1)
        total = mean(sums.nll, weight) + mtp_factor * mtp
        if distillation is not None:
            total += distillation.factor * mean(sums.teacher_kl, weight)
        return total, sums

    def one(batch: Batch) -> tuple[LossSums, Any]:
        grads, sums = jax.grad(loss, has_aux=True)(params, batch)
        # Laid out as the parameters: summed over the batch straight into each device's part.
        return sums, jax.tree.map(constrain, optax.tree.cast(grads, jnp.float32), decoder.param_axes(config))

    if num_microbatches == 1:
        sums, grads = one(batch)
    else:
        micro_batches = _split(batch, num_microbatches)
        shapes = jax.eval_shape(lambda batches: one(jax.tree.map(lambda x: x[0], batches)), micro_batches)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (sums, grads), _ = jax.lax.scan(
            lambda total, micro: (jax.tree.map(jnp.add, total, one(micro)), None), zeros, micro_batches
        )
    return sums, weight, mtp_weights, grads


# The default of both papers' recipes.
_PAPER_LOSS = LossConfig()


def make_train_step(
    config: ModelConfig,
    optimizer: Optimizer,
    *,
    loss: LossConfig = _PAPER_LOSS,
    num_sources: int = 1,
    num_microbatches: int = 1,
    mesh: Mesh | None = None,
    teacher: ModelConfig | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compiles one step of training. The state is donated: the one passed in is gone after the call.

    A step whose loss or gradient is not finite leaves parameters and optimizer as they were; it only counts.

    Args:
        config: the model.
        optimizer: from `make_optimizer`.
        loss: weights of the losses.
        num_sources: S, the number of mixture components.
        num_microbatches: parts of the batch whose gradients are accumulated one after the other.
        mesh: from `common.sharding.make_mesh`; None is one device.
        teacher: the model that `loss.distillation` names, whose parameters the step then takes as a third argument.

    Returns:
        A jitted function (state, batch) -> (state, metrics), where metrics are float32 scalars: loss (total), ntp_loss,
        mtp_loss (mean over MTP layers; only with such), teacher_kl (only with a teacher), grad_norm (before clipping),
        update_norm, param_norm (before the update), lr, tokens (not padding), loss_tokens (total loss weight),
        nonfinite (1 if skipped), nonfinite_run, nonfinite_total; and [S] arrays source_loss (NaN where a source has no
        token in the batch) and source_tokens.

    Raises:
        ConfigError: as `train_step`.
    """
    step = train_step(
        config, optimizer, loss=loss, num_sources=num_sources, num_microbatches=num_microbatches, teacher=teacher
    )
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    states, everywhere = state_sharding(config, optimizer, mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        _in_mesh(step, mesh),
        donate_argnums=0,
        in_shardings=(states, batch_sharding(mesh), *(() if teacher is None else (None,))),
        out_shardings=(states, everywhere),
    )


def train_step(
    config: ModelConfig,
    optimizer: Optimizer,
    *,
    loss: LossConfig = _PAPER_LOSS,
    num_sources: int = 1,
    num_microbatches: int = 1,
    multipliers: Multipliers | None = None,
    teacher: ModelConfig | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function that `make_train_step` compiles, for programs that hold more than one training.

    Args:
        config: the model.
        optimizer: from `make_optimizer` or `optimizer.adamw`.
        loss: weights of the losses.
        num_sources: S, the number of mixture components.
        num_microbatches: parts of the batch whose gradients are accumulated one after the other.
        multipliers: in place of the model's.
        teacher: as for `make_train_step`.

    Raises:
        ConfigError: there is a teacher without `loss.distillation`, or that without a teacher.
    """
    if (loss.distillation is None) != (teacher is None):
        raise ConfigError(
            f"LossConfig.distillation = {loss.distillation}: only a training by itself has a teacher, not one that "
            "shares a program or is only planned; must be None here",
            field="LossConfig.distillation",
        )

    def step(state: TrainState, batch: Batch, teacher_params: Any = None) -> tuple[TrainState, Metrics]:
        mtp_factor = mtp_weight(loss, state.step)
        sums, weight, mtp_weights, grads = _loss_and_grads(
            config,
            state.params,
            batch,
            num_sources,
            num_microbatches,
            mtp_factor,
            multipliers,
            loss.distillation,
            None if teacher is None else decoder.bind(teacher, teacher_params),
        )
        ntp_loss = mean(sums.nll, weight)
        total_loss, metrics = ntp_loss, {}
        if config.num_nextn_predict_layers:
            mtp_loss = jnp.mean(mean(sums.mtp_nll, mtp_weights))
            total_loss = ntp_loss + mtp_factor * mtp_loss
            metrics = {"mtp_loss": mtp_loss}
        if loss.distillation is not None:
            teacher_kl = mean(sums.teacher_kl, weight)
            total_loss += loss.distillation.factor * teacher_kl
            metrics["teacher_kl"] = teacher_kl

        grad_norm = global_norm(grads)
        finite = jnp.isfinite(total_loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        updates = jax.tree.map(lambda u: jnp.where(finite, u, 0), updates)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=jax.tree.map(lambda new, old: jnp.where(finite, new, old), opt_state, state.opt_state),
            nonfinite_run=jnp.where(finite, 0, state.nonfinite_run + 1),
            nonfinite_total=state.nonfinite_total + ~finite,
        )
        metrics |= {
            "loss": total_loss,
            "ntp_loss": ntp_loss,
            "grad_norm": grad_norm,
            "update_norm": global_norm(updates),
            "param_norm": global_norm(state.params),
            "lr": optimizer.learning_rate(state.step),
            "tokens": jnp.sum(batch["segment_ids"] > 0),
            "loss_tokens": weight,
            "nonfinite": ~finite,
            "nonfinite_run": new_state.nonfinite_run,
            "nonfinite_total": new_state.nonfinite_total,
            "source_loss": sums.source_nll / sums.source_weight,
            "source_tokens": sums.source_weight,
        }
        return new_state, {key: value.astype(jnp.float32) for key, value in metrics.items()}

    return step


def make_eval_step(
    config: ModelConfig, *, num_sources: int = 1, mesh: Mesh | None = None
) -> Callable[[Any, Batch], LossSums]:
    """Compiles the evaluation of one batch.

    Args:
        config: the model.
        num_sources: S, the number of mixture components.
        mesh: from `common.sharding.make_mesh`; None is one device.

    Returns:
        A jitted function (params, batch) -> `LossSums`. Sums over batches divided by each other are exact means: the
        mean loss is sum(nll) / sum(source_weight).
    """

    def step(params: Any, batch: Batch) -> LossSums:
        return loss_sums(decoder.bind(config, params), batch, num_sources)

    if mesh is None:
        return jax.jit(step)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(_in_mesh(step, mesh), in_shardings=(None, batch_sharding(mesh)), out_shardings=everywhere)


def _in_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Puts the mesh in context while `function` is traced: that is where `constrain` finds it."""

    def call(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return call
