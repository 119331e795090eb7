"""Frozen, type-checked configuration dataclasses, and the one error that bad configuration raises."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast, dataclass_transform

import pydantic
import pydantic.dataclasses

T = TypeVar("T")


class ConfigError(Exception):
    """A configuration value that cannot be used.

    Not a ValueError: pydantic would catch one raised by a `__post_init__` and reword it.

    The message names the field, the value that was given and what would be accepted, so that it can be shown to
    a user as it is.

    Attributes:
        field: "ModelConfig.d_model", or just the class name when several fields disagree.
    """

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field


def _translate(cls: type, error: pydantic.ValidationError) -> ConfigError:
    lines, first = [], ""
    for item in error.errors(include_url=False):
        field = ".".join([cls.__name__, *map(str, item["loc"])])
        first = first or field
        value = "" if item["type"] == "missing" else f" = {item['input']!r}"
        lines.append(f"{field}{value}: {item['msg'][0].lower()}{item['msg'][1:]}")
    return ConfigError("\n".join(lines), field=first)


@dataclass_transform(frozen_default=True)
def config_dataclass(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, hashable dataclass whose fields are checked when it is built.

    Types are checked strictly (an int is accepted for a float, nothing else is converted), `Literal` fields list
    what they accept, and a `__post_init__` may raise `ConfigError` for values that do not go together.

    Raises:
        ConfigError: from the constructor, naming every field of a wrong type or value.
    """
    settings = pydantic.ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)
    checked = cast(type[T], pydantic.dataclasses.dataclass(frozen=True, config=settings)(cls))
    init: Callable[..., None] = checked.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise _translate(cls, error) from None

    checked.__init__ = __init__  # type: ignore[method-assign]
    return checked
