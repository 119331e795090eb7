"""Time from costs, on a chip whose figures are round."""

import pytest

from cpm_jax.planning.chips import Chip, Topology
from cpm_jax.planning.hlo_costs import Collective, Costs, Operation
from cpm_jax.planning.roofline import step_time

TOPOLOGY = Topology(Chip("round", 100.0, 1000, 10.0, 1.0, 2, 4, ("4x4",)), (4, 4))  # 4 bytes/s over both axes


def collective(region, num_bytes, overlapped, executions=1):
    return Collective("all-gather", region, executions, num_bytes, 16, overlapped, "")


def test_an_operation_takes_the_longer_of_flops_and_bytes():
    costs = Costs((Operation("main", 1, 200.0, 5.0), Operation("main", 3, 10.0, 20.0)), (), ())
    time = step_time(costs, TOPOLOGY)
    assert (time.matmul, time.memory) == (2.3, 6.5)
    assert time.compute == 2.0 + 3 * 2.0
    assert time.exposed == time.hidden == 0


def test_a_region_never_takes_less_than_its_traffic():
    """A prefetch runs beside a product, until there is more to fetch than the product takes."""
    product, fetch = Operation("main", 1, 200.0, 5.0), Operation("main", 1, 0.0, 50.0, prefetch=True)
    assert step_time(Costs((product, Operation("main", 1, 0.0, 9.0, prefetch=True)), (), ()), TOPOLOGY).compute == 2.0
    assert step_time(Costs((product, fetch), (), ()), TOPOLOGY).compute == 5.5


def test_communication_hides_behind_the_computation_of_its_own_region():
    operations = Operation("loop", 2, 100.0, 0.0), Operation("main", 1, 5000.0, 0.0)
    hides = Costs(operations, (collective("loop", 4.0, True, executions=2),), ())
    assert step_time(hides, TOPOLOGY).exposed == 0
    assert step_time(hides, TOPOLOGY).hidden == pytest.approx(2 * 4 * 15 / 16 / 4)
    too_much = Costs(operations, (collective("loop", 16.0, True, executions=2),), ())
    time = step_time(too_much, TOPOLOGY)
    assert (time.exposed, time.hidden) == pytest.approx((7.5 - 2.0, 2.0))
    assert time.total == pytest.approx(52 + 5.5)


def test_other_communication_is_added():
    costs = Costs((Operation("main", 1, 100.0, 0.0),), (collective("main", 16.0, False),), ())
    assert step_time(costs, TOPOLOGY).total == pytest.approx(1 + 3.75)
