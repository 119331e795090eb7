import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from cpm_jax.data.errors import DataError
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.bits_per_byte import document_bits, evaluate, first_token_bits, summarise
from cpm_jax.evaluation.documents import Documents, read_split
from cpm_jax.modeling.decoder import bind, init_params


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for number in range(24):
        body = f"第{number}章 " + " ".join(f"word{(number * i) % 17}" for i in range(20 * (number % 5) + 1))
        (folder / "text" / f"{number:02d}.txt").write_text(body + "\n")
    prepare(
        PrepareConfig(sources=str(folder / "text"), seq_len=32, vocab_size=300, validation_fraction=0.3, num_workers=0),
        folder / "set",
        progress=False,
    )
    return folder


def test_documents_come_back_as_they_were(dataset):
    written = {path.read_text() for path in (dataset / "text").iterdir()}
    splits = {name: read_split(dataset / "set", name) for name in ("train", "validation")}
    assert {text for split in splits.values() for text in split.texts} == written
    assert sum(len(split) for split in splits.values()) == len(written)
    for split in splits.values():
        assert split.text_bytes == split.document_bytes.sum()
    tokenizer = Tokenizer.load(dataset / "set/tokenizer")
    for tokens, text in zip(splits["train"].tokens, splits["train"].texts, strict=True):
        assert tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]


def test_reading_stops_at_a_limit(dataset):
    part = read_split(dataset / "set", "train", max_tokens=100)
    whole = read_split(dataset / "set", "train")
    assert sum(map(len, part.tokens[:-1])) < 100 <= sum(map(len, part.tokens))
    assert part.texts == whole.texts[: len(part)]
    assert part.text_bytes == part.document_bytes.sum()


def test_a_missing_split_is_named(dataset):
    with pytest.raises(DataError, match="no split 'test'"):
        read_split(dataset / "set", "test")


@functools.partial(jax.jit, static_argnums=1)
def _log_probabilities(params, config, tokens):
    decoder = bind(config, params)
    positions = jax.numpy.broadcast_to(jax.numpy.arange(tokens.shape[1]), tokens.shape)
    hidden = decoder(tokens, positions, jax.numpy.ones_like(tokens))
    return jax.nn.log_softmax(decoder.logits(hidden))


def _direct_bits(params, config, tokens):
    """-log2 p of a document that fits one window, by plain log-softmax; what is padded behind is not seen."""
    padded = np.zeros((1, 256), np.int32)
    padded[0, : len(tokens)] = tokens
    logs = np.asarray(_log_probabilities(params, config, padded))[0]
    return -float(logs[np.arange(len(tokens) - 1), tokens[1:].astype(int)].sum()) / math.log(2)


def test_equals_the_direct_sum_where_documents_fit(dataset, tiny_config):
    config = dataclasses.replace(tiny_config, vocab_size=300)
    params = init_params(config, jax.random.key(0))
    documents = read_split(dataset / "set", "validation")
    longest = max(map(len, documents.tokens))
    bits = document_bits(params, config, documents, longest)
    expected = [_direct_bits(params, config, tokens) for tokens in documents.tokens]
    np.testing.assert_allclose(bits, expected, rtol=1e-5)
    score = evaluate(params, config, documents, window=longest, bos_id=1)
    assert score.value == pytest.approx(sum(expected) / documents.document_bytes.sum(), rel=1e-5)
    assert score.tokens == sum(len(tokens) - 1 for tokens in documents.tokens)


def test_long_documents_overlap_by_half_and_count_each_token_once(tiny_config):
    config = dataclasses.replace(tiny_config, num_nextn_predict_layers=1)
    params = init_params(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 128, 83).astype(np.uint32)
    documents = Documents([tokens], ["x" * 83], 83)
    bits = document_bits(params, config, documents, 32)
    plain = dataclasses.replace(config, num_nextn_predict_layers=0)
    params = {name: value for name, value in params.items() if name != "mtp_layers"}
    expected, scored = 0.0, 1
    for begin in (0, 16, 32, 48, 64):
        end = min(begin + 33, 83)
        window = tokens[begin:end]
        # The cost of the tokens after `scored`, given those of the window before.
        before = tokens[begin:scored]
        expected += _direct_bits(params, plain, window)
        expected -= _direct_bits(params, plain, before) if len(before) > 1 else 0.0
        scored = end
    assert scored == 83
    assert bits[0] == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_costs_log_vocabulary(tiny_config):
    params = jax.tree.map(np.zeros_like, init_params(tiny_config, jax.random.key(0)))
    documents = Documents([np.arange(50, dtype=np.uint32), np.array([3, 4], np.uint32)], ["a" * 70, "b" * 7], 77)
    with_bos = evaluate(params, tiny_config, documents, window=16, bos_id=0)
    # The second document does not begin with the BOS: its first token is charged too.
    assert with_bos.value == pytest.approx((49 + 1 + 1) * math.log2(128) / 77, rel=1e-6)
    assert first_token_bits(documents, None, 128).tolist() == [7.0, 7.0]


def test_standard_error_is_that_of_a_ratio():
    """Against the spread of the ratio over many draws of the documents."""
    rng = np.random.default_rng(0)

    def draw(count):
        sizes = rng.integers(50, 500, count)
        return sizes, sizes * rng.gamma(8, 0.25, count)

    values, errors = [], []
    for _ in range(400):
        sizes, bits = draw(100)
        documents = Documents([np.zeros(2, np.uint32)] * 100, ["x" * size for size in sizes], int(sizes.sum()))
        score = summarise(bits, documents)
        values.append(score.value)
        errors.append(score.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.12)
    assert np.mean(values) == pytest.approx(2.0, rel=0.01)
