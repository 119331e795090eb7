"""Frozen, type-checked configuration dataclasses, and the one error that bad configuration raises."""

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, cast, dataclass_transform

import pydantic
import pydantic.dataclasses

from cpm_jax.common import exit_codes

P = ParamSpec("P")
T = TypeVar("T")


class ConfigError(Exception):
    """A configuration value that cannot be used.

    Not a ValueError: pydantic would catch one raised by a `__post_init__` and reword it.

    The message names the field, the value that was given and what would be accepted, so that it can be shown to
    a user as it is.

    Attributes:
        field: "ModelConfig.d_model", or just the class name when several fields disagree.
        code: the exit code of a process that it ends.
    """

    code = exit_codes.BAD_CONFIG

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field


_SETTINGS = pydantic.ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


def _translate(name: str, error: pydantic.ValidationError) -> ConfigError:
    lines, first = [], ""
    for item in error.errors(include_url=False):
        field = ".".join([name, *map(str, item["loc"])])
        first = first or field
        value = "" if item["type"] == "missing" else f" = {item['input']!r}"
        lines.append(f"{field}{value}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return ConfigError("\n".join(lines), field=first)


@dataclass_transform(frozen_default=True)
def config_dataclass(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, hashable dataclass whose fields are checked when it is built.

    Types are checked strictly (an int is accepted for a float, nothing else is converted), numbers are finite,
    `Literal` fields list what they accept, and a `__post_init__` may raise `ConfigError` for values that do not go
    together.

    Raises:
        ConfigError: from the constructor, naming every field of a wrong type or value.
    """
    checked = cast(type[T], pydantic.dataclasses.dataclass(frozen=True, config=_SETTINGS)(cls))
    init: Callable[..., None] = checked.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise _translate(cls.__name__, error) from None

    # gin does not follow wrappers: it looks here for parameters and their defaults.
    of_class = inspect.signature(checked)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    __init__.__signature__ = of_class.replace(  # type: ignore[attr-defined]
        parameters=[itself, *of_class.parameters.values()]
    )
    checked.__init__ = __init__  # type: ignore[method-assign]
    return checked


def config_function(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function that builds a config check its arguments as `config_dataclass` does.

    Raises:
        ConfigError: from the call, naming every argument of a wrong type or value.
    """
    checked = pydantic.validate_call(config=_SETTINGS)(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return checked(*args, **kwargs)
        except pydantic.ValidationError as error:
            raise _translate(function.__name__, error) from None

    # gin reads the names of the arguments from the signature, and does not look through wrappers.
    call.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return call


class InputError(Exception):
    """Data or a checkpoint that cannot be read or does not fit; the message is meant for the user as it is.

    Attributes:
        code: the exit code of a process that it ends.
    """

    code = exit_codes.BAD_INPUT


def config_to_dict(config: Any) -> dict[str, Any]:
    """The fields of a config dataclass, nested ones too, as JSON has them (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Builds a config from what `config_to_dict` gave and a JSON file kept.

    Raises:
        ConfigError: naming the fields that `cls` does not have, misses, or does not accept.
    """
    try:
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(values))
    except pydantic.ValidationError as error:
        raise _translate(cls.__name__, error) from None


def as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    """Names of a field that takes one or several."""
    return (names,) if isinstance(names, str) else tuple(names)


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Compares two dicts from `config_to_dict`.

    Returns:
        The dotted names of the fields that differ, each with the old and the new value; None where one lacks it.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= config_differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[prefix + name] = (a, b)
    return found


def check_same_settings(
    folder: object, before: Mapping[str, Any], now: Mapping[str, Any], error: type[Exception] = ConfigError
) -> None:
    """Checks that a folder which holds results, or a part of them, is asked for what it was begun with.

    Args:
        folder: what to call it.
        before: the settings that it was begun with.
        now: those of this call.
        error: what to raise.

    Raises:
        ConfigError: or `error`: settings differ; names each, with both values.
    """
    if differences := config_differences(before, now):
        said = "; ".join(f"{name} = {was!r}, now {name} = {new!r}" for name, (was, new) in differences.items())
        raise error(f"{folder} was made with {said}: give the same settings, or another folder")
