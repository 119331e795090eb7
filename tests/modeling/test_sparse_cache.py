"""Sparse decoding with a cache against the full forward pass, at every position, and the kernels that it keeps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.modeling import sparse_cache
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.decoder import Params, bind, init_params
from cpm_jax.modeling.kv_cache import KVCache, init_cache
from cpm_jax.modeling.sparse_cache import SparseKVCache
from kernels_pallas.block_selection.api import select_blocks
from kernels_pallas.compress_keys.api import compress_keys

LENGTH = 45
# Chunks that begin and end within blocks and kernels, of few sizes: each is a program of its own.
CHUNKS = [7, 15, 1, 7, 15]
# An eighth of the published sizes, and kernels that overlap more: of 12 blocks of 4 tokens a query sees 4.
SMALL = SparseConfig(kernel_size=4, kernel_stride=2, block_size=4, window_size=8, topk=2, dense_len=-1)


@pytest.fixture(
    params=[
        {},
        pytest.param({"use_nope": True}, marks=pytest.mark.slow),
        pytest.param({"lse_approximation": False}, marks=pytest.mark.slow),
        pytest.param({"variant": "huggingface", "kernel_size": 3, "kernel_stride": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def config(request: pytest.FixtureRequest, tiny_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(tiny_config, sparse_config=dataclasses.replace(SMALL, **request.param))


@functools.lru_cache
def make(config: ModelConfig, length: int = LENGTH) -> tuple[Params, np.ndarray, np.ndarray]:
    """Parameters, tokens, and the hidden states of the full forward pass."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, length))
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    full = jax.jit(lambda p: bind(config, p)(tokens, positions, np.ones_like(tokens)))(params)
    return params, tokens, np.asarray(full)


@functools.lru_cache
def decoder(config: ModelConfig) -> Callable:
    @jax.jit
    def decode(params: Params, tokens: Any, positions: Any, cache: SparseKVCache) -> tuple[jax.Array, SparseKVCache]:
        return bind(config, params).decode(tokens, positions, cache)

    return decode


def close(ours: Any, full: Any) -> None:
    np.testing.assert_allclose(ours, full, rtol=1e-5, atol=2e-5)


def read(config: ModelConfig, chunks: list[int], length: int = LENGTH) -> tuple[np.ndarray, SparseKVCache]:
    """Hidden states of all tokens, read in chunks, and the cache."""
    params, tokens, _ = make(config)
    cache, start, hidden = init_cache(config, 2, length), 0, []
    for size in chunks:
        span = np.arange(start, start + size)
        out, cache = decoder(config)(params, tokens[:, span], np.stack([span, span]), cache)
        hidden.append(out)
        start += size
    return np.concatenate(hidden, axis=1), cache


def kernels_of(keys: jax.Array, sparse: SparseConfig, coarse: bool = False) -> jax.Array:
    """Kernels of the rotated or unrotated keys [L, B, K, S, H] of a cache, computed at once."""
    sizes = sparse.selection
    size, stride = sizes.kernel_size, sizes.kernel_stride
    if coarse:
        size, stride = sizes.coarse_kernel_size, sizes.coarse_kernel_stride
    by_layer = [jnp.swapaxes(layer, 1, 2) for layer in keys]
    return jnp.stack([compress_keys(k, kernel_size=size, kernel_stride=stride) for k in by_layer])


@pytest.mark.parametrize("chunks", [[LENGTH], CHUNKS, [1] * LENGTH], ids=str)
def test_prefill_in_chunks_and_single_tokens(config: ModelConfig, chunks: list[int]) -> None:
    """Same hidden states as without a cache, and the kernels of all keys, however they came."""
    hidden, cache = read(config, chunks)
    close(hidden, make(config)[2])
    sparse = config.sparse_config
    keys = cache.keys if cache.selecting is None else cache.selecting
    close(cache.kernels, kernels_of(keys, sparse))
    assert (cache.coarse_kernels is not None) == sparse.lse_approximation
    if sparse.lse_approximation:
        close(cache.coarse_kernels, kernels_of(keys, sparse, coarse=True))


@pytest.mark.parametrize("chunks", [CHUNKS, pytest.param([1] * LENGTH, marks=pytest.mark.slow)], ids=str)
def test_the_same_blocks_are_chosen(config: ModelConfig, chunks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the ids of whole prefill, in every layer."""
    chosen: list[np.ndarray] = []

    def spy(*args: Any, **kwargs: Any) -> jax.Array:
        ids = select_blocks(*args, **kwargs)
        jax.debug.callback(lambda x: chosen.append(np.asarray(x)), ids, ordered=True)
        return ids

    monkeypatch.setattr(sparse_cache, "select_blocks", spy)
    decoder.cache_clear()

    def ids_of(chunks: list[int]) -> np.ndarray:
        chosen.clear()
        read(config, chunks)
        jax.effects_barrier()
        layers = [chosen[i :: config.num_layers] for i in range(config.num_layers)]
        return np.stack([np.concatenate(parts, axis=2) for parts in layers])

    whole = ids_of([LENGTH])
    assert whole.shape == (2, 2, 2, LENGTH, 4)
    np.testing.assert_array_equal(ids_of(chunks), whole)
    decoder.cache_clear()


def test_right_padded_prompts_of_different_length(config: ModelConfig) -> None:
    """The padding completes kernels with garbage, which each row overwrites before it sees them."""
    params, tokens, full = make(config)
    prompt_lengths, width = np.array([9, 26]), 28
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


@pytest.mark.parametrize("sharing_queries", [1, LENGTH + 1])
def test_shared_reads_change_nothing(
    tiny_config: ModelConfig, sharing_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks and single tokens alike, all by shared reads or none."""
    monkeypatch.setattr(sparse_cache, "SHARING_QUERIES", sharing_queries)
    decoder.cache_clear()
    config = dataclasses.replace(tiny_config, sparse_config=SMALL)
    hidden, _ = read(config, [22, 1, 22])
    close(hidden, make(config)[2])
    decoder.cache_clear()


def test_rows_of_a_chunk_lie_anywhere(config: ModelConfig) -> None:
    """Both rows read 12 tokens; then one goes on behind them while the other reads 8 of its own again."""
    params, tokens, full = make(config)
    cache = init_cache(config, 2, LENGTH)
    for starts in ([0, 0], [12, 4], [24, 16]):
        at = np.array(starts)[:, None] + np.arange(12)
        hidden, cache = decoder(config)(params, np.take_along_axis(tokens, at, 1), at, cache)
        close(hidden, np.take_along_axis(full, at[..., None], 1))


def test_a_chunk_reads_what_its_tokens_chose_together(tiny_config: ModelConfig) -> None:
    """Beside the cache it holds a few copies of one layer, not the blocks of each query, and no T·S scores."""
    sparse = dataclasses.replace(SMALL, block_size=64, kernel_size=32, kernel_stride=16, window_size=2048, topk=32)
    config = dataclasses.replace(tiny_config, num_layers=8, max_position_embeddings=8192, sparse_config=sparse)
    cache = jax.eval_shape(lambda: init_cache(config, 1, 8192))
    tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    prefill = jax.jit(lambda p, t, at, cache: bind(config, p).decode(t, at, cache)[1], donate_argnums=3)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    memory = prefill.lower(params, tokens, tokens, cache).compile().memory_analysis()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    one_layer = 2 * cache.keys.size * 4 // config.num_layers
    scores = 4 * config.num_heads * 512 * 8192
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < 4 * one_layer + 2**23 < scores


@pytest.mark.parametrize("length", [46, pytest.param(100, marks=pytest.mark.slow)])
def test_the_length_of_the_cache_changes_nothing(config: ModelConfig, length: int) -> None:
    hidden, _ = read(config, [22, 1, 22], length)
    close(hidden, make(config)[2])


def test_scan_equals_loop(config: ModelConfig) -> None:
    params, tokens, full = make(config)
    loop = dataclasses.replace(config, scan_layers=False)
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    hidden, _ = decoder(loop)(params, tokens, positions, init_cache(loop, 2, LENGTH))
    close(hidden, full)


def test_dense_len_decides_by_the_length_of_the_cache(tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(tiny_config, sparse_config=dataclasses.replace(SMALL, dense_len=32))
    assert isinstance(init_cache(config, 1, 32), KVCache)
    assert isinstance(init_cache(config, 1, 33), SparseKVCache)


def test_tokens_beyond_the_cache_are_dropped(config: ModelConfig) -> None:
    params, tokens, _ = make(config)
    empty = init_cache(config, 2, 12)
    _, cache = decoder(config)(params, tokens[:, :1], np.full((2, 1), 12), empty)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), cache, empty)))


def test_more_tokens_than_slots_are_refused(config: ModelConfig) -> None:
    """While tracing, by the decoder and by attention itself."""
    params, tokens, _ = make(config)
    cache = init_cache(config, 2, 12)
    message = "13 new tokens in a cache of 12 slots: at most 12 fit"
    positions = np.broadcast_to(np.arange(13), (2, 13))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(bind(config, params).decode, tokens[:, :13], positions, cache)
    q, k = (jnp.zeros((2, 13, heads, config.head_size)) for heads in (config.num_heads, config.num_kv_heads))
    with pytest.raises(ValueError, match=message):
        sparse_cache.attend_to_sparse_cache(q, k, k, (q, k), positions, cache, 0)


@pytest.mark.parametrize("chunks", [[5], [1] * 5], ids=str)
def test_a_cache_that_is_shorter_than_a_kernel(tiny_config: ModelConfig, chunks: list[int]) -> None:
    config = dataclasses.replace(tiny_config, sparse_config=dataclasses.replace(SMALL, kernel_size=24))
    hidden, _ = read(config, chunks, 5)
    close(hidden, make(config)[2][:, :5])


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_step_updates_the_cache_in_place(tiny_config: ModelConfig, scan_layers: bool) -> None:
    """And holds beside it less than one layer of it."""
    sparse = dataclasses.replace(SMALL, block_size=64, kernel_size=32, kernel_stride=16, window_size=128)
    config = dataclasses.replace(
        tiny_config, num_layers=8, scan_layers=scan_layers, max_position_embeddings=16384, sparse_config=sparse
    )
    cache = jax.eval_shape(lambda: init_cache(config, 2, 8192))
    token = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    step = jax.jit(lambda p, t, at, cache: bind(config, p).decode(t, at, cache), donate_argnums=3)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    memory = step.lower(params, token, token, cache).compile().memory_analysis()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 8


def test_bfloat16_cache(tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(tiny_config, sparse_config=dataclasses.replace(SMALL, topk=12))
    params, tokens, full = make(config)
    cache = init_cache(config, 2, LENGTH, dtype="bfloat16")
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)
    hidden, cache = decoder(config)(params, tokens, positions, cache)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(cache))
    assert hidden.dtype == jnp.float32
    assert np.abs(np.asarray(hidden - full)).max() < 2**-8 * 4 * np.abs(full).max()
