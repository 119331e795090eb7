"""The compiled loop against the full forward pass, and what must not change its results."""

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.inference.decode_loop import NO_TOKEN, cache_length, extend, start
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling.config import ModelConfig, RopeConfig, SparseConfig
from cpm_jax.modeling.decoder import Params, bind, init_params

GREEDY = SamplingConfig(temperature=0.0)
RANDOM = SamplingConfig(temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.1)


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    """A random model with a tied head would repeat its last token for ever."""
    return dataclasses.replace(tiny_config, tie_word_embeddings=False, initializer_range=0.3)


@pytest.fixture
def params(config: ModelConfig) -> Params:
    return init_params(config, jax.random.key(0))


def random_prompts(config: ModelConfig, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]


def decode(
    config: ModelConfig,
    params: Params,
    prompts: list[list[int]],
    sampling: SamplingConfig = GREEDY,
    *,
    max_new_tokens: int = 20,
    num_tokens: int = 7,
    prefill_chunks: tuple[int, ...] = (16, 4),
    eos_ids: tuple[int, ...] = (),
    indices: list[int] | None = None,
    seed: int = 0,
) -> list[list[int]]:
    state = start(
        params,
        prompts,
        config=config,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        seed=seed,
        indices=indices if indices is not None else list(range(len(prompts))),
        prefill_chunks=prefill_chunks,
    )
    rows: list[list[int]] = [[] for _ in prompts]
    while not np.asarray(state.finished).all():
        eos = jnp.asarray(eos_ids, jnp.int32)
        state, tokens = extend(params, state, eos, num_tokens=num_tokens, config=config, sampling=sampling)
        for row, new in zip(rows, np.asarray(tokens).tolist(), strict=True):
            row += [token for token in new if token != NO_TOKEN]
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _full_logits(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    model = bind(config, params)
    return model.logits(model(tokens, jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)))


def full_logits(config: ModelConfig, params: Params, tokens: list[int]) -> np.ndarray:
    """Logits of all positions in one pass, without a cache."""
    return np.asarray(_full_logits(config, params, jnp.asarray([tokens])))[0]


@pytest.mark.parametrize("chunks", [(1,), (5,), (16, 3), (64,)])
def test_cached_logits_equal_the_full_forward_at_every_position(config, params, chunks):
    prompts = random_prompts(config, [1, 3, 16, 17, 40])
    total = 50
    follow = random_prompts(config, [total] * len(prompts))
    rows = [prompt + more[: total - len(prompt)] for prompt, more in zip(prompts, follow, strict=True)]
    state = start(
        params,
        prompts,
        config=config,
        sampling=GREEDY,
        max_new_tokens=total,
        seed=0,
        indices=range(len(prompts)),
        prefill_chunks=chunks,
    )
    cache, positions = state.cache, np.asarray(state.positions)

    @jax.jit
    def step(params, *arguments):
        hidden, cache = bind(config, params).decode(*arguments)
        return bind(config, params).logits(hidden)[:, 0], cache

    expected = [full_logits(config, params, row) for row in rows]
    for _ in range(total - 1):
        tokens = np.array([row[min(position, total - 1)] for row, position in zip(rows, positions, strict=True)])
        logits, cache = step(params, tokens[:, None], positions[:, None], cache)
        for row, position in enumerate(positions):
            if position < total:
                np.testing.assert_allclose(logits[row], expected[row][position], rtol=1e-4, atol=1e-4)
        positions = positions + 1


def test_greedy_tokens_are_the_argmax_of_the_full_forward(config, params):
    prompts = random_prompts(config, [1, 9, 30])
    for prompt, new in zip(prompts, decode(config, params, prompts), strict=True):
        assert len(set(new)) > 5
        logits = full_logits(config, params, prompt + new)
        np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(-1), new)


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM])
def test_a_batch_gives_what_each_prompt_gives_alone(config, params, sampling):
    prompts = random_prompts(config, [2, 40, 11, 1, 23])
    together = decode(config, params, prompts, sampling)
    for index, prompt in enumerate(prompts):
        assert decode(config, params, [prompt], sampling, indices=[index]) == [together[index]]


@pytest.mark.parametrize("num_tokens", [1, 3, 20, 64])
@pytest.mark.parametrize("prefill_chunks", [(4,), (256,), (16, 4, 1)])
def test_the_cut_into_calls_changes_nothing(config, params, num_tokens, prefill_chunks):
    prompts = random_prompts(config, [5, 19])
    once = decode(config, params, prompts, RANDOM)
    assert decode(config, params, prompts, RANDOM, num_tokens=num_tokens, prefill_chunks=prefill_chunks) == once


def test_seeds_reproduce_and_differ(config, params):
    prompts = random_prompts(config, [5, 5])
    first = decode(config, params, prompts, RANDOM, seed=1)
    assert decode(config, params, prompts, RANDOM, seed=1) == first
    assert decode(config, params, prompts, RANDOM, seed=2) != first


def test_equal_prompts_get_different_draws(config, params):
    (prompt,) = random_prompts(config, [5])
    one, two = decode(config, params, [prompt, prompt], RANDOM)
    assert one != two


def test_sequences_end_at_eos_and_at_their_limit(config, params):
    prompts = random_prompts(config, [4, 12, 20])
    free = decode(config, params, prompts)
    assert [len(row) for row in free] == [20, 20, 20]
    eos = free[0][6]
    for whole, row in zip(free, decode(config, params, prompts, eos_ids=(eos, 127)), strict=True):
        ends = [place for place, token in enumerate(whole) if token in (eos, 127)]
        assert row == whole[: ends[0] + 1 if ends else None]


def test_the_repetition_penalty_sees_prompt_and_output(config, params):
    (prompt,) = random_prompts(config, [30])
    strong = SamplingConfig(temperature=0.0, repetition_penalty=1e6)
    (row,) = decode(config, params, [prompt], strong, max_new_tokens=60)
    # While unseen tokens with a positive logit are left, no token comes twice.
    assert len(set(row[:30])) == 30
    assert not set(row[:30]) & set(prompt)


def test_one_program_serves_all_prompts_and_calls_of_a_bucket(config, params, caplog):
    config = dataclasses.replace(config, vocab_size=120)  # A model that no other test has compiled.
    params = init_params(config, jax.random.key(0))
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        for lengths in ([3, 50], [70, 1], [100, 100]):
            decode(config, params, random_prompts(config, lengths), RANDOM, max_new_tokens=28)
    messages = [record.getMessage() for record in caplog.records]
    compiled = [m.group(1) for m in map(re.compile(r"Compiling (?:jit\()?(\w+)").match, messages) if m]
    assert compiled.count("extend") == 1
    assert compiled.count("_prefill") == 2  # one for each size of chunk


class TestCacheLength:
    def test_powers_of_two_within_the_context(self, config):
        config = dataclasses.replace(config, max_position_embeddings=1000)
        assert [cache_length(config, n) for n in (1, 128, 129, 256, 512, 513, 1000)] == [
            128, 128, 256, 256, 512, 1000, 1000
        ]  # fmt: skip

    @pytest.mark.parametrize(
        "kind", [{"short_factor": (1.0,) * 8, "long_factor": (4.0,) * 8}, {"scaling": "dynamic", "factor": 4.0}]
    )
    def test_frequencies_are_picked_by_the_length_of_the_sequence(self, config, kind):
        rope = RopeConfig(original_max_position_embeddings=150, **kind)
        config = dataclasses.replace(config, rope=rope, max_position_embeddings=600)
        assert [cache_length(config, n) for n in (100, 129, 150, 151, 300, 600)] == [128, 150, 150, 256, 512, 600]


@pytest.mark.parametrize("length", [140, 150, 151, 200])
def test_longrope_equals_the_full_forward_on_both_sides_of_the_switch(config, length):
    factors = np.random.default_rng(0).uniform(1, 8, (2, 8))
    rope = RopeConfig(
        short_factor=tuple(factors[0]), long_factor=tuple(factors[1]), original_max_position_embeddings=150
    )
    config = dataclasses.replace(config, rope=rope, max_position_embeddings=600)
    params = init_params(config, jax.random.key(0))
    (prompt,) = random_prompts(config, [length - 30])
    (new,) = decode(config, params, [prompt], max_new_tokens=30)
    logits = full_logits(config, params, prompt + new)
    np.testing.assert_array_equal(logits[len(prompt) - 1 : -1].argmax(-1), new)


# ---------------------------------------------------------------- sparse attention


@pytest.fixture
def sparse_config(config: ModelConfig) -> ModelConfig:
    sparse = SparseConfig(kernel_size=4, kernel_stride=2, block_size=4, window_size=8, topk=2, dense_len=32)
    return dataclasses.replace(config, sparse_config=sparse)


def test_sparse_decoding_is_greedy_on_the_full_forward_pass(sparse_config: ModelConfig, params: Params) -> None:
    """Prompts of different lengths in one batch, read in chunks; the full pass is made sparse at every length."""
    always = dataclasses.replace(
        sparse_config, sparse_config=dataclasses.replace(sparse_config.sparse_config, dense_len=-1)
    )
    prompts = random_prompts(sparse_config, [45, 2, 30, 17])
    for prompt, new in zip(prompts, decode(sparse_config, params, prompts), strict=True):
        logits = full_logits(always, params, prompt + new)
        assert new == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_sparse_decoding_does_not_depend_on_chunks(sparse_config: ModelConfig, params: Params) -> None:
    prompts = random_prompts(sparse_config, [40, 5])
    whole = decode(sparse_config, params, prompts, RANDOM)
    for chunks in ((3,), (64,)):
        assert decode(sparse_config, params, prompts, RANDOM, prefill_chunks=chunks) == whole


def test_short_sequences_get_a_dense_cache(sparse_config: ModelConfig, config: ModelConfig, params: Params) -> None:
    """The power of two above would already be a sparse one."""
    assert [cache_length(sparse_config, n) for n in (1, 32, 33, 200)] == [32, 32, 128, 256]
    prompts = random_prompts(config, [12, 3])
    assert decode(sparse_config, params, prompts) == decode(config, params, prompts)


def test_a_cache_beyond_the_context_is_refused(config: ModelConfig, params: Params) -> None:
    with pytest.raises(ConfigError, match=r"a cache for sequences of 257 tokens: must be at most .* = 256"):
        start(params, [[1] * 200], config=config, sampling=GREEDY, max_new_tokens=57, seed=0, indices=[0])
