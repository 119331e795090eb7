"""Multi-token prediction (DeepSeek-V3 report §2.2, MiniCPM4 report §2.3, MiMo report §2.3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpm_jax.modeling.block import Block, causal_attend
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.layers import Linear, RMSNorm
from cpm_jax.modeling.rotary import Rotation


class MtpLayer(Block):
    """A decoder layer that predicts one token further ahead than the hidden state it is given.

    x_t = input_proj([hidden_layernorm(h_t) ; token_layernorm(Emb(next_t))]), one decoder layer, final_layernorm.
    The hidden state comes first in the concatenation, as in the three reports. Embedding and head are the model's.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.config = config
        self.token_layernorm = RMSNorm(config)
        self.hidden_layernorm = RMSNorm(config)
        self.input_proj = Linear(config, 2 * config.d_model, config.d_model, ("embed", "embed"))
        self.final_layernorm = RMSNorm(config)

    def predict(
        self,
        hidden: Float[Array, "B T D"],
        next_embeddings: Float[Array, "B T D"],
        angles: Rotation,
        segment_ids: jax.Array,
        residual_multiplier: float | jax.Array,
    ) -> Float[Array, "B T D"]:
        """Combines hidden states with the embeddings of the tokens that follow them; returns the head's input."""
        both = jnp.concatenate([self.hidden_layernorm(hidden), self.token_layernorm(next_embeddings)], axis=-1)
        x, _ = self(self.input_proj(both), angles, causal_attend(self.config, segment_ids), residual_multiplier)
        return self.final_layernorm(x)
