"""What to take and what it cost, on trials made by hand."""

import math

import pytest

from cpm_jax.scaling import trials as t
from cpm_jax.scaling.trials import Trial

DIMENSIONS = {"D_MODEL+H": ["D_MODEL=64, H=1", "D_MODEL=128, H=2"], "PEAK_LR": [0.01, 0.02, 0.04], "SEED": [0, 1]}


def trial(number, width, lr, seed, loss, status="done", tokens=1000, **more):
    return Trial(
        number=number,
        id=more.pop("id", f"{width}-{lr}-{seed}"),
        choices={"D_MODEL+H": f"D_MODEL={width}, H={width // 64}", "PEAK_LR": lr, "SEED": seed},
        bindings={"D_MODEL": width, "H": width // 64, "PEAK_LR": lr, "SEED": seed},
        status=status,
        loss=loss,
        tokens=tokens,
        planned_tokens=1000,
        flops=tokens * width,
        planned_flops=1000.0 * width,
        cpu_seconds=36.0,
        **more,
    )


LOSSES = {(64, 0.01): 3.2, (64, 0.02): 3.0, (64, 0.04): 3.1, (128, 0.01): 2.9, (128, 0.02): 2.65, (128, 0.04): 2.6}


@pytest.fixture
def grid():
    return [
        trial(n, width, lr, seed, loss + 0.02 * seed)
        for n, ((width, lr), loss, seed) in enumerate(
            ((key, loss, seed) for key, loss in LOSSES.items() for seed in (0, 1))
        )
    ]


def test_settings_are_means_over_seeds_and_the_best_of_each_width_is_found(grid):
    found = t.settings(grid, group_by="D_MODEL")
    assert [s.loss for s in found] == sorted(s.loss for s in found)
    assert len(found) == 6
    narrow, wide = t.best_settings(found)
    assert (narrow.group, narrow.bindings["PEAK_LR"], narrow.loss) == (64, 0.02, pytest.approx(3.01))
    assert (wide.group, wide.bindings["PEAK_LR"], wide.loss) == (128, 0.04, pytest.approx(2.61))
    assert narrow.seeds == 2
    assert narrow.spread == pytest.approx(0.02 / math.sqrt(2))


def test_one_step_wrong_is_measured_at_the_neighbours_alone(grid):
    found = t.settings(grid, group_by="D_MODEL")
    narrow, wide = t.best_settings(found)
    costs = {(s.label, s.other): s.cost for s in t.one_step_wrong(narrow, found, DIMENSIONS, "D_MODEL")}
    assert costs == {("PEAK_LR", 0.01): pytest.approx(0.2), ("PEAK_LR", 0.04): pytest.approx(0.1)}
    costs = {(s.label, s.other): s.cost for s in t.one_step_wrong(wide, found, DIMENSIONS, "D_MODEL")}
    assert costs == {("PEAK_LR", 0.02): pytest.approx(0.05)}
    assert t.at_the_edge(wide, DIMENSIONS, "D_MODEL") == ["PEAK_LR"]
    assert t.at_the_edge(narrow, DIMENSIONS, "D_MODEL") == []


def test_a_step_between_numbers_is_the_next_in_size_however_they_are_listed(grid):
    found = t.settings(grid, group_by="D_MODEL")
    listed = DIMENSIONS | {"PEAK_LR": [0.02, 0.01, 0.04]}
    steps = t.one_step_wrong(t.best_settings(found)[0], found, listed, "D_MODEL")
    assert [step.other for step in steps] == [0.01, 0.04]


def test_one_setting_for_all_groups_is_that_of_the_least_regret(grid):
    shared = t.shared_setting(t.settings(grid, group_by="D_MODEL"), "D_MODEL")
    assert shared.choices == {"PEAK_LR": 0.02}  # 0.04 is 0.1 worse when narrow, 0.02 only 0.05 when wide
    assert shared.regret == pytest.approx(0.05)
    assert t.shared_setting(t.settings(grid), "") is None
    alone = [x for x in grid if x.bindings["D_MODEL"] == 64 or x.bindings["PEAK_LR"] == 0.01]
    assert t.shared_setting(t.settings(alone, group_by="D_MODEL"), "D_MODEL").choices == {"PEAK_LR": 0.01}


def test_loss_over_a_dimension_is_the_best_at_each_value(grid):
    found = t.settings(grid, group_by="D_MODEL")
    curves = t.loss_over(found, "PEAK_LR")
    assert list(curves) == [64, 128]
    assert curves[64] == [(0.01, pytest.approx(3.21)), (0.02, pytest.approx(3.01)), (0.04, pytest.approx(3.11))]
    assert t.loss_over(t.settings(grid), "PEAK_LR")[None][1] == (0.02, pytest.approx(2.66))


def test_in_a_range_a_step_is_the_next_measured_value():
    trials = [
        Trial(n, str(n), {"LR": lr}, {"LR": lr}, "done", loss=loss, tokens=10)
        for n, (lr, loss) in enumerate([(0.001, 4.0), (0.009, 3.1), (0.01, 3.0), (0.02, 3.3), (0.5, 9.0)])
    ]
    found = t.settings(trials)
    steps = t.one_step_wrong(found[0], found, {"LR": {"low": 1e-3, "high": 1, "log": True}})
    assert [(s.other, round(s.cost, 6)) for s in steps] == [(0.009, 0.1), (0.02, 0.3)]


def test_what_did_not_end_well_or_at_the_same_tokens_is_not_compared(grid):
    odd = [
        trial(90, 64, 0.08, 0, 1.0, status="pruned", tokens=100),
        trial(91, 64, 0.16, 0, math.nan, status="diverged"),
        trial(92, 64, 0.32, 0, 0.5, tokens=2000),
        trial(93, 64, 0.02, 0, 0.1, status="duplicate"),
        trial(94, 64, 0.02, 1, 0.1, status="retried"),
    ]
    compared, others = t.split_by_tokens([*grid, *odd])
    assert [x.number for x in compared] == [x.number for x in grid]
    assert [x.number for x in others] == [92]
    assert t.settings([*grid, *odd]) == t.settings(grid)


def test_the_bill_counts_every_training_once(grid):
    pruned = trial(90, 64, 0.08, 0, 3.5, status="pruned", tokens=100)
    twin = trial(91, 64, 0.01, 0, 3.2, status="duplicate")
    died = trial(92, 128, 0.02, 0, 2.7, status="retried")
    bill = t.bill([*grid, pruned, twin, died])
    assert bill.flops == sum(x.flops for x in grid) + 100 * 64
    assert bill.core_hours == pytest.approx(13 * 0.01)
    assert bill.naive_flops == 13 * 128_000
    assert t.bill(grid, full_flops=1e9, full_size="8B").naive_flops == 12e9


def test_nothing_that_ended_well_gives_no_setting():
    assert t.settings([trial(0, 64, 0.01, 0, None, status="failed")]) == []
    assert t.bill([]).flops == 0
