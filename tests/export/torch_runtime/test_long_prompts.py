"""A prompt of more than 32K tokens against our decoder, both in chunks: logits after every prefix of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cpm_jax.modeling.config import RopeConfig, SparseConfig
from cpm_jax.modeling.decoder import bind
from cpm_jax.modeling.kv_cache import init_cache
from export.torch_runtime import infllm
from tests.export.small_models import small_tokenizer
from tests.export.torch_runtime.models import exported, tokens_of

LENGTH, OUR_CHUNK, CHUNK = 32_805, 2187, 500
SIZES = {
    "num_layers": 1,
    "d_model": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "d_ff": 48,
    "max_position_embeddings": LENGTH,
    "rope": RopeConfig(
        short_factor=(1.0,) * 8,
        long_factor=tuple(1.0 + 1.5 * i for i in range(8)),
        original_max_position_embeddings=4096,
    ),
}
# Of 513 blocks a query sees 20.
SPARSE = SparseConfig(window_size=512, topk=12, dense_len=8192)
ROUNDING = 1e-5  # relative, between two scores of blocks


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def our_chunk(params, tokens, first, cache, config):
    model = bind(config, params)
    hidden, cache = model.decode(tokens, first + jnp.arange(tokens.shape[1])[None], cache)
    return model.logits(hidden)[0], cache


def our_logits(params, tokens, config):
    """Logits of all positions [T, V]."""
    cache, logits = init_cache(config, 1, LENGTH), []
    for first in range(0, LENGTH, OUR_CHUNK):
        part, cache = our_chunk(params, tokens[:, first : first + OUR_CHUNK], first, cache, config)
        logits.append(np.asarray(part))
    return np.concatenate(logits)


@torch.inference_mode()
def runtime_logits(model, tokens):
    """The same by the runtime."""
    cache, logits = model.init_cache(LENGTH), []
    for first in range(0, LENGTH, CHUNK):
        part = torch.from_numpy(tokens[:, first : first + CHUNK]).long()
        end = first + part.shape[1]
        logits.append(model.logits(model(part, torch.arange(first, end), cache, end))[0].numpy())
    return np.concatenate(logits)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_logits_after_1_to_32k_tokens_are_ours(sparse, tmp_path, monkeypatch):
    tied = []

    def rank_blocks(scores, positions, config):
        """The runtime's, noting queries that could choose another block if scores were rounded otherwise.

        Equal scores are not among them: two blocks that the same kernel touches, of which everybody takes the lower.
        """
        ids = rank(scores, positions, config)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(3, ids.clamp(min=0), ids >= 0)
        block, own = torch.arange(scores.shape[-1]), (positions // config.block_size)[:, None]
        by_score = (block >= config.init_blocks) & (block <= own - config.num_local)
        least = scores.masked_fill(~(by_score & chosen), torch.inf).amin(dim=-1)
        next_best = scores.masked_fill(~by_score | chosen, -torch.inf).amax(dim=-1)
        tied.append(((least * (1 - ROUNDING) < next_best) & (next_best < least)).any(dim=1)[0].numpy())
        return ids

    rank = infllm.rank_blocks
    monkeypatch.setattr(infllm, "rank_blocks", rank_blocks)
    config, params, model = exported(tmp_path / "hf", "minicpm", small_tokenizer(), sparse_config=sparse, **SIZES)
    tokens = tokens_of(LENGTH)
    expected, found = our_logits(params, tokens, config), runtime_logits(model, tokens)
    assert np.abs(expected).max() > 1
    errors = np.abs(found - expected).max(axis=1)
    either = np.concatenate(tied) if sparse else np.zeros(LENGTH, bool)
    assert either.mean() < 0.001
    assert errors[~either].max() < 1e-4
