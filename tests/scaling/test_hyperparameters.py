"""Best settings, power laws and critical batches: closed forms are found again."""

import dataclasses

import numpy as np
import pytest

from cpm_jax.common.config import InputError
from cpm_jax.scaling.fitting import FitError
from cpm_jax.scaling.hyperparameters import (
    find_optima,
    fit_critical_batch,
    fit_power_law,
    gradient_noise_scale,
    optimum_on_grid,
    optimum_on_surface,
    steps_to_loss,
)
from cpm_jax.scaling.runs import Run

RUN = Run("r", 1000, 0, 8, 1, 100_000, 6e8, 100, 0.01, 0, 3.0)


def sweep(num_params, tokens, best, grid=(0.001, 0.002, 0.004, 0.008, 0.016), seeds=(0, 1)):
    return [
        dataclasses.replace(
            RUN,
            id=f"{num_params}-{tokens}-{rate}-{seed}",
            num_params=num_params,
            tokens=tokens,
            learning_rate=rate,
            seed=seed,
            loss=3.0 + 0.02 * np.log(rate / best) ** 2 + 0.01 * (seed - 0.5),
        )
        for rate in grid
        for seed in seeds
    ]


def test_the_optimum_lies_between_grid_points():
    for best in (0.0025, 0.004, 0.0053):
        (found,) = find_optima(sweep(1000, 100_000, best))
        assert found.value == pytest.approx(best, rel=1e-6)
        assert found.loss == pytest.approx(3.0, abs=1e-9)
        assert not found.at_edge
    assert found.one_step_off == pytest.approx(
        0.02 * (np.log(0.002 / 0.0053) ** 2 - np.log(0.004 / 0.0053) ** 2), abs=1e-9
    )


def test_an_optimum_at_the_edge_says_so():
    value, loss, at_edge, _ = optimum_on_grid([1, 2, 4], [1.0, 2.0, 3.0])
    assert (value, loss, at_edge) == (1.0, 1.0, True)
    with pytest.raises(FitError, match="not three or more"):
        optimum_on_grid([1, 2], [1.0, 2.0])


def test_the_optimum_of_a_surface_is_found_between_its_points():
    rates, batches = (grid.ravel() for grid in np.meshgrid(2.0 ** np.arange(-12, -4), 2.0 ** np.arange(10, 18)))
    x, y = np.log(rates / 0.0031), np.log(batches / 9000)
    losses = 2.5 + 0.01 * x**2 + 0.006 * y**2 - 0.008 * x * y
    rate, batch, loss = optimum_on_surface(rates, batches, losses)
    assert (rate, batch, loss) == pytest.approx((0.0031, 9000, 2.5), rel=1e-6)
    noisy = losses + 0.002 * np.random.default_rng(0).standard_normal(len(losses))
    rate, batch, _ = optimum_on_surface(rates, batches, noisy)
    assert abs(np.log2(rate / 0.0031)) < 0.5
    assert abs(np.log2(batch / 9000)) < 0.7
    with pytest.raises(FitError, match="a surface needs eight"):
        optimum_on_surface(rates[:5], batches[:5], losses[:5])
    with pytest.raises(FitError, match="widen the grid"):
        optimum_on_surface(rates, batches, 2.5 + 0.001 * (x + y))


def test_each_value_counts_with_the_best_of_the_other_settings():
    small = sweep(1000, 100_000, 0.004)
    # The larger batch does worse, most of all at the rates that are best for the smaller one.
    large = [
        dataclasses.replace(
            run, id=f"{run.id}-large", batch_tokens=200, loss=3.5 + 0.1 * abs(np.log(run.learning_rate))
        )
        for run in small
    ]
    assert find_optima(small + large) == find_optima(small)
    named = [dataclasses.replace(run, config={"SEED": run.seed, "PEAK_LR": run.learning_rate}) for run in small]
    assert find_optima(named) == find_optima(small)  # seeds are no setting


def test_unequal_tokens_and_small_grids_are_named():
    with pytest.raises(FitError, match="no size has runs at three values"):
        find_optima(sweep(1000, 100_000, 0.004, grid=(0.001, 0.002)))
    runs = sweep(1000, 100_000, 0.004)
    runs[0] = dataclasses.replace(runs[0], tokens=104_000)
    with pytest.raises(InputError, match="compares runs of unequal token counts"):
        find_optima(runs)


def test_step_laws_power_law_is_found_again_from_sweeps():
    optima = []
    for num_params in (10**6, 4 * 10**6, 16 * 10**6):
        for tokens in (10**8, 5 * 10**8, 2 * 10**9):
            best = 1.79 * num_params**-0.713 * tokens**0.307
            grid = best * 1.3 * 2.0 ** np.arange(-3, 4)
            optima += find_optima(sweep(num_params, tokens, best, grid=tuple(map(float, grid))))
    law = fit_power_law(
        [optimum.value for optimum in optima],
        {"num_params": [o.num_params for o in optima], "tokens": [o.tokens for o in optima]},
    )
    assert law.coefficient == pytest.approx(1.79, rel=1e-3)
    assert law.exponents == pytest.approx({"num_params": -0.713, "tokens": 0.307}, abs=1e-4)
    assert law.predict(num_params=8e9, tokens=8e12) == pytest.approx(1.79 * 8e9**-0.713 * 8e12**0.307, rel=1e-3)


def test_a_power_laws_intervals_cover_about_as_often_as_they_say():
    x, hits, of_exponent, wider = np.repeat(np.geomspace(1e6, 1e8, 6), 3), 0, 0, []
    for seed in range(20):
        noise = 0.1 * np.random.default_rng(seed).standard_normal(len(x))
        law = fit_power_law(3 * x**-0.5 * np.exp(noise), {"n": x}, samples=100)
        near, far, ends = law.interval(n=1e7), law.interval(n=1e11), law.exponent_intervals()["n"]
        wider.append(np.log(far.high / far.low) / np.log(near.high / near.low))
        hits += far.low < 3 * 1e11**-0.5 < far.high
        of_exponent += ends.low < -0.5 < ends.high
    assert np.mean(wider) > 1.2
    assert min(hits, of_exponent) >= 13  # 18 are expected; 12 or fewer have a probability of 1e-4


def test_power_laws_that_cannot_be_told_are_refused():
    n = np.geomspace(1, 100, 6)
    with pytest.raises(FitError, match="vary together"):
        fit_power_law(n, {"n": n, "d": 20 * n})
    with pytest.raises(FitError, match="d is about 20 in all points"):
        fit_power_law(n, {"n": n, "d": np.full(6, 20.0)})
    with pytest.raises(FitError, match="at least two points more"):
        fit_power_law(n[:2], {"n": n[:2]})
    with pytest.raises(FitError, match="y = nan"):
        fit_power_law([*n[:5], np.nan], {"n": n})
    with pytest.raises(FitError, match=r"has the variables \['n'\]"):
        fit_power_law(n, {"n": n}).predict(m=3)


def test_the_critical_batch_is_found_again():
    batch = np.geomspace(1e3, 1e6, 7)
    found = fit_critical_batch(batch, 2000 + 8e7 / batch)
    assert found.min_steps == pytest.approx(2000, rel=1e-3)
    assert found.min_tokens == pytest.approx(8e7, rel=1e-3)
    assert found.critical_batch_tokens == pytest.approx(4e4, rel=2e-3)
    with pytest.raises(FitError, match="three different batch sizes"):
        fit_critical_batch([1, 2, 2], [3, 2, 2])


def test_steps_to_a_loss_lie_between_evaluations():
    steps = np.array([100, 200, 400, 800])
    losses = 5 - np.log(steps)
    assert steps_to_loss(steps, losses, 5 - np.log(300)) == pytest.approx(300)
    assert steps_to_loss(steps, losses, 1.0) == 100
    with pytest.raises(FitError, match="not reached"):
        steps_to_loss(steps, losses, -3)


def test_the_noise_scale_is_that_of_drawn_gradients():
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=50)
    deviations = rng.uniform(0.5, 3, size=50)
    wanted = (deviations**2).sum() / (gradient**2).sum()

    def mean_square(batch):
        noise = rng.normal(size=(20_000, 50)) * deviations / np.sqrt(batch)
        return ((gradient + noise) ** 2).sum(axis=1).mean()

    assert gradient_noise_scale(4, 64, mean_square(4), mean_square(64)) == pytest.approx(wanted, rel=0.02)
    with pytest.raises(FitError, match="average over more"):
        gradient_noise_scale(4, 64, 1.0, 2.0)
    with pytest.raises(FitError, match="must be the larger"):
        gradient_noise_scale(4, 4, 1.0, 2.0)
