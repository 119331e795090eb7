import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics

from cpm_jax.common.config import InputError
from cpm_jax.curation.classifier_metrics import (
    calibration,
    precision_recall,
    roc_auc,
    threshold_for_keep_rate,
    threshold_for_precision,
)


@pytest.fixture(params=["distinct", "ties"])
def scored(request):
    rng = np.random.default_rng(1)
    labels = rng.random(400) < 0.3
    scores = np.clip(0.3 * labels + 0.7 * rng.random(400), 0, 1)
    return (np.round(scores, 1) if request.param == "ties" else scores), labels


def test_curve_is_that_of_scikit_learn(scored):
    scores, labels = scored
    curve = precision_recall(scores, labels)
    precision, recall, thresholds = sklearn.metrics.precision_recall_curve(labels, scores)
    np.testing.assert_allclose(curve.thresholds, thresholds)
    np.testing.assert_allclose(curve.precision, precision[:-1])
    np.testing.assert_allclose(curve.recall, recall[:-1])
    assert curve.average_precision == pytest.approx(sklearn.metrics.average_precision_score(labels, scores))
    assert roc_auc(scores, labels) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))
    np.testing.assert_allclose(curve.keep_rate, [(scores >= t).mean() for t in curve.thresholds])


def test_calibration_is_that_of_scikit_learn():
    rng = np.random.default_rng(2)
    scores = rng.random(5000)  # sklearn puts scores at an edge into the lower bin, so none may lie there
    labels = rng.random(5000) < scores**2
    found = calibration(scores, labels)
    share, mean_score = sklearn.calibration.calibration_curve(labels, scores, n_bins=10)
    np.testing.assert_allclose(found.positive_share, share)
    np.testing.assert_allclose(found.mean_score, mean_score)
    assert found.brier == pytest.approx(sklearn.metrics.brier_score_loss(labels, scores))
    # E|p - p²| of p uniform in [0, 1] is 1/6.
    assert found.expected_error == pytest.approx(1 / 6, abs=0.02)


def test_threshold_for_a_precision_keeps_the_most(scored):
    scores, labels = scored
    threshold = threshold_for_precision(precision_recall(scores, labels), 0.8)
    assert labels[scores >= threshold].mean() >= 0.8
    lower = [labels[scores >= t].mean() for t in np.unique(scores[scores < threshold])]
    assert all(precision < 0.8 for precision in lower)


def test_a_precision_that_cannot_be_reached_is_said():
    with pytest.raises(InputError, match=r"precision = 0\.9: .* best is 0\.5000"):
        threshold_for_precision(precision_recall(np.array([0.1, 0.2]), np.array([True, False])), 0.9)


@pytest.mark.parametrize("rate", [0.1, 0.37, 1.0])
def test_threshold_for_a_keep_rate(rate):
    scores = np.random.default_rng(3).random(1000)
    assert (scores >= threshold_for_keep_rate(scores, rate)).mean() == pytest.approx(rate, abs=1e-3)


def test_a_keep_rate_keeps_at_least_one():
    assert threshold_for_keep_rate(np.array([0.2, 0.9]), 0.01) == 0.9
