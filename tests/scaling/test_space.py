"""The algebra of search spaces: its laws on random spaces, and each way of using it wrongly."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_jax.common.config import ConfigError
from cpm_jax.scaling import space
from cpm_jax.scaling.space import (
    chain,
    expression,
    log_uniform,
    parse_space,
    pin,
    points,
    product,
    sample,
    table,
    uniform,
    values,
    walk,
)

NAMES = ("A", "B", "C", "D", "E")


def leaf(name):
    return st.lists(st.integers(-9, 9), min_size=1, max_size=4, unique=True).map(lambda found: values(name, *found))


@st.composite
def finite(draw, names=NAMES, depth=2):
    """A finite space over some of the names."""
    if depth == 0 or len(names) == 1:
        return draw(leaf(names[0]))
    kind = draw(st.sampled_from(["leaf", "product", "chain", "zip"]))
    cut = draw(st.integers(1, len(names) - 1))
    left, right = draw(finite(names[:cut], depth - 1)), draw(finite(names[cut:], depth - 1))
    if kind == "product":
        return product(left, right)
    if kind == "chain":
        return chain(left, draw(finite(names, depth - 1)))
    if kind == "zip":
        count = min(len(points(left)), len(points(right)))
        return space.zip(sample(left, count), sample(right, count, seed=1))
    return left


def text(bindings):
    return repr(sorted(bindings.items()))


@settings(deadline=None)
@given(finite())
def test_points_are_different_and_as_many_as_the_size_says(some):
    found = points(some)
    assert len({text(p) for p in found}) == len(found) <= some.size
    assert len(list(walk(some))) == some.size
    assert set(some.names) == {name for p in found for name in p}


@settings(deadline=None)
@given(finite(NAMES[:2]), finite(NAMES[2:]))
def test_a_product_is_that_of_itertools(left, right):
    expected = [a | b for a, b in itertools.product(points(left), points(right))]
    assert points(product(left, right)) == expected


@settings(deadline=None)
@given(finite(), finite())
def test_a_chain_is_one_after_the_other_each_point_once(first, second):
    expected = list({text(p): p for p in [*points(second), *points(first)][::-1]}.values())
    found = points(chain(first, second))
    assert sorted(map(text, found)) == sorted(map(text, expected))
    assert found[: len(points(first))] == points(first)


@settings(deadline=None)
@given(finite(), st.integers(0, 5))
def test_zip_pairs_in_order(some, seed):
    other = sample(product(pin("X", 0), values("Y", *range(200))), len(points(some)), seed)
    assert points(space.zip(some, other)) == [a | b for a, b in zip(points(some), points(other), strict=True)]


@settings(deadline=None)
@given(finite(), st.data())
def test_a_sample_is_of_different_points_of_the_space(some, data):
    count = data.draw(st.integers(1, len(points(some))))
    found = points(sample(some, count, seed=data.draw(st.integers(0, 99))))
    assert len(found) == count
    assert {text(p) for p in found} <= {text(p) for p in points(some)}


@settings(deadline=None)
@given(finite())
def test_the_choices_of_a_walk_lead_to_its_bindings(some):
    class Follow:
        def __init__(self, chosen):
            self.chosen = chosen

        def choose(self, label, options):
            assert options == dimensions[label]
            return list(map(repr, options)).index(repr(self.chosen[label]))

    dimensions = some.dimensions()
    for chosen, bindings in walk(some):
        assert some.draw(Follow(chosen)) == bindings


@settings(deadline=None)
@given(st.floats(1e-8, 1e3), st.floats(1.5, 1e4), st.integers(0, 1000))
def test_log_uniform_stays_within_and_is_uniform_in_the_logarithm(low, ratio, seed):
    rows = points(sample(log_uniform("LR", low, low * ratio), 400, seed))
    shares = [math.log(row["LR"] / low) / math.log(ratio) for row in rows]
    assert all(low <= row["LR"] <= low * ratio for row in rows)
    assert abs(sum(shares) / len(shares) - 0.5) < 0.1  # seven standard errors
    assert abs(sum(s < 0.25 for s in shares) / len(shares) - 0.25) < 0.15


def test_a_draw_of_a_mixed_space():
    mixed = product(log_uniform("LR", 1e-3, 1e-1), chain(pin("W", 64), product(pin("W", 128), values("L", 2, 4))))
    assert mixed.size is None
    drawn = space._Random(random.Random(3))
    seen = {tuple(mixed.draw(drawn)) for _ in range(50)}
    assert seen == {("LR", "W"), ("LR", "W", "L")}
    assert mixed.dimensions() == {
        "LR": {"low": 1e-3, "high": 1e-1, "log": True},
        "W|L": ["part 0", "part 1"],
        "0/W": [64],
        "1/W": [128],
        "1/L": [2, 4],
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: values("A"), r"values\('A'\) has no values"),
        (product, r"product\(\) of no spaces is empty"),
        (chain, r"chain\(\) of no spaces is empty"),
        (space.zip, r"zip\(\) of no spaces is empty"),
        (lambda: space.Points(()), "an empty space has no trial"),
        (lambda: values("A", 0, 0), "has 0 twice"),
        (lambda: space.zip(values("A", 1, 2), values("B", 1)), "unequal lengths .A: 2, B: 1."),
        (lambda: product(values("A", 1), values("A", 2)), "product binds A twice"),
        (lambda: space.zip(values("A", 1), values("A", 2)), "zip binds A twice"),
        (lambda: log_uniform("LR", 0, 1), "LR between 0.0 and 1.0: empty; accepted is 0 < low < high"),
        (lambda: uniform("LR", 2, 1), "accepted is low < high"),
        (lambda: points(product(log_uniform("LR", 1, 2), pin("A", 1))), "LR is a range, whose points cannot be listed"),
        (lambda: sample(values("A", 1, 2), 3), "of a space of 2 points"),
        (
            lambda: sample(product(*(values(name, *range(400)) for name in "AB")), 160_001),
            "of a space of 160000 points",
        ),
        (lambda: sample(values("A", 1, 2), 0), "accepted are 1 and more"),
        (lambda: product(3), "product of 3, which is no space"),
        (lambda: values("", 1), "is no name"),
        (lambda: table([]), "an empty space has no trial"),
        (lambda: table([{"A": 1, "B": 2}, {"B": 2, "A": 1}]), "table has .* twice"),
    ],
)
def test_misuse_is_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_an_expression_is_the_space_that_python_makes():
    read = parse_space(
        "product(zip(values('D', 64, 128), values('H', 1, 2)), log_uniform('LR', 1e-3, high=1e-1), pin('T', (1, 'x')))"
    )
    made = product(
        space.zip(values("D", 64, 128), values("H", 1, 2)), log_uniform("LR", 1e-3, 1e-1), pin("T", (1, "x"))
    )
    assert read == made


@settings(deadline=None)
@given(finite(), st.floats(1e-9, 1), st.booleans())
def test_a_space_is_read_back_from_its_expression(some, low, log):
    mixed = product(some, (log_uniform if log else uniform)("LR", low, 2.0))
    assert parse_space(expression(mixed)) == mixed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; give an expression"),
        ("values('A', 1", "never closed"),
        ("valves('A', 1)", "no function 'valves'; accepted are values, pin"),
        ("product(values('A', open('x')))", "no function 'open'"),
        ("values('A', x)", "'x' is no literal"),
        ("[1, 2]", "is a literal, no space"),
        ("log_uniform('A')", "missing 2 required"),
        ("sample(3, 2)", "has no attribute"),
    ],
)
def test_an_expression_that_is_no_space_is_named(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_space(text)
