import collections
import itertools
import math

import numpy as np
import pytest

from cpm_jax.evaluation.ngram import NgramModel, _discounts

V = 7


def _documents(seed=0, count=30):
    rng = np.random.default_rng(seed)
    # Zipf-like, so that there are n-grams of every count.
    return [np.concatenate([[0], rng.zipf(1.6, rng.integers(1, 40)) % V]) for _ in range(count)]


def _reference(documents, order, history, word):
    """Interpolated modified Kneser-Ney, word by word as the paper writes it, with dicts."""
    grams = {n: collections.Counter() for n in range(1, order + 1)}
    for document in documents:
        for n, end in itertools.product(range(1, order + 1), range(len(document))):
            if end - n + 1 >= 0 and (n > 1 or end > 0):
                grams[n][tuple(int(t) for t in document[end - n + 1 : end + 1])] += 1
    counts = dict(grams)
    for n in range(1, order):
        kinds = collections.Counter(gram[1:] for gram in grams[n + 1])
        counts[n] = {gram: kinds[gram] or count for gram, count in grams[n].items()}
        if n == 1:
            counts[1] |= {gram: kind for gram, kind in kinds.items() if gram not in counts[1]}

    def probability(history, word):
        n = len(history) + 1
        table = counts[n]
        lower = probability(history[1:], word) if history else 1 / V
        following = {gram[-1]: count for gram, count in table.items() if gram[:-1] == history and count}
        if not following:
            return lower
        d = (0, *_discounts(np.array(list(table.values()))))
        total = sum(following.values())
        gamma = sum(d[min(count, 3)] for count in following.values()) / total
        count = following.get(word, 0)
        return (count - d[min(count, 3)]) / total + gamma * lower

    return probability(tuple(history), word)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_sums_to_one_in_every_context(order):
    model = NgramModel(_documents(), V, order)
    rng = np.random.default_rng(5)
    for length in (1, 2, 3, 6):
        for _ in range(10):
            context = rng.integers(0, V, length)
            logs = model.log_probabilities([np.append(context, word) for word in range(V)])
            assert sum(math.exp(part[-1]) for part in logs) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_equals_the_formula_by_hand(order):
    documents = _documents()
    model = NgramModel(documents, V, order)
    for document in _documents(seed=9, count=4):
        logs = model.log_probabilities([document])[0]
        for end in range(1, len(document)):
            history = [int(t) for t in document[max(0, end - order + 1) : end]]
            expected = _reference(documents, order, history, int(document[end]))
            assert math.exp(logs[end - 1]) == pytest.approx(expected, rel=1e-9)


def test_more_context_helps_on_text_that_has_structure():
    rng = np.random.default_rng(0)
    words = [rng.integers(1, 50, 6) for _ in range(30)]

    def document():
        return np.concatenate([[0], *[words[i] for i in rng.integers(0, 30, 40)]])

    train, held_out = [document() for _ in range(20)], [document() for _ in range(5)]
    bits = [NgramModel(train, 50, order).document_bits(held_out).sum() for order in (1, 2, 3)]
    assert bits[0] > 1.5 * bits[1] > 1.5 * bits[2]
    # Each word of six tokens is one choice of thirty; knowing them all, no model can do better.
    assert bits[2] > 5 * 40 * math.log2(30) * 0.95


def test_documents_are_scored_apart():
    model = NgramModel(_documents(), V, 3)
    one, two = _documents(seed=3, count=2)
    together = model.document_bits([one, two])
    assert together.tolist() == [model.document_bits([one])[0], model.document_bits([two])[0]]


def test_never_seen_tokens_have_a_probability():
    model = NgramModel([np.array([0, 1, 1, 2, 1])], 1000, 5)
    logs = model.log_probabilities([np.array([0, 999, 998])])[0]
    assert np.isfinite(logs).all()


@pytest.mark.parametrize(("documents", "message"), [([np.array([9])], "9"), ([np.array([1])], "nothing to count")])
def test_what_cannot_be_counted_is_an_error(documents, message):
    with pytest.raises(ValueError, match=message):
        NgramModel(documents, V)
