"""Decoding with a cache against the full forward pass, at every position."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.modeling import kv_cache
from cpm_jax.modeling.config import ModelConfig, RopeConfig
from cpm_jax.modeling.decoder import Params, abstract_params, bind, init_params
from cpm_jax.modeling.kv_cache import KVCache, init_cache

LENGTH = 20


@pytest.fixture(
    params=[
        {},
        {"scan_layers": False},
        {"num_kv_heads": 1},
        {"num_kv_heads": 4, "attention_bias": True, "tie_word_embeddings": False, "remat": "full"},
    ],
    ids=["gqa", "loop", "mqa", "mha-bias"],
)
def config(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(tiny_config, **request.param)


@functools.lru_cache
def make(config: ModelConfig, length: int = LENGTH) -> tuple[Params, np.ndarray, jax.Array]:
    """Parameters, tokens, and the hidden states of the full forward pass."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length))
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    full = jax.jit(lambda p: bind(config, p)(tokens, positions, np.ones_like(tokens)))(params)
    return params, tokens, full


@functools.lru_cache
def decoder(config: ModelConfig) -> Callable:
    @jax.jit
    def decode(params: Params, tokens: jax.Array, positions: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return bind(config, params).decode(tokens, positions, cache)

    return decode


def close(ours: jax.Array, full: jax.Array) -> None:
    np.testing.assert_allclose(ours, full, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("chunks", [[LENGTH], [7, 6, 7], [12] + [1] * 8, [1] * LENGTH], ids=str)
def test_prefill_in_chunks_and_single_tokens(config: ModelConfig, chunks: list[int]) -> None:
    params, tokens, full = make(config)
    decode, cache, start = decoder(config), init_cache(config, 2, LENGTH + 5), 0
    for size in chunks:
        span = np.arange(start, start + size)
        hidden, cache = decode(params, tokens[:, span], np.stack([span, span]), cache)
        close(hidden, full[:, span])
        start += size


def test_right_padded_prompts_of_different_length(config: ModelConfig) -> None:
    """The padding fills slots with garbage, which each row overwrites before it sees them."""
    params, tokens, full = make(config)
    prompt_lengths, width = np.array([4, 11]), 13
    inside = np.arange(width) < prompt_lengths[:, None]
    prompts = np.where(inside, tokens[:, :width], config.vocab_size - 1)
    decode = decoder(config)
    positions = np.broadcast_to(np.arange(width), prompts.shape)
    hidden, cache = decode(params, prompts, positions, init_cache(config, 2, LENGTH))
    close(hidden[inside], full[:, :width][inside])
    rows = np.arange(2)
    for step in range(LENGTH - prompt_lengths.max()):
        at = prompt_lengths + step
        hidden, cache = decode(params, tokens[rows, at][:, None], at[:, None], cache)
        close(hidden[:, 0], full[rows, at])


@pytest.mark.parametrize("block", [4, 7, LENGTH])
def test_blocks_of_slots_do_not_change_results(
    tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(kv_cache, "KEY_BLOCK", block)
    params, tokens, full = make(tiny_config)
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    hidden, _ = bind(tiny_config, params).decode(tokens, positions, init_cache(tiny_config, 2, LENGTH))
    close(hidden, full)


def test_longrope_follows_the_length_of_the_cache(tiny_config: ModelConfig) -> None:
    """A prompt that is still short is read with the factors that its long continuation needs."""
    factors = tuple(float(x) for x in range(1, 9))
    rope = RopeConfig(short_factor=(1.0,) * 8, long_factor=factors, original_max_position_embeddings=16)
    config = dataclasses.replace(tiny_config, rope=rope)
    params, tokens, full = make(config)
    decode, cache = decoder(config), init_cache(config, 2, LENGTH)
    for span in (np.arange(5), np.arange(5, LENGTH)):
        hidden, cache = decode(params, tokens[:, span], np.stack([span, span]), cache)
        close(hidden, full[:, span])


def test_tokens_beyond_the_cache_are_dropped(tiny_config: ModelConfig) -> None:
    params, tokens, _ = make(tiny_config)
    decode, empty = decoder(tiny_config), init_cache(tiny_config, 2, 4)
    beyond = np.full((2, 1), 4)
    _, cache = decode(params, tokens[:, :1], beyond, empty)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), cache, empty)))


def test_more_tokens_than_slots_are_refused(tiny_config: ModelConfig) -> None:
    params, tokens, _ = make(tiny_config)
    cache, positions = init_cache(tiny_config, 2, 4), np.broadcast_to(np.arange(5), (2, 5))
    message = "5 new tokens in a cache of 4 slots: at most 4 fit"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(bind(tiny_config, params).decode, tokens[:, :5], positions, cache)
    q, k = (jnp.zeros((2, 5, n, tiny_config.head_size)) for n in (tiny_config.num_heads, tiny_config.num_kv_heads))
    with pytest.raises(ValueError, match=message):
        kv_cache.attend_to_cache(q, k, k, positions, cache, 0)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_step_updates_the_cache_in_place(tiny_config: ModelConfig, scan_layers: bool) -> None:
    config = dataclasses.replace(tiny_config, num_layers=8, scan_layers=scan_layers)
    cache = jax.eval_shape(lambda: init_cache(config, 2, 4096))
    token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    step = jax.jit(lambda p, t, at, cache: bind(config, p).decode(t, at, cache), donate_argnums=3)
    memory = step.lower(abstract_params(config), token, token, cache).compile().memory_analysis()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4


def test_bfloat16_cache(tiny_config: ModelConfig) -> None:
    """Half the memory for a rounding of keys and values to 8 bits."""
    params, tokens, full = make(tiny_config)
    cache = init_cache(tiny_config, 2, LENGTH, dtype="bfloat16")
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    hidden, cache = decoder(tiny_config)(params, tokens, positions, cache)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert hidden.dtype == jnp.float32
    assert np.abs(np.asarray(hidden - full)).max() < 2**-8 * 4 * np.abs(full).max()
