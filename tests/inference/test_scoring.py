"""Log-likelihoods of continuations: against plain log-softmax, in any company, and with few programs."""

import dataclasses
import functools
import logging
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.common.config import InputError
from cpm_jax.inference import scoring
from cpm_jax.inference.scoring import Score, Scorer, bucket_length
from cpm_jax.modeling.config import ModelConfig, RopeConfig, SparseConfig
from cpm_jax.modeling.decoder import bind, init_params


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=97,
        num_layers=2,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        d_ff=64,
        max_position_embeddings=150,
        initializer_range=0.3,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def params(config):
    return init_params(config, jax.random.key(0))


def requests(number, seed=0, longest=120):
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(97) for _ in range(rng.randint(low, high))]  # noqa: E731
    return [(draw(1, longest), draw(1, 20)) for _ in range(number)]


@functools.partial(jax.jit, static_argnums=0)
def log_softmax(config, params, tokens):
    model = bind(config, params)
    hidden = model(tokens[None], jnp.arange(len(tokens))[None], jnp.ones_like(tokens)[None])
    return jax.nn.log_softmax(model.logits(hidden)[0])


def plainly(config, params, context, continuation):
    """From the definition: all logits of the row, log-softmax; what is padded behind is not seen."""
    inputs = [*context, *continuation][-(config.max_position_embeddings + 1) :][:-1]
    padded = jnp.asarray(inputs + [0] * (config.max_position_embeddings - len(inputs)))
    log_probs = np.asarray(log_softmax(config, params, padded))[len(inputs) - len(continuation) : len(inputs)]
    chosen = log_probs[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((log_probs.argmax(-1) == continuation).all())


def test_equals_the_definition(config, params):
    given = requests(12)
    for (context, continuation), score in zip(given, Scorer(config, params).score(given), strict=True):
        log_likelihood, is_greedy = plainly(config, params, context, continuation)
        assert score.log_likelihood == pytest.approx(log_likelihood, abs=1e-4)
        assert score.is_greedy == is_greedy
        assert score.num_truncated == 0


def test_the_most_probable_continuation_is_greedy(config, params):
    context = [5, 6, 7]
    best = []
    for _ in range(2):
        best.append(next(token for token in range(97) if plainly(config, params, context + best, [token])[1]))
    other = [best[0], (best[1] + 1) % config.vocab_size]
    scores = Scorer(config, params).score([(context, best), (context, other), (context, best[:1])])
    assert [score.is_greedy for score in scores] == [True, False, True]


def test_neither_company_nor_order_nor_batch_size_changes_a_score(config, params):
    given = requests(40, seed=1)
    together = Scorer(config, params).score(given)
    order = list(range(len(given)))
    random.Random(2).shuffle(order)
    shuffled = Scorer(config, params).score([given[index] for index in order])
    assert [shuffled[order.index(index)] for index in range(len(given))] == together
    for batch_size in (1, 3):
        alone = [Scorer(config, params, batch_size=batch_size).score([request])[0] for request in given[:6]]
        np.testing.assert_allclose(
            [score.log_likelihood for score in alone], [score.log_likelihood for score in together[:6]], atol=1e-4
        )
        assert [score.is_greedy for score in alone] == [score.is_greedy for score in together[:6]]


def test_choices_of_one_token_share_a_row(config, params, monkeypatch):
    read = []
    real = scoring._head_inputs
    monkeypatch.setattr(
        scoring, "_head_inputs", lambda p, t, lengths, **k: read.append((lengths > 0).sum()) or real(p, t, lengths, **k)
    )
    context = [3, 1, 4, 1, 5]
    scores = Scorer(config, params).score([(context, [token]) for token in range(97)])
    assert sum(read) == 1
    assert sum(np.exp([score.log_likelihood for score in scores])) == pytest.approx(1, abs=1e-5)
    assert sum(score.is_greedy for score in scores) == 1


def test_two_programs_a_length_and_no_more(config, params, caplog):
    """Compilations do not grow with the number of requests, their lengths within a bucket, or the second call."""
    scorer = Scorer(dataclasses.replace(config, rms_norm_eps=1.5e-5), params)  # no other test has compiled it

    def compiled(given):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
            scorer.score(given)
        messages = [record.getMessage() for record in caplog.records]
        names = [m.group(1) for m in map(re.compile(r"Compiling (?:jit\()?(\w+)").match, messages) if m]
        return names.count("_head_inputs"), names.count("_token_scores")

    given = requests(100, seed=3, longest=145)
    lengths = {bucket_length(len(context) + len(continuation) - 1, scorer.config) for context, continuation in given}
    assert len(lengths) == 6
    assert compiled(given) == (6, 6)
    assert compiled(requests(100, seed=4, longest=145)) == (0, 0)
    assert compiled(requests(1, seed=5)) == (0, 0)


def test_logits_exist_for_few_positions_at_a_time(config, params, monkeypatch):
    sizes = []
    real = scoring._token_scores
    monkeypatch.setattr(
        scoring, "_token_scores", lambda p, h, places, *a, **k: sizes.append(len(places)) or real(p, h, places, *a, **k)
    )
    monkeypatch.setattr(scoring, "MAX_LOGITS_BYTES", 4 * 97 * 16)
    given = requests(10, seed=5)
    scores = Scorer(config, params).score(given)
    assert set(sizes) == {16}
    for (context, continuation), score in zip(given, scores, strict=True):
        assert score.log_likelihood == pytest.approx(plainly(config, params, context, continuation)[0], abs=1e-4)


def test_a_context_that_does_not_fit_loses_its_beginning(config, params):
    context, continuation = requests(1, seed=6, longest=90)[0]
    long = [1] * 140 + context
    (score,) = Scorer(config, params).score([(long, continuation)])
    assert score.num_truncated == len(long) + len(continuation) - 1 - 150
    assert score.log_likelihood == pytest.approx(plainly(config, params, long, continuation)[0], abs=1e-4)


def test_the_whole_context_length_can_be_scored(config, params):
    tokens = requests(1, seed=7, longest=150)[0][0] * 10
    (score,) = Scorer(config, params).score([(tokens[:1], tokens[1:151])])
    assert score.num_truncated == 0
    assert score.log_likelihood == pytest.approx(plainly(config, params, tokens[:1], tokens[1:151])[0], abs=1e-3)


def test_an_empty_continuation_is_certain(config, params):
    assert Scorer(config, params).score([([1], []), ([1], [2])])[0] == Score(0.0, True, 0)
    assert Scorer(config, params).score([]) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [1]), "request 1 has no context"),
        (([1], [2] * 151), "request 1 has a continuation of 151 tokens: .* max_position_embeddings = 150"),
        (([97], [1]), "request 1 has token id 97: .*vocab_size = 97"),
        (([1], [-1]), "request 1 has token id -1"),
    ],
)
def test_impossible_requests_are_named(config, params, request_, message):
    with pytest.raises(InputError, match=message):
        Scorer(config, params).score([([1], [1]), request_])


class TestBuckets:
    def test_the_ladder(self, config):
        long = dataclasses.replace(config, max_position_embeddings=1000)
        ladder = sorted({bucket_length(length, long) for length in range(1, 1001)})
        assert ladder == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000]
        assert all(length <= bucket_length(length, long) for length in range(1, 1001))

    def test_longrope_keeps_its_short_factors_while_the_row_is_short(self, config):
        rope = RopeConfig(short_factor=(1.0,) * 8, long_factor=(4.0,) * 8, original_max_position_embeddings=80)
        longrope = dataclasses.replace(config, rope=rope)
        assert [bucket_length(length, longrope) for length in (65, 80, 81, 97, 130)] == [80, 80, 96, 128, 150]

    def test_attention_stays_dense_while_the_row_is_short(self, config):
        sparse = dataclasses.replace(config, sparse_config=SparseConfig(dense_len=80, topk=2))
        assert [bucket_length(length, sparse) for length in (65, 80, 81, 97)] == [80, 80, 96, 128]


def test_mtp_layers_change_nothing(config, params):
    with_mtp = dataclasses.replace(config, num_nextn_predict_layers=1)
    given = requests(4)
    more = init_params(with_mtp, jax.random.key(0))  # a parameter's value depends on its path alone
    assert Scorer(with_mtp, more).score(given) == Scorer(config, params).score(given)
