"""The law of mixtures: closed forms and their optimum are found again."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from cpm_jax.scaling.fitting import FitError
from cpm_jax.scaling.mixtures import as_shares, fit_mixture, suggest_mixture

DOMAINS = ("web", "code", "books")
MIXTURES = np.random.default_rng(0).dirichlet((1.5, 1.5, 1.5), size=24)
# Of two held-out sets: each domain helps one of them and costs the other.
SLOPES = {"prose": np.array([-0.6, 0.9, -1.2]), "programs": np.array([0.5, -1.6, 0.8])}
CONSTANTS = {"prose": 2.2, "programs": 1.1}


def loss(name, shares):
    return CONSTANTS[name] + np.exp(np.asarray(shares) @ SLOPES[name])


def law(name, noise=0.0, samples=40, seed=0):
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(len(MIXTURES)))
    return fit_mixture(DOMAINS, MIXTURES, loss(name, MIXTURES) * scatter, samples=samples)


@pytest.mark.parametrize("name", SLOPES)
def test_coefficients_are_found_again(name):
    found = law(name, samples=0)
    assert found.constant == pytest.approx(CONSTANTS[name], rel=1e-3)
    assert list(found.slopes.values()) == pytest.approx(SLOPES[name], abs=2e-3)
    assert found.predict({"code": 0.2, "web": 0.5, "books": 0.3}) == pytest.approx(
        loss(name, (0.5, 0.2, 0.3)), rel=1e-4
    )


def test_the_optimum_of_two_sets_is_found_again():
    # web never pays here, so that the optimum lies on the line between code and books, where one number is left.
    def total(code):
        return sum(loss(name, (0.0, code, 1 - code)) for name in SLOPES) / 2

    wanted = minimize_scalar(total, bounds=(0, 1), method="bounded", options={"xatol": 1e-8})
    best = suggest_mixture([law(name, samples=0) for name in SLOPES])
    grid = [(a, b, 1 - a - b) for a in np.linspace(0, 1, 101) for b in np.linspace(0, 1 - a, 101)]
    assert best.loss.value <= min(sum(loss(name, row) for name in SLOPES) / 2 for row in grid) + 1e-4
    if best.shares["web"].value < 1e-3:
        assert best.shares["code"].value == pytest.approx(wanted.x, abs=5e-3)
        assert best.loss.value == pytest.approx(wanted.fun, rel=1e-4)
    assert sum(share.value for share in best.shares.values()) == pytest.approx(1.0)


def test_bounds_and_weights_are_kept():
    laws = [law(name, noise=0.002) for name in SLOPES]
    best = suggest_mixture(laws, bounds={"web": (0.4, 1.0), "code": (0.0, 0.25)})
    assert best.shares["web"].value >= 0.4 - 1e-9
    assert best.shares["code"].value <= 0.25 + 1e-9
    only = suggest_mixture(laws, weights=[0.0, 1.0])
    assert only.shares["code"].value > 0.95  # one set alone is best served by one domain
    with pytest.raises(FitError, match="leave no shares"):
        suggest_mixture(laws, bounds={"web": (0.0, 0.2), "code": (0.0, 0.2), "books": (0.0, 0.2)})
    with pytest.raises(FitError, match="leave no shares"):
        suggest_mixture(laws, bounds={"web": (0.8, 0.2)})
    with pytest.raises(FitError, match=r"weights = \[0, 0\]: give one"):
        suggest_mixture(laws, weights=[0, 0])
    with pytest.raises(FitError, match="names \\['poems'\\]"):
        suggest_mixture(laws, bounds={"poems": (0.0, 0.2)})


def test_the_suggestion_says_how_sure_it_is():
    sure = suggest_mixture([law(name, noise=0.0005) for name in SLOPES])
    unsure = suggest_mixture([law(name, noise=0.02) for name in SLOPES])
    width = {kind: found.shares["code"].high - found.shares["code"].low for kind, found in (("s", sure), ("u", unsure))}
    assert width["u"] > 3 * width["s"]
    assert sure.loss.low <= sure.loss.value <= sure.loss.high
    assert sure.gain.value > -1e-3
    assert 0 <= unsure.probability <= 1


def test_the_interval_of_a_run_covers_about_as_often_as_it_says():
    rng, where, hits = np.random.default_rng(5), (0.2, 0.5, 0.3), 0
    for seed in range(20):
        interval = law("prose", noise=0.003, samples=60, seed=seed).interval(where)
        hits += interval.low < loss("prose", where) * np.exp(0.003 * rng.standard_normal()) < interval.high
    assert hits >= 13


def test_bad_mixtures_are_named():
    with pytest.raises(FitError, match="needs two domains or more"):
        fit_mixture(DOMAINS, MIXTURES[:4], [1.0] * 4)
    with pytest.raises(FitError, match="that sum to 1"):
        fit_mixture(DOMAINS, [(0.5, 0.5, 0.5)] * 9, [1.0] * 9)
    with pytest.raises(FitError, match="vary in fewer directions"):
        fit_mixture(DOMAINS, [(s, 1 - s, 0) for s in np.linspace(0, 1, 9)], [1.0] * 9)
    with pytest.raises(FitError, match="loss nan"):
        fit_mixture(DOMAINS, MIXTURES, [np.nan, *loss("prose", MIXTURES)[1:]])
    with pytest.raises(FitError, match="the shares are of"):
        as_shares(DOMAINS, {"web": 1.0})
    with pytest.raises(FitError, match="no bootstrap"):
        law("prose", samples=0).interval((0.2, 0.5, 0.3))
