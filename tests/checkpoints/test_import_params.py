"""Imported weights compute what the classes of transformers compute that wrote them."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import open_source
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, bind

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + 0.1 * i for i in range(8)],
    "long_factor": [1 + 1.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 1.4 / 3**0.5,
    "attention_multiplier": 0.25,
    "logits_scaling": 4.0,
}
CASES = {
    "llama": ("Llama", {}),
    "llama tied, wide heads": ("Llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 yarn": ("Qwen2", {"rope_parameters": YARN}),
    "granite": ("Granite", GRANITE),
    "granite longrope": ("Granite", GRANITE | {"tie_word_embeddings": True, "rope_parameters": LONGROPE}),
}


def save(name: str, folder: Path, **changes: object) -> transformers.PreTrainedModel:
    """A model of random weights, none of them where it would not show, saved in shards by transformers."""
    config = getattr(transformers, f"{name}Config")(**SIZES, **changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def logits(config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    decoder = bind(config, params)
    return np.asarray(decoder.logits(decoder(jnp.asarray(tokens), positions, jnp.ones_like(tokens))))


@pytest.mark.parametrize("case", CASES)
def test_logits_of_transformers(case: str, tmp_path: Path) -> None:
    name, changes = CASES[case]
    model = save(name, tmp_path, **changes)
    config, params = import_params(open_source(tmp_path))
    tokens = np.random.default_rng(0).integers(0, 300, (2, 100))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits(config, params, tokens), expected, rtol=0, atol=5e-5)
