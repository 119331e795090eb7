"""Chips and topologies."""

import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.planning.chips import CHIPS, parse_topology


def test_pods_of_the_published_tables():
    """Peak FLOP/s of whole pods as Google gives them, and interconnect of a chip in both directions together."""
    assert 4096 * CHIPS["v4"].peak_flops == pytest.approx(1.1e18, rel=0.03)
    assert 256 * CHIPS["v6e"].peak_flops == pytest.approx(234.9e15, rel=0.01)
    both_ways = {name: 2 * 2 * c.num_axes * c.link_bandwidth for name, c in CHIPS.items()}
    assert both_ways == {"v4": 600e9, "v5e": 400e9, "v5p": 1200e9, "v6e": 800e9}


def test_a_topology():
    topology = parse_topology("v5p:4x4x8")
    assert (topology.chip.name, topology.num_chips, topology.name) == ("v5p", 128, "v5p:4x4x8")


@pytest.mark.parametrize(
    ("name", "group", "links"),
    [
        ("v5p:8x8x8", 8, 2),
        ("v5p:8x8x8", 64, 4),
        ("v5p:8x8x8", 512, 6),
        ("v5p:2x2x1", 4, 2),  # no side is long enough to wrap around
        ("v6e:16x16", 2, 2),
        ("v6e:16x16", 256, 4),
        ("v6e:4x4", 16, 2),
    ],
)
def test_bandwidth_of_a_group(name, group, links):
    topology = parse_topology(name)
    assert topology.bandwidth(group) == links * topology.chip.link_bandwidth


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v9:2x2", "must be a chip .v4, v5e, v5p, v6e."),
        ("v5p", "for example v4:8x8x8"),
        ("v5p:8x8", "v5p has 3 sides"),
        ("v5e:4x4x4", "v5e has 2 sides.*v5e:16x16"),
        ("v6e:0x4", "at least 1"),
        ("", "must be a chip"),
    ],
)
def test_unknown_topologies_say_what_is_known(name, said):
    with pytest.raises(ConfigError, match=said) as caught:
        parse_topology(name)
    assert caught.value.field == "PlanConfig.topology"
