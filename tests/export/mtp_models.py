"""Models whose MTP layers are often right, and what our decoder's MTP layers say: for the tests of runtimes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import bind


def drafting_params(params: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Random parameters changed so that MTP layers are often right, and often not.

    Branches are small, so that the next token mostly depends on the last one alone, which MTP layers pass on to the
    same norm and head.
    """

    def change(path: tuple[Any, ...], leaf: jax.Array) -> np.ndarray:
        value, name = np.asarray(leaf), jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("o_proj/kernel", "down_proj/kernel")):
            return 0.05 * value
        if name == "mtp_layers/input_proj/kernel":
            width = config.d_model
            return np.concatenate([np.zeros((width, width)), np.eye(width)]).astype(np.float32) + 0.05 * value
        if name == "mtp_layers/token_layernorm/scale":
            return np.ones_like(value)
        if name == "mtp_layers/final_layernorm/scale":
            return np.tile(np.asarray(params["norm"]["scale"]), (len(value), 1))
        return value

    return jax.tree_util.tree_map_with_path(change, params)


@functools.partial(jax.jit, static_argnames="config")
def mtp_logits(params: dict[str, Any], tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits of the model and of each MTP layer, which is given the tokens that follow, [1 + M, B, T, V]."""
    model, ones = bind(config, params), jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = [model(tokens, positions, ones)]
    for depth in range(config.num_nextn_predict_layers):
        hidden.append(model.mtp(hidden[-1], jnp.roll(tokens, -depth - 1, axis=1), positions, ones, depth))
    return jnp.stack([model.logits(x) for x in hidden])
