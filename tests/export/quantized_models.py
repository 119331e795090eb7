"""A small model that is quantised, for the tests of both packings."""

import dataclasses

import jax

from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import init_params
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.pipeline import QuantizedModel, quantize_model

CONFIG = ModelConfig(
    vocab_size=320,
    num_layers=2,
    d_model=128,
    num_heads=2,
    num_kv_heads=1,
    d_ff=256,
    max_position_embeddings=256,
    initializer_range=0.15,
    dtype="float32",
)
ROUNDED = QuantizationConfig(method="rtn", group_size=128)


def rounded_model(quantization: QuantizationConfig = ROUNDED, **changes) -> QuantizedModel:
    """The model with random weights and `changes` to its config, rounded to nearest."""
    config = dataclasses.replace(CONFIG, **changes)
    return quantize_model(init_params(config, jax.random.key(1)), config, quantization)


def small_tokenizer() -> Tokenizer:
    return Tokenizer.train(["def add(a, b):\n    return a + b\n"] * 3, 300)
