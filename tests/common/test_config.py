"""Configuration errors name the field, the value and what is accepted."""

import json
from typing import Literal

import pytest

from cpm_jax.common.config import (
    ConfigError,
    config_dataclass,
    config_differences,
    config_from_dict,
    config_function,
    config_to_dict,
)


@config_dataclass
class Example:
    """A config with one field of each kind."""

    size: int
    rate: float = 0.1
    kind: Literal["linear", "cosine"] = "linear"
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.size % 2:
            raise ConfigError(f"Example.size = {self.size}: must be even", field="Example.size")


def test_accepts_an_int_for_a_float_and_is_hashable():
    config = Example(size=2, rate=1, shape=(1, 2))
    assert config.rate == 1.0
    assert hash(config) == hash(Example(size=2, rate=1.0, shape=(1, 2)))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"size": "a"}, ["Example.size = 'a'", "integer"]),
        ({"size": 2.0}, ["Example.size = 2.0", "integer"]),
        ({"size": 2, "rate": float("inf")}, ["Example.rate = inf", "finite"]),
        ({"size": 2, "rate": float("nan")}, ["Example.rate = nan", "finite"]),
        ({"size": 2, "kind": "cubic"}, ["Example.kind = 'cubic'", "'linear' or 'cosine'"]),
        ({"size": 2, "sizes": 3}, ["Example.sizes = 3", "unexpected"]),
        ({}, ["Example.size", "required"]),
        ({"size": 3}, ["Example.size = 3", "even"]),
    ],
)
def test_errors_name_field_value_and_what_is_accepted(values, parts):
    with pytest.raises(ConfigError) as error:
        Example(**values)
    assert error.value.field.startswith("Example")
    for part in parts:
        assert part in str(error.value)


def test_fields_cannot_be_changed():
    config = Example(size=2)
    with pytest.raises(AttributeError):
        config.size = 4


@config_function
def build(size: int, kind: Literal["linear", "cosine"] = "linear") -> Example:
    return Example(size=size, kind=kind)


def test_functions_check_their_arguments():
    assert build(size=2) == Example(size=2)
    with pytest.raises(ConfigError, match=r"build.size = '2': .*integer"):
        build(size="2")
    with pytest.raises(ConfigError, match=r"build.sise = 2: .*[uU]nexpected"):
        build(size=2, sise=2)
    with pytest.raises(ConfigError, match=r"Example.size = 3: must be even"):
        build(size=3)


@config_dataclass
class Outer:
    """A config within a config."""

    inner: Example
    name: str = "a"


def test_a_config_comes_back_from_json():
    config = Outer(Example(size=4, shape=(1, 2)))
    values = json.loads(json.dumps(config_to_dict(config)))
    assert values == {"inner": {"size": 4, "rate": 0.1, "kind": "linear", "shape": [1, 2]}, "name": "a"}
    assert config_from_dict(Outer, values) == config
    with pytest.raises(ConfigError, match="colour"):
        config_from_dict(Outer, values | {"colour": "red"})


def test_differences_name_the_field():
    old, new = config_to_dict(Outer(Example(size=4))), config_to_dict(Outer(Example(size=6), name="b"))
    assert config_differences(old, new) == {"inner.size": (4, 6), "name": ("a", "b")}
    assert config_differences(old, old) == {}
    assert config_differences({"a": 1}, {}) == {"a": (1, None)}
