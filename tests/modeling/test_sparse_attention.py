"""The decoder with InfLLM v2: equal to the dense one where all blocks are seen, causal, packed, trainable.

The ops themselves are held against their references in tests/kernels_pallas.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.modeling import sparse_attention
from cpm_jax.modeling.block import causal_attend
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.decoder import Params, bind, init_params
from kernels_pallas.block_selection.api import select_blocks

LENGTH = 48
# A twelfth of the published sizes in the same ratios: of 12 blocks of 4 tokens a query sees 1 + 1 + 2.
SMALL = SparseConfig(kernel_size=2, kernel_stride=1, block_size=4, window_size=8, topk=2, dense_len=-1)
ALL = dataclasses.replace(SMALL, topk=12)


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(tiny_config, sparse_config=SMALL)


def with_sparse(config: ModelConfig, **changes: Any) -> ModelConfig:
    return dataclasses.replace(config, sparse_config=dataclasses.replace(SMALL, **changes))


def tokens_of(config: ModelConfig, rows: int = 2, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (rows, length)).astype(np.int32)


def params_of(config: ModelConfig) -> Params:
    return jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))


@functools.partial(jax.jit, static_argnames="config")
def logits(config: ModelConfig, params: Params, tokens: Any, segments: Any, positions: Any) -> jax.Array:
    decoder = bind(config, params)
    return decoder.logits(decoder(tokens, positions, segments))


def run(config: ModelConfig, params: Params, tokens: np.ndarray, segments: np.ndarray | None = None) -> np.ndarray:
    """Logits of rows of one document, or of packed ones."""
    segments = np.ones_like(tokens) if segments is None else segments
    at = np.arange(tokens.shape[1])
    starts = np.array([[np.flatnonzero(row == document)[0] for document in row] for row in segments])
    return np.asarray(logits(config, params, tokens, segments, at - starts))


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 60}, "SparseConfig.block_size = 60: must be a multiple of kernel_stride = 16"),
        ({"window_size": 100}, "SparseConfig.window_size = 100: must be a multiple of block_size = 64"),
        ({"topk": 0}, "SparseConfig.topk = 0: must be at least 1"),
        ({"init_blocks": -1}, "SparseConfig.init_blocks = -1: must be at least 0"),
        ({"kernel_stride": 0}, "SparseConfig.kernel_stride = 0: must be at least 1"),
        ({"kernel_size": 8}, "SparseConfig.kernel_size = 8: must be at least kernel_stride = 16"),
        ({"dense_len": -2}, "SparseConfig.dense_len = -2: must be a number of tokens, or -1"),
        ({"variant": "nsa"}, "SparseConfig.variant = 'nsa': input should be 'paper', 'huggingface' or 'cpm_cu'"),
        ({"topk": 1.5}, "SparseConfig.topk = 1.5: input should be a valid integer"),
    ],
)
def test_sparse_config_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SparseConfig(**values)
    assert message in str(caught.value)
    assert caught.value.field == message.split(" ")[0]


def test_more_blocks_than_the_longest_sequence_has(tiny_config: ModelConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"SparseConfig.topk = 65: must be at most the 64 blocks of 4 tokens that max"
    ):
        with_sparse(tiny_config, topk=65)
    assert with_sparse(tiny_config, topk=65, dense_len=256).sparse_config is not None  # never sparse


def test_a_model_that_is_never_sparse_says_so(tiny_config: ModelConfig, caplog: pytest.LogCaptureFixture) -> None:
    with_sparse(tiny_config, dense_len=255)
    assert not caplog.records
    with_sparse(tiny_config, dense_len=271)
    with_sparse(tiny_config, dense_len=271)
    (record,) = caplog.records
    assert "dense_len = 271 and ModelConfig.max_position_embeddings = 256" in record.getMessage()


def test_the_published_numbers_see_96_blocks() -> None:
    assert SparseConfig().selection.num_selected == 96


@pytest.mark.parametrize(("dense_len", "sparse"), [(-1, True), (0, True), (LENGTH - 1, True), (LENGTH, False)])
def test_dense_len(tiny_config: ModelConfig, dense_len: int, sparse: bool) -> None:
    """Rows of at most so many tokens are dense, bit for bit."""
    params, tokens = params_of(tiny_config), tokens_of(tiny_config)
    same = np.array_equal(
        run(with_sparse(tiny_config, dense_len=dense_len), params, tokens), run(tiny_config, params, tokens)
    )
    assert same != sparse


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "changes",
    [{}, {"variant": "huggingface"}, {"variant": "cpm_cu"}, {"use_nope": True}, {"lse_approximation": False}],
    ids=str,
)
def test_all_blocks_are_dense_attention(tiny_config: ModelConfig, changes: dict[str, Any]) -> None:
    config = with_sparse(tiny_config, topk=12, **changes)
    params, tokens = params_of(config), tokens_of(config)

    def loss(params: Params, config: ModelConfig) -> jax.Array:
        ones, positions = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        return jnp.square(logits(config, params, tokens, ones, positions)).mean()

    np.testing.assert_allclose(run(config, params, tokens), run(tiny_config, params, tokens), rtol=1e-5, atol=1e-5)
    ours, dense = (jax.grad(loss)(params, c) for c in (config, tiny_config))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()), ours, dense)


def test_a_query_reads_its_blocks_only(config: ModelConfig) -> None:
    """One layer by hand: the softmax over the tokens of the blocks that the scores choose, in float64."""
    rng, sparse = np.random.default_rng(0), dataclasses.replace(SMALL, lse_approximation=False)
    q, k, v = (rng.standard_normal((1, LENGTH, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    attend = causal_attend(with_sparse(config, lse_approximation=False), jnp.ones((1, LENGTH), jnp.int32))
    ours, _ = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), (jnp.asarray(q), jnp.asarray(k)))
    kernels = (k[0, :-1] + k[0, 1:]).astype(np.float64) / 2  # kernel_size 2, kernel_stride 1
    for t in (0, 11, 30, LENGTH - 1):
        for head in range(2):
            scores = np.zeros(LENGTH)
            for n in (2 * head, 2 * head + 1):
                e = np.exp(kernels[:t, head] @ q[0, t, n] / np.sqrt(8))
                scores[:t] += e / e.sum() if t else 0
            # Block c is touched by the kernels that begin in it and by the one before.
            blocks = [scores[max(4 * c - 1, 0) : 4 * c + 4].max() for c in range(t // 4 + 1)]
            local, first = {t // 4, max(t // 4 - 1, 0)}, {0}
            ranked = sorted(set(range(t // 4 + 1)) - local - first, key=lambda c: -blocks[c])
            seen = local | first | set(ranked[: sparse.topk - 1])
            slots = [s for s in range(t + 1) if s // 4 in seen]
            for n in (2 * head, 2 * head + 1):
                e = np.exp(k[0, slots, head].astype(np.float64) @ q[0, t, n] / np.sqrt(8))
                np.testing.assert_allclose(ours[0, t, n], e @ v[0, slots, head] / e.sum(), rtol=1e-5, atol=1e-6)


def test_use_nope_chooses_by_unrotated_heads(config: ModelConfig) -> None:
    """Other blocks are chosen, and what is attended to in them is the same."""
    params, tokens = params_of(config), tokens_of(config)
    nope = run(with_sparse(config, use_nope=True), params, tokens)
    difference = np.abs(nope - run(config, params, tokens)).max(axis=(0, 2))
    assert difference[: 4 * 4].max() < 1e-5  # 4 blocks: all are seen
    assert difference[4 * 4 :].max() > 1e-3


def test_scan_equals_loop(config: ModelConfig) -> None:
    params, tokens = params_of(config), tokens_of(config)
    loop = dataclasses.replace(config, scan_layers=False)
    np.testing.assert_allclose(run(config, params, tokens), run(loop, params, tokens), rtol=1e-5, atol=1e-5)


def test_the_future_does_not_change_the_past(config: ModelConfig) -> None:
    params, tokens = params_of(config), tokens_of(config)
    changed = tokens.copy()
    changed[:, 29:] = tokens_of(config, seed=1)[:, 29:]
    a, b = run(config, params, tokens), run(config, params, changed)
    # In which order a query's keys are summed may depend on what its neighbours chose.
    np.testing.assert_allclose(a[:, :29], b[:, :29], rtol=1e-5, atol=2e-6)
    assert np.abs(a[:, 29:] - b[:, 29:]).max() > 1e-3


def test_packed_neighbours_are_isolated(config: ModelConfig) -> None:
    """A document that begins on a block boundary is what it is alone, whatever lies before and after it."""
    params, tokens = params_of(config), tokens_of(config)
    segments = np.where(np.arange(LENGTH) < 8, 1, np.where(np.arange(LENGTH) < 41, 2, 0)) + np.zeros_like(tokens)
    packed = run(config, params, tokens, segments)
    alone = run(config, params, np.roll(tokens, -8, axis=1))
    np.testing.assert_allclose(packed[:, 8:41], alone[:, :33], rtol=1e-5, atol=1e-5)
    other = tokens.copy()
    other[:, :8], other[:, 41:] = tokens_of(config, seed=2)[:, :8], 5
    np.testing.assert_array_equal(run(config, params, other, segments)[:, 8:41], packed[:, 8:41])


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("scan_layers", [True, False])
def test_remat_keeps_the_chosen_blocks(config: ModelConfig, scan_layers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same gradients as without, and the backward pass chooses no blocks again: a mark on the choice is found once."""

    def marked(*args: Any, **kwargs: Any) -> jax.Array:
        ids = select_blocks(*args, **kwargs)
        return ids + (0 * jax.lax.lgamma(ids.astype(jnp.float32) ** 2 + 1)).astype(ids.dtype)

    monkeypatch.setattr(sparse_attention, "select_blocks", marked)
    logits.clear_cache()
    params, tokens = params_of(config), tokens_of(config)
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(LENGTH), tokens.shape)

    def gradient(config: ModelConfig) -> Any:
        return jax.grad(lambda p: jnp.square(logits(config, p, tokens, ones, positions)).mean())

    once = dataclasses.replace(config, scan_layers=scan_layers)
    expected = gradient(once)(params)
    for remat in ("dots", "full"):
        again = dataclasses.replace(once, remat=remat)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
            gradient(again)(params),
            expected,
        )
        program = str(jax.make_jaxpr(gradient(again))(params))
        assert program.count("lgamma") == (1 if scan_layers else config.num_layers)
    logits.clear_cache()
