"""A stable run with several decays stands for several runs."""

import dataclasses

import pytest

from cpm_jax.common.config import InputError
from cpm_jax.scaling.runs import Run
from cpm_jax.scaling.wsd import Decay, wsd_family

STABLE = Run("stable", 1000, 100, 8, 1, 90_000, 6.6e8, 100, 0.01, 0, None, seconds=90.0, status="stopped")


def decay(start, end, **changes):
    values = {"id": f"d{end}", "tokens": end, "flops": 1.0, "loss": 3.0, "status": "done", "learning_rate": 0.01}
    return Decay(start, dataclasses.replace(STABLE, seconds=end / 1000, **(values | changes)))


def test_each_decay_is_a_run_of_its_own_length():
    family = wsd_family(STABLE, [decay(9_000, 10_000), decay(36_000, 40_000), decay(90_000, 100_000)])
    assert [run.tokens for run in family.runs] == [10_000, 40_000, 100_000]
    assert [run.flops for run in family.runs] == pytest.approx([6.6e8 / 9e4 * t for t in (1e4, 4e4, 1e5)])
    assert [run.seconds for run in family.runs] == pytest.approx([10.0, 40.0, 100.0])
    assert family.runs[0].config == {"stable_run": "stable", "decay_share": pytest.approx(0.1)}
    assert family.tokens_trained == 90_000 + 1_000 + 4_000 + 10_000
    assert family.tokens_alone == 150_000


@pytest.mark.parametrize(
    ("decays", "message"),
    [
        ([], "is empty"),
        ([decay(95_000, 100_000)], r"it starts at 95000 tokens .* to the stable run's 90000"),
        ([decay(9_000, 9_000)], "ends at 9000"),
        ([decay(9_000, 10_000, num_params=7)], "num_params = 7, the stable run stable has 1000"),
        ([decay(9_000, 10_000), decay(20_000, 40_000)], r"decay d10000 is 10.0% of its tokens and d40000 50.0%"),
    ],
)
def test_families_that_cannot_be_compared_are_refused(decays, message):
    with pytest.raises(InputError, match=message):
        wsd_family(STABLE, decays)
