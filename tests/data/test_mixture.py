"""The order of examples: weights kept to within one example, positions without gap, places found without counting."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_jax.common.config import ConfigError
from cpm_jax.data.mixture import PERIOD, Component, ExampleOrder, MixtureConfig, Stage, from_folders, whole_weights


def places(order: ExampleOrder, count: int) -> np.ndarray:
    return np.asarray([order.place(i) for i in range(count)])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=8).filter(any))
def test_every_prefix_keeps_the_weights_to_within_one_example(weights):
    stage = Stage(start_step=0, weights=tuple(float(w) for w in weights))
    components = places(ExampleOrder((stage,), batch_size=1), PERIOD + 500)[:, 0]
    taken = np.cumsum(components[:, None] == np.arange(len(weights)), axis=0)
    shares = np.arange(1, len(components) + 1)[:, None] * np.asarray(whole_weights(stage.weights)) / PERIOD
    assert np.abs(taken - shares).max() < 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((0.7, 0.2, 0.1), (7000, 2000, 1000)),
        ((1.0, 1.0, 1.0), (3334, 3333, 3333)),
        ((30.0, 0.0, 10.0), (7500, 0, 2500)),
        ((5.0,), (10000,)),
    ],
)
def test_whole_weights(weights, expected):
    assert whole_weights(weights) == expected


STAGES = (
    Stage(start_step=0, weights=(0.6, 0.3, 0.1)),
    Stage(start_step=37, weights=(0.0, 0.5, 0.5)),
    Stage(start_step=60, weights=(1.0, 1.0, 2.0)),
)
BATCH = 7


def test_positions_have_no_gap_and_no_repetition_across_stages():
    order = ExampleOrder(STAGES, BATCH)
    all_places = places(order, 100 * BATCH)
    for component in range(3):
        positions = all_places[all_places[:, 0] == component, 1]
        np.testing.assert_array_equal(positions, np.arange(len(positions)))


def test_stages_change_at_their_first_example_and_keep_their_weights():
    order = ExampleOrder(STAGES, BATCH)
    components = places(order, 100 * BATCH)[:, 0]
    edges = [stage.start_step * BATCH for stage in STAGES] + [100 * BATCH]
    for stage, (start, end) in zip(STAGES, itertools.pairwise(edges), strict=True):
        counts = np.bincount(components[start:end], minlength=3)
        shares = np.asarray(stage.weights) / sum(stage.weights) * (end - start)
        assert np.abs(counts - shares).max() < 1
    # The second stage leaves the first component out, from its first example to its last.
    assert 0 in components[: edges[1]]
    assert 0 not in components[edges[1] : edges[2]]
    assert 0 in components[edges[2] : edges[2] + 4]


def test_taken_counts_what_place_gives():
    order = ExampleOrder(STAGES, BATCH)
    components = places(order, 100 * BATCH)[:, 0]
    for examples in (0, 1, 100, 37 * BATCH - 1, 37 * BATCH, 37 * BATCH + 1, 60 * BATCH, 700):
        np.testing.assert_array_equal(order.taken(examples), np.bincount(components[:examples], minlength=3))


def test_places_far_into_a_run_follow_those_before():
    order = ExampleOrder((Stage(start_step=0, weights=(0.37, 0.63)),), batch_size=1)
    start = 10**12 + 12345
    taken = order.taken(start)
    for example in range(start, start + 50):
        component, position = order.place(example)
        assert position == taken[component]
        taken[component] += 1


def test_from_folders_names_components_after_their_folders():
    assert from_folders("a/web") == MixtureConfig(components=(Component(name="web", path="a/web"),))
    assert [c.name for c in from_folders(["a/web", "b/code"]).components] == ["web", "code"]


TWO = (Component(name="a", path="x"), Component(name="b", path="y"))


@pytest.mark.parametrize(
    ("components", "stages", "message"),
    [
        ((), (), r"MixtureConfig.components = \[\]"),
        ((TWO[0], TWO[0]), (), r"MixtureConfig.components = \['a', 'a'\]: .*name of its own"),
        (TWO, ((5, (1.0, 1.0)),), r"stages start at steps \[5\]: the first must start at 0"),
        (TWO, ((0, (1.0, 1.0)), (9, (1.0, 1.0)), (9, (1.0, 0.0))), r"start at steps \[0, 9, 9\]"),
        (TWO, ((0, (1.0,)),), r"has 1 values for 2 components \(a, b\)"),
        (TWO, ((0, (0.0, 0.0)),), r"sum to more than 0"),
        (TWO, ((0, (1.0, float("nan"))),), r"nan"),
        (TWO, ((0, (1.0, 1e-6)),), r"1e-06 is less than 1/10000"),
    ],
)
def test_impossible_mixtures_are_named(components, stages, message):
    with pytest.raises(ConfigError, match=message):
        MixtureConfig(components=components, stages=tuple(Stage(start_step=s, weights=w) for s, w in stages))
