"""Losses against a plain computation from full logits, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.modeling import decoder
from cpm_jax.training.losses import LossConfig, loss_sums, loss_weights, mimo, mtp_targets, mtp_weight


def row(tokens, segments):
    """A batch of one row from its tokens (one more than inputs) and the documents of the inputs."""
    segments = np.asarray([segments], np.int32)
    following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return {
        "tokens": np.asarray([tokens[:-1]], np.int32),
        "targets": np.asarray([tokens[1:]], np.int32),
        "loss_weights": ((segments == following) & (segments > 0)).astype(np.float32),
        "segment_ids": segments,
    }


def test_mtp_targets_stay_within_documents():
    batch = row([10, 11, 12, 13, 20, 21, 22, 0, 0], [1, 1, 1, 1, 2, 2, 2, 0])
    next_tokens, targets, weights = mtp_targets(batch, 0)
    np.testing.assert_array_equal(next_tokens[0], [11, 12, 13, 20, 21, 22, 0, 0])
    np.testing.assert_array_equal(weights[0], [1, 1, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(np.asarray(targets[0])[np.asarray(weights[0]) > 0], [12, 13, 22])

    next_tokens, targets, weights = mtp_targets(batch, 1)
    np.testing.assert_array_equal(next_tokens[0, :6], [12, 13, 20, 21, 22, 0])
    np.testing.assert_array_equal(weights[0], [1, 0, 0, 0, 0, 0, 0, 0])
    assert int(targets[0, 0]) == 13


def test_mtp_predicts_the_last_target_of_a_row_that_one_document_fills():
    """Packed records hold one token more than the inputs: the last target counts, from one position earlier too."""
    batch = row([1, 2, 3, 4, 5], [1, 1, 1, 1])
    batch["loss_weights"] = np.ones((1, 4), np.float32)
    _, targets, weights = mtp_targets(batch, 0)
    np.testing.assert_array_equal(weights[0], [1, 1, 1, 0])
    np.testing.assert_array_equal(targets[0, :3], [3, 4, 5])


def test_mtp_counts_only_targets_that_count():
    """In SFT only an assistant's tokens are predicted, by MTP layers too."""
    batch = row([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 1])
    batch["loss_weights"] = np.asarray([[0, 0, 1, 1, 0]], np.float32)
    np.testing.assert_array_equal(mtp_targets(batch, 0)[2][0], [0, 1, 1, 0, 0])


def test_mtp_deeper_than_the_row_is_long():
    batch = row([1, 2, 3], [1, 1])
    _, _, weights = mtp_targets(batch, 4)
    np.testing.assert_array_equal(weights, np.zeros((1, 2)))


def test_sums_equal_those_from_full_logits(tiny_config, batch):
    config = dataclasses.replace(tiny_config, num_nextn_predict_layers=2)
    params = decoder.init_params(config, jax.random.key(1))
    model = decoder.bind(config, params)
    sums = jax.jit(lambda p: loss_sums(decoder.bind(config, p), batch, num_sources=3))(params)

    def nll(hidden):
        return -np.asarray(jax.nn.log_softmax(model.logits(hidden)), np.float64)

    hidden = model(batch["tokens"], batch["positions"], batch["segment_ids"])
    rows, length = batch["tokens"].shape
    table = [nll(hidden)]
    for depth in range(2):
        hidden = model.mtp(hidden, mtp_targets(batch, depth)[0], batch["positions"], batch["segment_ids"], depth)
        table.append(nll(hidden))

    # Token by token: position t of a head that looks `ahead` predicts token t + ahead of the same document.
    totals, counts, sources = np.zeros(3), np.zeros(3), np.zeros((2, 3))
    for b in range(rows):
        for t in range(length):
            for ahead in (1, 2, 3):
                end = t + ahead
                if end < length and batch["segment_ids"][b, t] == batch["segment_ids"][b, end] > 0:
                    loss = table[ahead - 1][b, t, batch["tokens"][b, end]]
                    totals[ahead - 1] += loss
                    counts[ahead - 1] += 1
                    if ahead == 1:
                        sources[:, batch["source_ids"][b]] += [loss, 1]
    np.testing.assert_allclose(sums.nll, totals[0], rtol=1e-5)
    np.testing.assert_allclose(sums.mtp_nll, totals[1:], rtol=1e-5)
    np.testing.assert_allclose([sums.source_nll, sums.source_weight], sources, rtol=1e-5)
    weight, mtp_weights = loss_weights(batch, 2)
    np.testing.assert_array_equal([weight, *mtp_weights], counts)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.3), (9, 0.3), (10, 0.1), (1000, 0.1)])
def test_mtp_weight_falls_at_its_step(step, expected):
    config = LossConfig(mtp_final_step=10)
    assert float(jax.jit(lambda s: mtp_weight(config, s))(jnp.int32(step))) == pytest.approx(expected)
    assert float(mtp_weight(LossConfig(), jnp.int32(step))) == pytest.approx(0.3)


def test_mimo_changes_the_weight_after_its_10_trillion_tokens():
    assert mimo(train_steps=1134110).mtp_final_step == pytest.approx(10.3e12 / (2560 * 8192), abs=1)
