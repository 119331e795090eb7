"""Distillation: a teacher's distribution of a token is learnt beside the token (Hinton et al., arXiv:1503.02531).

    loss = next-token loss + weight · T² · KL(teacher ‖ student),  both distributions of softmax(logits / T)

T² keeps the size of the gradient as T changes. The divergence is taken in chunks of tokens, as the next-token loss is:
the logits of both models exist for one chunk at a time.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float
from pydantic import PositiveFloat

from cpm_jax.checkpoints.manager import find_checkpoint, read_meta, restore_params
from cpm_jax.common.config import ConfigError, config_dataclass, config_from_dict
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Decoder, Params, abstract_params
from cpm_jax.modeling.ternary import materialize
from kernels_pallas.linear_cross_entropy.xla import to_chunks


@config_dataclass
class DistillationConfig:
    """A teacher, and how much it counts.

    Attributes:
        teacher: workdir, checkpoints folder or checkpoint of a model of ours with the same tokenizer.
        weight: factor on T² times the divergence; the next-token loss has 1.
        temperature: T, by which the logits of both are divided.
    """

    teacher: str
    weight: PositiveFloat = 1.0
    temperature: PositiveFloat = 1.0

    @property
    def factor(self) -> float:
        """What the divergence is multiplied by in the loss."""
        return self.weight * self.temperature**2


class Teacher(NamedTuple):
    """A teacher in memory.

    Attributes:
        config: the model.
        params: its parameters, in the type that it computes in.
    """

    config: ModelConfig
    params: Params


def load_teacher(
    config: DistillationConfig, student: ModelConfig, mesh: Mesh, tokenizer_sha256: str | None = None
) -> Teacher:
    """Reads a teacher onto the devices, where in bfloat16 it takes 2 bytes a parameter; training takes 16.

    Args:
        config: says where it is.
        student: the model that learns from it.
        mesh: how the parameters lie.
        tokenizer_sha256: of the student's data; None does not compare it.

    Raises:
        ConfigError: it has another vocabulary or another tokenizer, or the mesh does not fit it.
        CheckpointError: it cannot be read.
    """
    path = find_checkpoint(config.teacher)
    meta = read_meta(path)
    model = config_from_dict(ModelConfig, meta["model"])
    theirs = meta.get("fixed", {}).get("tokenizer_sha256", tokenizer_sha256)
    if model.vocab_size != student.vocab_size or tokenizer_sha256 not in (None, theirs):
        raise ConfigError(
            f"DistillationConfig.teacher = {config.teacher!r}: it predicts {model.vocab_size} tokens of the tokenizer "
            f"{str(theirs)[:12]}…, the student {student.vocab_size} of {str(tokenizer_sha256)[:12]}…; must be the same",
            field="DistillationConfig.teacher",
        )
    params, _ = restore_params(path, abstract_params(model, mesh))
    params.pop("mtp_layers", None)
    model, params = materialize(dataclasses.replace(model, num_nextn_predict_layers=0, remat="none"), params)
    return Teacher(model, jax.tree.map(lambda leaf: leaf.astype(model.dtype), params))


def divergence_from_teacher(
    student: Decoder, hidden: Float[Array, "B T D"], teacher: Decoder, batch: dict[str, Any], temperature: float
) -> Float[Array, ""]:
    """Runs the teacher on a batch, and sums the weighted divergences of the student's tokens.

    Args:
        student: the model that is trained.
        hidden: what it has computed of the batch.
        teacher: its teacher; no gradient flows to it.
        batch: as in docs/architecture.md.
        temperature: T.
    """
    with jax.named_scope("teacher"):
        theirs = teacher.head_inputs(teacher(batch["tokens"], batch["positions"], batch["segment_ids"]))
    return linear_kl_divergence(
        student.head_inputs(hidden),
        student.lm_head_kernel(),
        lax.stop_gradient(theirs),
        lax.stop_gradient(teacher.lm_head_kernel()),
        batch["loss_weights"],
        temperature,
    )


def linear_kl_divergence(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    teacher_hidden: Float[Array, "B T E"],
    teacher_kernel: Float[Array, "E V"],
    weights: Float[Array, "B T"],
    temperature: float,
) -> Float[Array, ""]:
    """Sums weight · KL(softmax(teacher's logits / T) ‖ softmax(logits / T)) over tokens, in nats.

    Logits of a chunk are computed again in the backward pass. Products are in the type of the hidden states with
    float32 sums, and everything after them is float32.

    Args:
        hidden: final hidden states, after the norm and any output multiplier.
        kernel: the head.
        teacher_hidden: likewise of the teacher, whose width may differ.
        teacher_kernel: its head.
        weights: factor on each token.
        temperature: T.
    """

    @jax.checkpoint
    def chunk(kernels: tuple[Array, Array], inputs: tuple[Array, Array, Array]) -> Array:
        ours, theirs, weights = inputs
        log_q, log_p = (_log_probs(x, kernel, temperature) for x, kernel in zip((ours, theirs), kernels, strict=True))
        return jnp.sum(weights * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))

    # Kernels are cast within a chunk, so that the gradients of chunks add up in the type that they are stored in.
    kernels = kernel, teacher_kernel
    chunks = to_chunks(kernel.shape[1], hidden, teacher_hidden, weights.astype(jnp.float32))
    return lax.scan(lambda total, inputs: (total + chunk(kernels, inputs), None), jnp.zeros(()), chunks)[0]


def _log_probs(x: Float[Array, "B c D"], kernel: Float[Array, "D V"], temperature: float) -> Float[Array, "B c V"]:
    logits = jnp.einsum("btd,dv->btv", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits / temperature, axis=-1)
