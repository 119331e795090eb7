"""The rules that choose blocks, and the shares of attention, against definitions and against the model itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.block_rules import (
    TILES,
    attend_and_weigh,
    attend_by,
    block_masses,
    choose,
    mass_share,
    sparse_config,
    token_losses,
)
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import bind, init_params
from kernels_pallas.block_sparse_attention.api import block_sparse_attention

LENGTH, BLOCK = 700, 64
RULES = ("lse", "exact", "window", "random", "oracle")
CONFIG = ModelConfig(
    vocab_size=97, num_layers=2, d_model=48, num_heads=4, num_kv_heads=2, head_dim=16, d_ff=64, dtype="float32"
)


@pytest.fixture(scope="module")
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (1, LENGTH, 4, 16), (1, LENGTH, 2, 16), (1, LENGTH, 2, 16)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


@pytest.fixture(scope="module")
def positions():
    return jnp.arange(5, LENGTH, 7)[None]


@pytest.fixture(scope="module")
def masses(qkv, positions):
    return block_masses(qkv[0][:, positions[0]], qkv[1], positions, BLOCK)


def chosen(rule, num_blocks, qkv, positions, masses):
    selectors = qkv[0][:, positions[0]], qkv[1]
    return choose(rule, sparse_config(rule, num_blocks), selectors, positions, jax.random.key(3), masses)


def test_block_masses_are_sums_of_the_softmax(qkv, positions, masses):
    q, k, _ = (np.asarray(x, np.float64)[0] for x in qkv)
    for row, position in ((3, int(positions[0, 3])), (90, int(positions[0, 90]))):
        for head in range(4):
            weights = np.exp(k[: position + 1, head // 2] @ q[position, head] / 4)
            weights /= weights.sum()
            expected = [weights[at : at + BLOCK].sum() for at in range(0, LENGTH, BLOCK)]
            np.testing.assert_allclose(masses[0, head, row], expected, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_mass_share_is_the_quotient_of_the_two_normalisers(rule, qkv, positions, masses):
    share = mass_share(masses, chosen(rule, 5, qkv, positions, masses))
    everywhere = jnp.arange(LENGTH)[None]
    all_masses = block_masses(qkv[0], qkv[1], everywhere, BLOCK)
    ids = chosen(rule, 5, qkv, everywhere, all_masses)
    all_blocks = jnp.broadcast_to(jnp.arange(11), (1, 2, LENGTH, 11))
    log_sums = [
        block_sparse_attention(*qkv, blocks, block_size=BLOCK, return_lse=True, implementation="reference")[1]
        for blocks in (ids, all_blocks)
    ]
    expected = jnp.exp(log_sums[0] - log_sums[1])
    np.testing.assert_allclose(mass_share(all_masses, ids), expected, atol=1e-5)
    if rule != "random":  # which draws other blocks for other queries
        np.testing.assert_allclose(share, expected[:, :, positions[0]], atol=1e-5)


@pytest.mark.parametrize("num_blocks", [3, 5, 9])
def test_all_rules_see_as_many_blocks_the_first_and_the_last_ones_among_them(num_blocks, qkv, positions, masses):
    local = num_blocks // 3
    for rule in RULES:
        for ids, position in zip(
            np.asarray(chosen(rule, num_blocks, qkv, positions, masses))[0].transpose(1, 0, 2),
            np.asarray(positions[0]),
            strict=True,
        ):
            last = position // BLOCK
            for head in ids:
                blocks = head[head >= 0].tolist()
                assert blocks == sorted(set(blocks)), rule
                assert len(blocks) == min(num_blocks, last + 1), rule
                assert {0, *range(max(last - local + 1, 0), last + 1)} <= set(blocks), rule
                assert blocks[-1] == last, rule
                if rule == "window" and last >= num_blocks:
                    assert blocks == [0, *range(last - num_blocks + 2, last + 1)]


@pytest.mark.parametrize("rule", TILES)
def test_a_tile_ranks_by_the_scores_of_its_first_query(rule, qkv):
    everywhere = jnp.arange(LENGTH)[None]
    alone, shared = (np.asarray(chosen(name, 5, qkv, everywhere, None))[0] for name in ("lse", rule))
    np.testing.assert_array_equal(shared[:, :: TILES[rule]], alone[:, :: TILES[rule]])
    assert (shared != alone).any()
    for position in range(LENGTH):
        # Of a tile that does not reach into a next block, all choose the same.
        np.testing.assert_array_equal(shared[:, position], alone[:, position - position % TILES[rule]])


def test_random_blocks_differ_between_queries_heads_and_keys(qkv, positions, masses):
    ids = np.asarray(chosen("random", 5, qkv, positions, masses))[0]
    assert (ids[0] != ids[1]).any()
    assert (ids[:, -1] != ids[:, -2]).any()
    sparse = sparse_config("random", 5)
    selectors = qkv[0][:, positions[0]], qkv[1]
    again = [np.asarray(choose("random", sparse, selectors, positions, jax.random.key(key)))[0] for key in (3, 4)]
    assert (ids == again[0]).all()
    assert (ids != again[1]).any()
    # Between the forced ones, every block is drawn about equally often.
    late = ids[:, -8:]
    assert set(range(11)) == set(late[late >= 0].tolist())


def test_no_rule_holds_more_than_the_best_blocks(qkv, positions, masses):
    def of_group(rule):
        share = mass_share(masses, chosen(rule, 5, qkv, positions, masses))
        return np.asarray(share).reshape(2, 2, -1).sum(axis=1)

    best = of_group("oracle")
    for rule in RULES[:-1]:
        local_alike = rule != "window"
        assert (of_group(rule) <= best + 1e-5).all() or not local_alike


def test_the_oracle_asks_for_masses(qkv, positions):
    with pytest.raises(ValueError, match="block_masses"):
        choose("oracle", sparse_config("oracle", 5), (qkv[0][:, positions[0]], qkv[1]), positions, jax.random.key(0))


@pytest.fixture(scope="module")
def model():
    params = init_params(CONFIG, jax.random.key(0))
    # Larger than at the start of training, so that attention has something to prefer.
    params = jax.tree.map(lambda x: 8 * x if x.ndim == 3 else x, params)
    return params, jax.random.randint(jax.random.key(1), (1, LENGTH + 1), 0, CONFIG.vocab_size)


def decoder_losses(config, params, tokens):
    decoder, inputs = bind(config, params), tokens[:, :-1]
    at = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    logits = decoder.logits(decoder(inputs, at, jnp.ones_like(at)))
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize("rule", ["dense", "lse", "exact", "window"])
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_losses_are_those_of_the_decoder(rule, implementation, model):
    params, tokens = model
    attend = attend_by(rule, 4, jax.random.key(0), implementation)
    ours, _ = jax.jit(functools.partial(token_losses, CONFIG, attend))(params, tokens)
    sparse = None if rule == "dense" else sparse_config(rule, 4)
    config = ModelConfig(**{**CONFIG.__dict__, "sparse_config": sparse})
    np.testing.assert_allclose(ours, decoder_losses(config, params, tokens), atol=1e-4)
    if rule != "dense":
        assert np.abs(np.asarray(ours - decoder_losses(CONFIG, params, tokens))).max() > 1e-2


def test_weighing_leaves_dense_losses_and_keeps_every_layer(model):
    params, tokens = model
    at = np.arange(400, LENGTH, 10)
    budgets = 3, 5, 11
    kept = jnp.zeros((2, len(RULES), len(budgets), 1, 4, len(at)))
    attend = attend_and_weigh(RULES, budgets, at, jax.random.key(0))
    losses, shares = jax.jit(functools.partial(token_losses, CONFIG, attend))(params, tokens, kept)
    np.testing.assert_allclose(losses, decoder_losses(CONFIG, params, tokens), atol=1e-4)
    shares = np.asarray(shares)
    np.testing.assert_allclose(shares[:, :, 2], 1.0, atol=1e-5)  # all 11 blocks
    assert (shares[:, :, 0] > 0).all()
    assert (shares[:, :, 0] < 1).all()
    assert (np.abs(shares[0] - shares[1])[:, 0] > 1e-4).any()
