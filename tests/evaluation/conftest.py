"""A small random model with its tokenizer, and tasks for it."""

import json

import jax
import pytest

from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.load import LoadedModel
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import init_params


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> LoadedModel:
    """Reads 192 tokens, so that long texts are long."""
    tokenizer = Tokenizer.train(
        ["the quick brown fox jumps over the lazy dog. Question: Answer: 日本 "] * 3, vocab_size=320
    )
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=2,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        d_ff=64,
        max_position_embeddings=192,
        initializer_range=0.3,
        dtype="float32",
    )
    return LoadedModel(config, init_params(config, jax.random.key(0)), tokenizer, 7, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def another_model(random_model) -> LoadedModel:
    return random_model._replace(params=init_params(random_model.config, jax.random.key(1)))


@pytest.fixture(scope="session")
def task_files(tmp_path_factory):
    """A .jsonl file of each kind."""
    folder = tmp_path_factory.mktemp("tasks")
    animals = ["fox", "dog", "cat", "hen", "cow"]
    records = {
        "choice": [
            {"question": f"Which is number {i}?", "choices": animals[: 2 + i % 4], "answer": i % 2} for i in range(30)
        ],
        "generation": [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(7)],
        "text": [{"text": "the quick brown fox " * (1 + 5 * i)} for i in range(9)],
    }
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
