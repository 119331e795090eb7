"""Loss to score: closed forms, a published fit with its held-out larger models, and the paper's own table."""

import numpy as np
import pytest

from cpm_jax.scaling.fitting import FitError
from cpm_jax.scaling.scores import (
    check_scores,
    fit_scores,
    noise_ratio,
    paired_difference,
    rank_correlation,
)
from tests.scaling.published import columns, gadre

# Loss of the language model and of ScalingBench, MiniCPM4 (arXiv:2506.07900) table 3, eight cells: 150M at 4, 10, 20
# billion tokens, 360M at 20, 40, 100, 700M at 40, 100; a search by StepLaw (vanilla) and by µP.
LM_VANILLA = (2.1834, 2.0335, 1.9608, 1.8510, 1.7755, 1.7274, 1.6956, 1.6391)
LM_MUP = (2.1797, 2.0491, 1.9666, 1.8547, 1.7721, 1.7174, 1.7091, 1.6419)
BENCH_VANILLA = (0.4310, 0.3897, 0.3685, 0.3383, 0.3172, 0.3004, 0.2984, 0.2805)
BENCH_MUP = (0.4434, 0.3915, 0.3677, 0.3371, 0.3196, 0.3045, 0.3013, 0.2789)


def sigmoid(loss, floor=0.25, ceiling=0.9, gamma=6.0, middle=0.8):
    return floor + (ceiling - floor) / (1 + np.exp(gamma * (loss - middle)))


def test_a_sigmoid_is_found_again():
    losses = np.linspace(0.3, 1.6, 15)
    law = fit_scores(losses, sigmoid(losses), samples=20)
    assert law.coefficients == pytest.approx({"floor": 0.25, "ceiling": 0.9, "gamma": 6.0, "middle": 0.8}, rel=1e-3)
    assert law.predict(0.1) == pytest.approx(sigmoid(0.1), abs=1e-4)


def test_larger_models_scores_are_predicted_from_smaller_ones():
    rng = np.random.default_rng(0)
    losses = np.linspace(0.75, 1.6, 16)
    scores = sigmoid(losses) + 0.008 * rng.standard_normal(16)
    law = fit_scores(losses, scores, floor=0.25, ceiling=0.9)
    held = check_scores(law, [0.6, 0.5, 0.4], sigmoid(np.array([0.6, 0.5, 0.4])))
    assert all(one.covered for one in held)
    assert max(one.predicted.high - one.predicted.low for one in held) < 0.2
    free = fit_scores(losses, scores)
    assert law.interval(0.4).high - law.interval(0.4).low < free.interval(0.4).high - free.interval(0.4).low


def test_an_uncertain_loss_makes_an_uncertain_score():
    losses = np.linspace(0.3, 1.6, 20)
    law = fit_scores(losses, np.clip(sigmoid(losses) + 0.01 * np.random.default_rng(1).standard_normal(20), 0, 1))
    sure, unsure = law.interval(0.8), law.interval(0.8 + 0.1 * np.random.default_rng(0).standard_normal(300))
    assert unsure.high - unsure.low > 2 * (sure.high - sure.low)


@pytest.mark.parametrize(("dataset", "published"), [("rpj", {"open_lm_1b": 3.6365, "open_lm_7b": 0.0464})])
def test_the_published_map_from_loss_to_error_is_reproduced(dataset, published):
    table = gadre(dataset, "five") + [row for row in gadre(dataset, "large") if row["multiplier"] == "1.0"][:1]
    losses, errors = columns(table, "c4_val_loss", "error_17_tasks")
    law = fit_scores(losses, 1 - errors, "exponential", samples=0)
    # They carry the loss that the law of five models predicts; so does this.
    from cpm_jax.scaling.laws import fit_loss
    from tests.scaling.published import gadre_points

    loss_law = fit_loss(gadre_points(gadre(dataset, "five")), "tied", samples=0, squares=True)
    for row in gadre(dataset, "large"):
        if (row["model"], row["multiplier"]) in (("open_lm_1b", "32.0"), ("open_lm_7b", "1.0")):
            predicted = 1 - law.predict(loss_law.predict(float(row["num_params"]), float(row["tokens"])))
            error = 100 * abs(predicted / float(row["error_17_tasks"]) - 1)
            assert error == pytest.approx(published[row["model"]], abs=2e-3)


def test_a_sigmoid_of_small_published_models_predicts_the_larger_ones():
    small, large = gadre("rpj", "small"), gadre("rpj", "large")
    law = fit_scores(columns(small, "c4_val_loss")[0], 1 - columns(small, "error_17_tasks")[0])
    held = check_scores(law, columns(large, "c4_val_loss")[0], 1 - columns(large, "error_17_tasks")[0])
    assert len(held) == 3
    assert all(abs(one.predicted.value - one.score) < 0.05 for one in held)


def test_the_papers_own_table_says_parity():
    language, bench = paired_difference(LM_MUP, LM_VANILLA), paired_difference(BENCH_MUP, BENCH_VANILLA)
    assert language.mean == pytest.approx(0.003, abs=5e-5)
    assert language.relative == pytest.approx(0.0016, abs=5e-5)
    assert bench.mean == pytest.approx(0.0025, abs=5e-5)
    assert bench.relative == pytest.approx(0.0073, abs=5e-5)
    # Neither differs from nothing at 5%: the claim holds as parity, with µP ahead in three of eight cells on both.
    assert language.low < 0 < language.high
    assert bench.low < 0 < bench.high
    assert (language.first_lower, bench.first_lower) == (3, 3)
    assert rank_correlation(LM_VANILLA, BENCH_VANILLA) == pytest.approx(1.0)


def test_orders_and_noise_are_what_they_say():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [40, 30, 20, 10]) == pytest.approx(-1.0)
    assert np.isnan(rank_correlation([0.25, 0.25, 0.25], [1, 2, 3]))  # all guess
    assert noise_ratio([[1.0, 1.1], [2.0, 2.1]]) == pytest.approx(0.1 / np.sqrt(2) / (1 / np.sqrt(2)))
    with pytest.raises(FitError, match="two seeds"):
        noise_ratio([[1.0], [2.0, 2.1]])
    with pytest.raises(FitError, match="three or more pairs"):
        rank_correlation([1, 2], [1, 2])


def test_bad_scores_are_named():
    with pytest.raises(FitError, match="4 free coefficients and needs at least 5"):
        fit_scores([1, 2, 3], [0.1, 0.2, 0.3])
    with pytest.raises(FitError, match=r"scores in \[0, 1\]"):
        fit_scores([1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 50])
    with pytest.raises(FitError, match=r"all losses are 1\.0000"):
        fit_scores([1] * 5, [0.1] * 5)
    with pytest.raises(FitError, match=r"all scores are 0\.2500"):
        fit_scores([1, 2, 3, 4, 5], [0.25] * 5)
    with pytest.raises(FitError, match="the same two or more"):
        paired_difference([1], [2])
