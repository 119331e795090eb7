"""One decoder layer with its linear layers' inputs in sight: what calibration runs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from cpm_jax.modeling.block import Block, causal_attend
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params
from cpm_jax.modeling.layers import Embed
from cpm_jax.modeling.rotary import rotation
from cpm_jax.quantization.gptq import second_moments

# Linear layers with the same inputs, in the order in which they are computed.
GROUPS = (
    ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    ("self_attn/o_proj",),
    ("mlp/gate_proj", "mlp/up_proj"),
    ("mlp/down_proj",),
)
LINEARS = tuple(name for group in GROUPS for name in group)


class InputStatistics(NamedTuple):
    """What quantisation needs to know of the inputs of a group of layers.

    Attributes:
        hessian: the sum of x xᵀ.
        magnitudes: the sum of |x|.
    """

    hessian: Float[Array, "K K"]
    magnitudes: Float[Array, " K"]


def linear_of(layer: Params, name: str) -> dict[str, Any]:
    """The parameters of a linear layer within a layer's tree."""
    room, _, linear = name.partition("/")
    return layer[room][linear]


@functools.partial(jax.jit, static_argnames="config")
def embed(config: ModelConfig, table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The residual stream before the first layer, from the embedding's table."""
    module = nnx.merge(nnx.split(Embed(config))[0], {"embedding": table})
    return module(tokens, config.multipliers.embedding)


@functools.lru_cache
def _declared(config: ModelConfig) -> nnx.GraphDef[Block]:
    return nnx.split(Block(config))[0]


@functools.partial(jax.jit, static_argnames=("config", "groups", "skip_initial_tokens"))
def run_layer(
    config: ModelConfig,
    layer: Params,
    x: Float[Array, "B T D"],
    *,
    groups: tuple[int, ...] = (),
    skip_initial_tokens: int = 0,
) -> tuple[Float[Array, "B T D"], dict[int, InputStatistics]]:
    """Runs a layer on whole sequences, one in each row.

    Args:
        config: of the model.
        layer: parameters of the layer.
        x: the residual stream before it.
        groups: which of `GROUPS` to take statistics of.
        skip_initial_tokens: tokens at the start of each sequence that the statistics leave out.

    Returns:
        The residual stream after it (what is not used is not computed), and the statistics.
    """
    block = nnx.merge(_declared(config), layer)
    found: dict[int, InputStatistics] = {}
    for group in groups:
        _watch(block, GROUPS[group][0], functools.partial(_record, found, group, skip_initial_tokens))
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    attend = causal_attend(config, jnp.ones(x.shape[:2], jnp.int32))
    angles = rotation(config, positions, length=x.shape[1])
    return block(x, angles, attend, config.multipliers.residual)[0], found


def _watch(block: Block, name: str, record: Any) -> None:
    """Puts a function in a linear layer's place that shows the inputs to `record` and then does the same."""
    room, _, linear_name = name.partition("/")
    module = getattr(block, room)
    linear = getattr(module, linear_name)

    def watched(x: jax.Array) -> jax.Array:
        record(x)
        return linear(x)

    setattr(module, linear_name, watched)


def _record(found: dict[int, InputStatistics], group: int, skip_initial_tokens: int, x: jax.Array) -> None:
    magnitudes = jnp.abs(x[:, skip_initial_tokens:].astype(jnp.float32)).sum((0, 1))
    found[group] = InputStatistics(second_moments(x, skip_initial_tokens), magnitudes)
