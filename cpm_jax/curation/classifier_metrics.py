"""How good the scores of a classifier are, and where to cut them."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from cpm_jax.common.config import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Precision and recall at every threshold that a set of scores allows, thresholds ascending.

    Attributes:
        thresholds: distinct scores; a document is kept at a score of at least the threshold.
        precision: share of positives among what is kept.
        recall: share of the positives that is kept.
        keep_rate: share of all documents that is kept.
    """

    thresholds: Float[np.ndarray, " t"]
    precision: Float[np.ndarray, " t"]
    recall: Float[np.ndarray, " t"]
    keep_rate: Float[np.ndarray, " t"]

    @property
    def average_precision(self) -> float:
        """Σ (recall step) · precision, from the highest threshold down; 1 is perfect, the share of positives chance."""
        return float(-np.sum(np.diff(np.append(self.recall, 0.0)) * self.precision))


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Whether a score of p means that a share p of such documents is positive.

    Attributes:
        mean_score: mean score of each bin that has documents.
        positive_share: share of positives in it.
        count: its documents.
        expected_error: mean of |mean_score - positive_share| over documents (expected calibration error).
        brier: mean of (score - label)² over documents.
    """

    mean_score: Float[np.ndarray, " b"]
    positive_share: Float[np.ndarray, " b"]
    count: Int[np.ndarray, " b"]
    expected_error: float
    brier: float


def precision_recall(scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]) -> PrecisionRecall:
    """The curve over all thresholds.

    Args:
        scores: of documents.
        labels: whether each is positive; at least one is.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # equal scores are kept together
    found = np.cumsum(labels[order])[last]
    kept = last + 1
    recall = found / labels.sum()
    curve = (scores[order][last], found / kept, recall, kept / len(scores))
    return PrecisionRecall(*(values[::-1] for values in curve))


def calibration(scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"], bins: int = 10) -> Calibration:
    """Compares scores in [0, 1] with shares of positives, in bins of equal width."""
    bin_of = np.minimum((scores * bins).astype(int), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    used = count > 0
    mean_score = np.bincount(bin_of, scores, bins)[used] / count[used]
    share = np.bincount(bin_of, labels, bins)[used] / count[used]
    error = float(np.sum(np.abs(mean_score - share) * count[used]) / len(scores))
    return Calibration(mean_score, share, count[used], error, float(np.mean((scores - labels) ** 2)))


def threshold_for_precision(curve: PrecisionRecall, precision: float) -> float:
    """The lowest threshold from which on what is kept has at least this precision: the most that may be kept.

    Raises:
        InputError: no threshold reaches it.
    """
    reached = np.flatnonzero(curve.precision >= precision)
    if not len(reached):
        raise InputError(
            f"precision = {precision}: no threshold reaches it on the held-out documents; the best is "
            f"{curve.precision.max():.4f}"
        )
    return float(curve.thresholds[reached[0]])


def threshold_for_keep_rate(scores: Float[np.ndarray, " n"], keep_rate: float) -> float:
    """The threshold that keeps the best-scored share of documents: at least one, and more only among equal scores."""
    kept = max(1, round(keep_rate * len(scores)))
    return float(np.sort(scores)[-kept])


def roc_auc(scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"]) -> float:
    """The probability that a positive document scores above a negative one, ties counting half (Mann-Whitney)."""
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = int(labels.sum())
    wins = ranks[labels].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * (len(values[inverse]) - positives)))
