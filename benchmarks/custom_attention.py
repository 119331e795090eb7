"""The decoder with an attention that a study chooses, layer by layer, and the training of it in one program."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cpm_jax.modeling.attention import Selectors
from cpm_jax.modeling.block import Block, run_layers
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.decoder import Decoder, Params, bind
from cpm_jax.modeling.rotary import rotation
from cpm_jax.modeling.sparse_attention import choose_blocks
from cpm_jax.training.optimizer import Optimizer
from cpm_jax.training.train_state import TrainState
from kernels_pallas.attention.api import dot_product_attention
from kernels_pallas.block_sparse_attention.api import block_sparse_attention
from kernels_pallas.linear_cross_entropy.api import linear_cross_entropy

# From a layer's index, q, k, v and selectors to the attended values and what else is to be kept of the layer.
LayerAttend = Callable[[Any, jax.Array, jax.Array, jax.Array, Selectors], tuple[jax.Array, Any]]
Batch = dict[str, Any]
Implementation = Literal["reference"] | None


def plain_on_gpu() -> Implementation:
    """What attends fast: on a GPU all scores at once, elsewhere what the library chooses.

    What runs on any device walks tiles one after the other, which keeps a GPU waiting; and all scores of the rows of
    these studies fit into its memory.
    """
    return "reference" if jax.default_backend() == "gpu" else None


def attention_by_config(sparse: SparseConfig | None, implementation: Implementation) -> LayerAttend:
    """The library's own attention of rows of one document, dense or sparse at every length; keeps nothing."""

    def attend(index: Any, q: jax.Array, k: jax.Array, v: jax.Array, selectors: Selectors) -> tuple[jax.Array, None]:
        if sparse is None:
            return dot_product_attention(q, k, v, implementation=implementation), None
        block_ids = choose_blocks(selectors, jnp.ones(q.shape[:2], jnp.int32), sparse)
        size = sparse.block_size
        return block_sparse_attention(q, k, v, block_ids, block_size=size, implementation=implementation), None

    return attend


def hidden_states(
    model: Decoder, tokens: Int[Array, "B T"], attend: LayerAttend, kept: Any = None
) -> tuple[Float[Array, "B T D"], Any]:
    """Hidden states after the final norm, of rows of one document each.

    Args:
        model: from `bind`.
        tokens: token ids.
        attend: computes attention.
        kept: zeros [L, ...] for what `attend` keeps of each layer, or None.

    Returns:
        The hidden states, and `kept` filled.
    """
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    angles = rotation(model.config, positions, length=tokens.shape[1])

    def body(carry: tuple[Array, Any], block: Block, index: Any) -> tuple[Array, Any]:
        x, kept = carry
        x, new = block(x, angles, functools.partial(attend, index), model.multipliers.residual)
        return x, jax.tree.map(lambda layers, one: layers.at[index].set(one), kept, new)

    embedded = model.embed_tokens(tokens, model.multipliers.embedding)
    x, kept = run_layers(model.config, model.layers, body, (embedded, kept))
    return model.norm(x), kept


def losses_of(
    model: Decoder, hidden: Array, targets: Array, weights: Array, implementation: Implementation
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """The weighted sum of the losses, and the loss of each token in nats."""
    kernel = model.lm_head_kernel()
    return linear_cross_entropy(model.head_inputs(hidden), kernel, targets, weights, implementation=implementation)


def make_step(
    config: ModelConfig, optimizer: Optimizer, attend: LayerAttend, implementation: Implementation
) -> Callable[[TrainState, Batch], tuple[TrainState, Float[Array, ""]]]:
    """A step of training to be mapped and scanned over: `training.train_step` with another attention, and no more.

    Args:
        config: the model; its `remat` says what is recomputed.
        optimizer: from `make_optimizer`.
        attend: computes attention.
        implementation: of the loss.

    Returns:
        A function (state, batch with tokens, targets and loss_weights) -> (state, loss).
    """

    def loss(params: Params, batch: Batch) -> Float[Array, ""]:
        model = bind(config, params)
        hidden, _ = hidden_states(model, batch["tokens"], attend)
        weights = batch["loss_weights"]
        return losses_of(model, hidden, batch["targets"], weights, implementation)[0] / jnp.sum(weights)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Float[Array, ""]]:
        value, grads = jax.value_and_grad(loss)(state.params, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        params = optax.apply_updates(state.params, updates)
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), value

    return step
