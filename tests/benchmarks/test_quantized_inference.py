"""The benchmark of quantised inference in miniature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import quantized_inference
from benchmarks.quantized_inference import (
    OTHER_KEYS,
    VARIANTS,
    agreement,
    by_token,
    prepare,
    read_rows,
    rotated_by_token,
)
from benchmarks.results import load
from benchmarks.sparse_quality_texts import Excerpt, Rows
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.load import LoadedModel
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import bind, init_params


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> LoadedModel:
    tokenizer = Tokenizer.train(["tokens do not matter here"], vocab_size=261)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        d_ff=64,
        max_position_embeddings=512,
        initializer_range=0.3,
        dtype="float32",
    )
    return LoadedModel(config, init_params(config, jax.random.key(0)), tokenizer, 0, tmp_path_factory.mktemp("model"))


def test_rows_are_read_as_by_the_whole_forward_pass(published, monkeypatch):
    monkeypatch.setattr(quantized_inference, "CHUNK", 32)
    names = ["float32", "int4 cache", *OTHER_KEYS]
    models = prepare(published, {name: (VARIANTS | OTHER_KEYS)[name] for name in names})
    row = np.random.default_rng(0).integers(0, 261, 65).astype(np.int32)
    found = read_rows(models, [row])
    config, tokens = models["float32"].config, row[None, :-1]
    model = bind(config, published.params)
    hidden = model(tokens, np.arange(64)[None], np.ones_like(tokens))
    log_probs = np.asarray(jax.nn.log_softmax(model.logits(hidden)[0]))
    nats = -log_probs[np.arange(64), row[1:]]
    np.testing.assert_allclose(found["float32"]["nats"], nats[None], rtol=1e-4, atol=1e-4)
    assert not found["float32"]["largest_error"].any()
    divergences = {name: found[name]["kl"].mean() for name in names[1:]}
    assert all(value > 1e-5 for value in divergences.values())
    assert len(set(divergences.values())) == len(divergences)  # each rule does something else


def test_a_rotation_spreads_what_one_channel_has():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 2, 64)), jnp.float32).at[..., 5].add(30.0)
    errors = [float(np.abs(rule(x) - x).mean()) for rule in (by_token, rotated_by_token)]
    assert errors[1] < errors[0] / 2


def test_agreement_ends_with_the_first_other_token():
    base = np.array([[1, 2, 3, 4], [1, 2, 3, 4]])
    assert agreement(np.array([[1, 2, 9, 4], [1, 2, 3, 4]]), base) == 3.0


def test_reports_every_variant(published, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    excerpts = [Excerpt(f"novels{i}", rng.integers(0, 261, 300).astype(np.int32), np.arange(300)) for i in range(2)]
    monkeypatch.setattr(quantized_inference, "load_model", lambda path: published)
    monkeypatch.setattr(quantized_inference, "make_rows", lambda *_: Rows(excerpts, np.zeros((0, 2049), np.int32)))
    chosen = {name: VARIANTS[name] for name in ("float32", "int8 weights and cache")}
    monkeypatch.setattr(quantized_inference, "VARIANTS", chosen)
    monkeypatch.setattr(quantized_inference, "CHUNK", 32)
    arguments = ["--work", str(tmp_path), "--rows", "2", "--length", "32", "--new_tokens", "8", "--context", "40"]
    quantized_inference.main(arguments, tmp_path)
    (result,) = load(tmp_path)
    metrics = [row.metric for row in result["rows"]]
    assert sum(metric.startswith("bits per byte") for metric in metrics) == 3
    assert sum(metric.startswith("decoding") for metric in metrics) == 3
    (cache,) = (row for row in result["rows"] if row.metric.startswith("cache of 4 sequences"))
    assert 2 < cache.ratio < 4
    (weights,) = (row for row in result["rows"] if row.metric.startswith("weights, int8"))
    assert weights.ratio > 1
