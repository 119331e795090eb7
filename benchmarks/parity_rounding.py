"""Our decoder with its activations rounded as llama.cpp rounds what it multiplies by packed weights.

On a CPU llama.cpp multiplies integers: activations become codes of 8 bits, with a scale for each block. What it says of
packed weights is therefore compared with a decoder that does the same, so that what remains is rounding of sums, and
codes that it tips over.
"""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cpm_jax.modeling import decoder, layers
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Decoder

# Activations that share a scale, by the type of the weights: llama.cpp's blocks q8_0 and q8_K.
BLOCKS = {"Q8_0": 32, "TQ2_0": 256}


def round_activations(x: Float[Array, "... D"], gguf_type: str) -> Float[Array, "... D"]:
    """Rounds each block to whole multiples of its largest magnitude / 127."""
    blocks = x.reshape(*x.shape[:-1], -1, BLOCKS[gguf_type])
    scales = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / 127
    codes = jnp.round(blocks / jnp.where(scales > 0, scales, 1))
    if gguf_type == "Q8_0":  # codes come of the exact scale, and are multiplied by that which is stored
        scales = scales.astype(jnp.float16).astype(x.dtype)
    return (codes * scales).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("config", "gguf_type"))
def _logits(config: ModelConfig, params: Any, tokens: jax.Array, gguf_type: str) -> jax.Array:
    def multiply(self: layers.Linear, x: jax.Array) -> jax.Array:
        out = round_activations(x, gguf_type) @ self.kernel[...]
        return out if self.bias is None else out + self.bias[...]

    def head_inputs(self: Decoder, hidden: jax.Array) -> jax.Array:
        inputs = exactly(self, hidden)
        if gguf_type == "Q8_0":
            return round_activations(inputs, gguf_type)
        return inputs.astype(jnp.float16).astype(inputs.dtype)  # the head of ternary files is float16

    exactly = Decoder.head_inputs
    with mock.patch.object(layers.Linear, "__call__", multiply), mock.patch.object(Decoder, "head_inputs", head_inputs):
        model = decoder.bind(config, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.logits(model(tokens, positions, jnp.ones_like(tokens)))


def rounded_logits_of(config: ModelConfig, params: Any, ids: list[int], gguf_type: str) -> Float[np.ndarray, "T V"]:
    """Logits of one row.

    Args:
        config: the model, in float32.
        params: the values of the weights in the file.
        ids: token ids.
        gguf_type: of the weights, a key of `BLOCKS`.
    """
    return np.asarray(_logits(config, params, jnp.asarray([ids], jnp.int32), gguf_type))[0]
