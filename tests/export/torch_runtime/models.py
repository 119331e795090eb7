"""Small models, exported, and what our decoder says of them: for the tests of the PyTorch runtime."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import bind, init_params
from cpm_jax.modeling.kv_cache import init_cache
from export.hf import export_hf
from export.torch_runtime.model import Decoder, load_model
from tests.export import small_models

PLAIN = dataclasses.replace(small_models.PLAIN, max_position_embeddings=512, initializer_range=0.15)


def params_of(config: ModelConfig):
    """Initial parameters with every norm scale and bias moved away from where it would not show."""
    leaves, tree = jax.tree.flatten(init_params(config, jax.random.key(1)))
    rng = np.random.default_rng(2)
    return jax.tree.unflatten(tree, [leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def tokens_of(length: int, batch_size: int = 1) -> np.ndarray:
    return np.random.default_rng(3).integers(0, PLAIN.vocab_size, (batch_size, length)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("config", "cache_length"))
def _logits(params, tokens, config, cache_length):
    model = bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = model.decode(tokens, positions, init_cache(config, tokens.shape[0], cache_length))
    return model.logits(hidden)


def jax_logits(config: ModelConfig, params, tokens: np.ndarray, cache_length: int) -> np.ndarray:
    """Logits of our decoder for a prompt that it reads into a cache; models that differ in layout share a program."""
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    params = {name: part for name, part in params.items() if name != "mtp_layers"}
    return np.asarray(_logits(params, tokens, config, cache_length))


def exported(folder: Path, layout: str, tokenizer: Tokenizer, **changes) -> tuple[ModelConfig, dict, Decoder]:
    """A model with `changes` to its config, its parameters, and what the runtime makes of its folder."""
    config = dataclasses.replace(PLAIN, **changes)
    params = params_of(config)
    export_hf(params, config, tokenizer, folder, layout=layout)
    return config, params, load_model(folder)
