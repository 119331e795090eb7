"""Grouped-query self-attention: projections and rotation here, the softmax in `kernels_pallas` or over the cache."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from cpm_jax.common.sharding import constrain
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.layers import Linear
from cpm_jax.modeling.rotary import Rotation, apply_rotary

# What sparse attention compares to choose blocks: queries [B, T, N, H] and keys [B, T, K, H], rotated or not.
Selectors = tuple[jax.Array, jax.Array]
# From q [B, T, N, H], new k, v [B, T, K, H] and selectors to the attended values [B, T, N, H] and the updated cache, if
# any. Dense attention leaves the selectors aside.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Selectors], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    """Self-attention with rotary embedding (arXiv 2305.13245 for grouped queries).

    Parameters: q_proj [D, N·H], k_proj and v_proj [D, K·H] (with biases when `attention_bias`), o_proj [N·H, D].
    """

    def __init__(self, config: ModelConfig):
        self.head_size = config.head_size
        self.use_nope = config.sparse_config is not None and config.sparse_config.use_nope
        q_size, kv_size = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        bias = config.attention_bias
        self.q_proj = Linear(config, config.d_model, q_size, ("embed", "heads"), use_bias=bias)
        self.k_proj = Linear(config, config.d_model, kv_size, ("embed", "kv_heads"), use_bias=bias)
        self.v_proj = Linear(config, config.d_model, kv_size, ("embed", "kv_heads"), use_bias=bias)
        self.o_proj = Linear(config, q_size, config.d_model, ("heads", "embed"))

    def __call__(self, x: Float[Array, "B T D"], angles: Rotation, attend: Attend) -> tuple[Float[Array, "B T D"], Any]:
        """Attends with the given softmax; returns the output and what `attend` returned beside it."""
        with jax.named_scope("self_attn"):
            unrotated = self._heads(self.q_proj(x), "heads"), self._heads(self.k_proj(x), "kv_heads")
            q, k = (apply_rotary(heads, angles) for heads in unrotated)
            v = self._heads(self.v_proj(x), "kv_heads")
            attended, cache = attend(q, k, v, unrotated if self.use_nope else (q, k))
            return self.o_proj(attended.reshape(*x.shape[:2], -1)), cache

    def _heads(self, x: Float[Array, "B T NH"], axis: str) -> Float[Array, "B T N H"]:
        heads = x.reshape(*x.shape[:2], -1, self.head_size)
        return constrain(heads, ("batch", "length", axis, "head_dim"))
