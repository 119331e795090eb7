"""The SwiGLU feed-forward layer (arXiv 2002.05202)."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from cpm_jax.common.sharding import constrain
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.layers import Linear


@jax.checkpoint  # the backward pass keeps the two operands alone, not what lies between
def _swiglu(gate: Float[Array, "B T F"], up: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    return jax.nn.silu(gate) * up


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)).

    Parameters: gate_proj and up_proj [D, F], down_proj [F, D].
    """

    def __init__(self, config: ModelConfig):
        self.gate_proj = Linear(config, config.d_model, config.d_ff, ("embed", "mlp"))
        self.up_proj = Linear(config, config.d_model, config.d_ff, ("embed", "mlp"))
        self.down_proj = Linear(config, config.d_ff, config.d_model, ("mlp", "embed"))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the layer to every position by itself."""
        with jax.named_scope("mlp"):
            inner = _swiglu(self.gate_proj(x), self.up_proj(x))
            return self.down_proj(constrain(inner, ("batch", "length", "mlp")))
