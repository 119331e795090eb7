"""The small models that tests of exports share: sizes, rotary embeddings, parameters of which each one shows."""

import functools

import jax
import numpy as np

from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig, RopeConfig, SparseConfig
from cpm_jax.modeling.decoder import Params, abstract_params

TEXTS = (
    "def add(a, b):\n    return a + b\n\n\nclass Tree:\n    pass\n",
    "学而时习之,不亦说乎?有朋自远方来,不亦乐乎?  \tTabs and  spaces 🙂 12345\n",
)
PLAIN = ModelConfig(
    vocab_size=320,
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    d_ff=96,
    max_position_embeddings=256,
    dtype="float32",
)
MUP = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 16}
LONGROPE = RopeConfig(
    short_factor=tuple(1.0 + 0.1 * i for i in range(8)),
    long_factor=tuple(1.0 + 1.5 * i for i in range(8)),
    original_max_position_embeddings=64,
)
YARN = RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=16.0)
LLAMA3 = RopeConfig(rope_theta=5e5, scaling="llama3", factor=8.0, original_max_position_embeddings=32)
DYNAMIC = RopeConfig(scaling="dynamic", factor=2.0, original_max_position_embeddings=48)
# Of the 10 blocks of a row of 150 tokens a query sees 5.
SPARSE = SparseConfig(
    kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=3, dense_len=64, variant="huggingface"
)


@functools.cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train([*TEXTS, "import os\nfor x in range(10): print(x)\n"] * 3, 300)


def random_params(config: ModelConfig) -> Params:
    """Parameters with every norm scale and bias away from where it would not show; nothing is compiled for them."""
    random = np.random.default_rng(1)

    def draw(path, leaf):
        mean, std = (1.0, 0.1) if path[-1].key == "scale" else (0.0, 0.15)
        return random.normal(mean, std, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))
