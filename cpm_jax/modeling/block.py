"""One decoder layer, and how a stack of them is declared and run."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from cpm_jax.common.sharding import activation_spec, constrain
from cpm_jax.modeling.attention import Attend, Attention, Selectors
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.feed_forward import FeedForward
from cpm_jax.modeling.layers import RMSNorm, factor
from cpm_jax.modeling.rotary import Rotation
from cpm_jax.modeling.sparse_attention import BLOCK_IDS, sparse_attention
from kernels_pallas.attention.api import dot_product_attention

ModuleT = TypeVar("ModuleT", bound=nnx.Module)
CarryT = TypeVar("CarryT")


class Block(nnx.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: ModelConfig):
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = FeedForward(config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Rotation,
        attend: Attend,
        residual_multiplier: float | jax.Array,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Applies the layer.

        Args:
            x: residual stream.
            angles: rotation of each position.
            attend: the softmax.
            residual_multiplier: factor on both branches, `multipliers.residual` of the decoder.

        Returns:
            The new residual stream, and what `attend` returned beside its output.
        """
        attended, cache = self.self_attn(self.input_layernorm(x), angles, attend)
        residual_multiplier = factor(residual_multiplier, x.dtype)
        x = constrain(x + attended * residual_multiplier, ("batch", "length", "embed"))
        x = x + self.mlp(self.post_attention_layernorm(x)) * residual_multiplier
        return constrain(x, ("batch", "length", "embed")), cache


def causal_attend(config: ModelConfig, segment_ids: jax.Array) -> Attend:
    """Attention within the row, to earlier tokens of the same segment; sparse where `config.sparse_config` applies."""
    sparse = config.sparse_config
    if sparse is not None and not sparse.applies(segment_ids.shape[1]):
        sparse = None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, selectors: Selectors) -> tuple[jax.Array, None]:
        spec = activation_spec(("batch", None, "attention_heads", None), q.shape)
        # Said on both sides, so that what changes its layout is heads alone: not rotary angles, nor what o_proj sums.
        q, k, v = (
            constrain(x, ("batch", "length", axis, None))
            for x, axis in ((q, "heads"), (k, "kv_heads"), (v, "kv_heads"))
        )
        if sparse is None:
            attended = dot_product_attention(q, k, v, segment_ids=segment_ids, partition_spec=spec)
        else:
            attended = sparse_attention(q, k, v, selectors, segment_ids, sparse)
        return constrain(attended, ("batch", "length", "heads", None)), None

    return attend


def stack(layer: ModuleT, num_layers: int) -> ModuleT:
    """Turns a declared layer into a declared stack: every parameter gets a leading axis "layers"."""
    for _, param in nnx.iter_graph(layer):
        if isinstance(param, nnx.Param):
            declared = param.get_value()
            param.set_value(jax.ShapeDtypeStruct((num_layers, *declared.shape), declared.dtype))
            param.set_metadata(axes=("layers", *param.get_metadata("axes")))
    return layer


def select(stacked: ModuleT, index: int) -> ModuleT:
    """The layer at a static index of a stack."""
    graphdef, state = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], nnx.to_pure_dict(state)))


def _remat(config: ModelConfig, step: Callable) -> Callable:
    if config.remat == "none":
        return step
    policies = jax.checkpoint_policies
    # Chosen blocks are small beside what choosing them costs.
    saved = policies.save_only_these_names(BLOCK_IDS)
    if config.remat == "dots":
        # Attention scores are products with batch dimensions: they are recomputed, and the projections kept.
        saved = policies.save_from_both_policies(saved, policies.dots_with_no_batch_dims_saveable)
    # A scan already keeps the recomputation apart from the forward pass, so the costly barriers are not needed there.
    return jax.checkpoint(step, policy=saved, prevent_cse=not config.scan_layers)


def run_layers(
    config: ModelConfig,
    stacked: ModuleT,
    body: Callable[[CarryT, ModuleT, jax.Array | int], CarryT],
    carry: CarryT,
) -> CarryT:
    """Runs `carry = body(carry, layer, index)` over a stack of layers.

    Args:
        config: chooses between `lax.scan` and an unrolled loop, and what the backward pass recomputes.
        stacked: layers with parameters of shape [L, ...], or tuples of L arrays, which are never scanned over.
        body: applies one layer, rematerialised as `config.remat` says.
        carry: the initial carry.
    """
    graphdef, state = nnx.split(stacked)
    params = nnx.to_pure_dict(state)

    def step(carry: CarryT, layer: tuple[Any, Any]) -> tuple[CarryT, None]:
        layer_params, index = layer
        with jax.named_scope("layer"):
            return body(carry, nnx.merge(graphdef, layer_params), index), None

    step = _remat(config, step)
    leaves, treedef = jax.tree.flatten(params, is_leaf=lambda leaf: isinstance(leaf, tuple))
    if config.scan_layers and not isinstance(leaves[0], tuple):
        num_layers = leaves[0].shape[0]
        return jax.lax.scan(step, carry, (params, jnp.arange(num_layers)))[0]
    # Unstacked once: the gradient is then one concatenation, not a sum of L arrays that are zero but for one layer.
    unstacked = [leaf if isinstance(leaf, tuple) else jnp.unstack(leaf) for leaf in leaves]
    for index, layer_leaves in enumerate(zip(*unstacked, strict=True)):
        carry, _ = step(carry, (jax.tree.unflatten(treedef, layer_leaves), index))
    return carry
