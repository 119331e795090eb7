"""Shared by the tests of quantisation."""

import jax
import jax.numpy as jnp
import pytest

from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, bind, init_params


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """MiniCPM's multipliers, a tied head, grouped queries, biases, and a width, 96 = 32 · 3, that is no power of 2."""
    return ModelConfig(
        vocab_size=128,
        num_layers=2,
        d_model=96,
        num_heads=4,
        num_kv_heads=2,
        d_ff=128,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_bias=True,
        scale_emb=12.0,
        scale_depth=1.4,
        dim_model_base=32,
        initializer_range=0.1,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def params(config) -> Params:
    """Initial parameters with every norm scale and bias moved away from where it would not show."""
    leaves, tree = jax.tree.flatten(init_params(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(scope="session")
def tokens(config) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (5, 24), 0, config.vocab_size)


@pytest.fixture(scope="session")
def logits():
    """Logits of a model: (config, params, tokens) to [B, T, V]."""

    def compute(config, params, tokens):
        model = bind(config, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.logits(model(tokens, positions, jnp.ones_like(tokens)))

    return jax.jit(compute, static_argnums=0)
