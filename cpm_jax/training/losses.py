"""Next-token loss, the loss of MTP layers, and their parts by data source."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from cpm_jax.common.config import config_dataclass, config_function
from cpm_jax.common.sharding import activation_spec
from cpm_jax.modeling.decoder import Decoder
from cpm_jax.training.distillation import DistillationConfig, divergence_from_teacher
from kernels_pallas.linear_cross_entropy.api import linear_cross_entropy

Batch = dict[str, Any]


@config_dataclass
class LossConfig:
    """Weights of the losses; the defaults are MiMo's and DeepSeek-V3's.

    Attributes:
        mtp_weight: factor on the mean loss of the MTP layers.
        mtp_final_weight: the factor from step `mtp_final_step` on.
        mtp_final_step: step of the change; None keeps `mtp_weight`.
        distillation: a teacher to learn from beside the tokens; None for none.
    """

    mtp_weight: NonNegativeFloat = 0.3
    mtp_final_weight: NonNegativeFloat = 0.1
    mtp_final_step: NonNegativeInt | None = None
    distillation: DistillationConfig | None = None


@config_function
def mimo(train_steps: PositiveInt) -> LossConfig:
    """MiMo-7B's weights (§2.3): 0.3 for the first 10.3T of 23.784T tokens, then 0.1, in proportion to `train_steps`."""
    return LossConfig(mtp_final_step=round(train_steps * 10.3 / 23.784))


def mtp_weight(config: LossConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """The factor on the MTP loss at a step; traced, so that it changes without compiling again."""
    if config.mtp_final_step is None:
        return jnp.float32(config.mtp_weight)
    return jnp.where(step < config.mtp_final_step, jnp.float32(config.mtp_weight), config.mtp_final_weight)


class LossSums(NamedTuple):
    """Sums over a batch, without normalisation, so that those of micro-batches add up.

    Attributes:
        nll: weighted negative log-likelihood, in nats.
        mtp_nll: the same for each of the M MTP layers, of tokens 2, 3, … ahead.
        source_nll: `nll` by source, S of them.
        source_weight: loss weight by source; it sums to the weight of `nll`.
        teacher_kl: weighted divergence from the teacher, in nats; 0 without one.
    """

    nll: Float[Array, ""]
    mtp_nll: Float[Array, " M"]
    source_nll: Float[Array, " S"]
    source_weight: Float[Array, " S"]
    teacher_kl: Float[Array, ""]


def _ahead(x: Int[Array, "B T"] | Float[Array, "B T"], by: int) -> jax.Array:
    """x[t + by] at t, zero past the end."""
    return jnp.pad(x[:, by:], ((0, 0), (0, min(by, x.shape[1]))))


def mtp_targets(batch: Batch, depth: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Float[Array, "B T"]]:
    """What MTP layer `depth` reads and predicts at each position t.

    Args:
        batch: as in docs/architecture.md.
        depth: which MTP layer, from 0.

    Returns:
        The tokens t + depth + 1, which it reads; the tokens t + depth + 2, which it predicts; and the loss weights,
        0 where the predicted token does not count, lies past the end of the row or in another document than t.
    """
    segments = batch["segment_ids"]
    shift = depth + 1
    # targets[t + shift] is token t + shift + 1. Its loss weight says that it is in the same document as its input
    # t + shift, and documents are contiguous, so that t in that document too leaves no other between.
    weights = _ahead(batch["loss_weights"], shift) * (_ahead(segments, shift) == segments) * (segments > 0)
    return _ahead(batch["targets"], depth), _ahead(batch["targets"], shift), weights


def loss_weights(batch: Batch, num_mtp_layers: int) -> tuple[Float[Array, ""], Float[Array, " M"]]:
    """Total weights by which `LossSums.nll` and `LossSums.mtp_nll` of the batch are to be divided."""
    mtp = [jnp.sum(mtp_targets(batch, depth)[2]) for depth in range(num_mtp_layers)]
    return jnp.sum(batch["loss_weights"]), jnp.stack(mtp) if mtp else jnp.zeros((0,), jnp.float32)


def mean(total: Array, weight: Array) -> Array:
    """total / weight, and 0 where nothing has weight."""
    return total / jnp.where(weight > 0, weight, 1)


def _head_loss(
    model: Decoder, hidden: Array, kernel: Array, targets: Array, weights: Array
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    return linear_cross_entropy(
        model.head_inputs(hidden),
        kernel,
        targets,
        weights,
        hidden_spec=activation_spec(("batch", "length", None), hidden.shape),
        kernel_spec=activation_spec(("embed", "vocab"), kernel.shape),
    )


def loss_sums(
    model: Decoder, batch: Batch, num_sources: int, *, teacher: Decoder | None = None, temperature: float = 1.0
) -> LossSums:
    """Runs the model on a batch and sums its losses.

    Args:
        model: from `modeling.decoder.bind`.
        batch: as in docs/architecture.md.
        num_sources: S, the number of mixture components.
        teacher: to take the divergence from; None takes none.
        temperature: of both distributions there.
    """
    kernel = model.lm_head_kernel()
    hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    total, nll = _head_loss(model, hidden, kernel, batch["targets"], batch["loss_weights"])
    teacher_kl = jnp.zeros(())
    if teacher is not None:
        teacher_kl = divergence_from_teacher(model, hidden, teacher, batch, temperature)

    mtp_totals = []
    for depth in range(model.config.num_nextn_predict_layers):
        next_tokens, targets, weights = mtp_targets(batch, depth)
        hidden = model.mtp(hidden, next_tokens, batch["positions"], batch["segment_ids"], depth)
        mtp_totals.append(_head_loss(model, hidden, kernel, targets, weights)[0])

    def by_source(per_token: Float[Array, "B T"]) -> Float[Array, " S"]:
        return jax.ops.segment_sum(jnp.sum(per_token, axis=1), batch["source_ids"], num_segments=num_sources)

    return LossSums(
        nll=total,
        mtp_nll=jnp.stack(mtp_totals) if mtp_totals else jnp.zeros((0,), jnp.float32),
        source_nll=by_source(nll * batch["loss_weights"]),
        source_weight=by_source(batch["loss_weights"]),
        teacher_kl=teacher_kl,
    )
