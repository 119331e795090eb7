"""A small algebra of search spaces: which bindings the trials of a sweep may set, and to what.

    product(zip(values("D_MODEL", 64, 128), values("NUM_HEADS", 1, 2)), log_uniform("PEAK_LR", 1e-3, 1e-1))

A space is anything that can draw bindings from a source of choices (`Choices`). Optuna's samplers are such a source, so
are random numbers, and so is a systematic walk through all choices, which gives the points of a finite space in order.
"""

import ast
import builtins
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cpm_jax.common.config import ConfigError

Bindings = dict[str, Any]
_MOST_ENUMERATED = 100_000


class Choices(Protocol):
    """Decides what a space leaves open. Labels are unique within a draw."""

    def choose(self, label: str, options: Sequence[Any]) -> int:
        """Index of one of the options."""

    def uniform(self, label: str, low: float, high: float, log: bool) -> float:
        """A number between `low` and `high`, uniform in its logarithm where `log`."""


class Space(Protocol):
    """A set of bindings.

    Attributes:
        names: all names that it may bind.
        size: number of its points, one in two branches of a chain counted twice; None where a range is in it.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """See above."""

    @property
    def size(self) -> int | None:
        """See above."""

    def draw(self, choices: Choices, prefix: str = "") -> Bindings:
        """Bindings as `choices` has them; `prefix` goes before each label."""

    def dimensions(self, prefix: str = "") -> dict[str, Any]:
        """What may be chosen, as JSON: labels with their options, or with low, high and scale."""


@dataclass(frozen=True)
class Points:
    """A list of bindings.

    Attributes:
        rows: (name, value) pairs of each.
    """

    rows: tuple[tuple[tuple[str, Any], ...], ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError("space: no points in it; an empty space has no trial to run", field="space")

    @property
    def names(self) -> tuple[str, ...]:
        """All names, in order of appearance."""
        return tuple(dict.fromkeys(name for row in self.rows for name, _ in row))

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def _options(self) -> list[Any]:
        if len(self.names) == 1 and all(row for row in self.rows):
            plain = [row[0][1] for row in self.rows]
            if all(isinstance(value, (int, float, str)) for value in plain) and len(set(plain)) == len(plain):
                return plain
        return [", ".join(f"{name}={value!r}" for name, value in row) for row in self.rows]

    def draw(self, choices: Choices, prefix: str = "") -> Bindings:
        """One of the rows; without a choice where there is only one."""
        if len(self.rows) == 1:
            return dict(self.rows[0])
        return dict(self.rows[choices.choose(prefix + "+".join(self.names), self._options)])

    def dimensions(self, prefix: str = "") -> dict[str, Any]:
        """The options."""
        return {prefix + "+".join(self.names): self._options}


@dataclass(frozen=True)
class Range:
    """All numbers between two.

    Attributes:
        name: that is bound.
        low: least value.
        high: greatest value.
        log: whether the logarithm is what is uniform.
    """

    name: str
    low: float
    high: float
    log: bool

    def __post_init__(self) -> None:
        least = 0.0 if self.log else -math.inf
        if not least < self.low < self.high < math.inf:
            accepted = "0 < low < high" if self.log else "low < high"
            raise ConfigError(
                f"space: {self.name} between {self.low} and {self.high}: empty; accepted is {accepted}, finite",
                field="space",
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The one name."""
        return (self.name,)

    @property
    def size(self) -> None:
        """None."""
        return None

    def draw(self, choices: Choices, prefix: str = "") -> Bindings:
        """A number of the range."""
        return {self.name: choices.uniform(prefix + self.name, self.low, self.high, self.log)}

    def dimensions(self, prefix: str = "") -> dict[str, Any]:
        """Its ends and scale."""
        return {prefix + self.name: {"low": self.low, "high": self.high, "log": self.log}}


@dataclass(frozen=True)
class Product:
    """Every combination of the points of its parts.

    Attributes:
        parts: spaces that bind different names.
    """

    parts: tuple[Space, ...]

    def __post_init__(self) -> None:
        _check_parts("product", self.parts)
        _check_disjoint("product", self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(name for part in self.parts for name in part.names)

    @property
    def size(self) -> int | None:
        """The product of their sizes."""
        sizes = [part.size for part in self.parts]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def draw(self, choices: Choices, prefix: str = "") -> Bindings:
        """A point of each part."""
        return {name: value for part in self.parts for name, value in part.draw(choices, prefix).items()}

    def dimensions(self, prefix: str = "") -> dict[str, Any]:
        """Those of all parts."""
        return {label: what for part in self.parts for label, what in part.dimensions(prefix).items()}


@dataclass(frozen=True)
class Chain:
    """The points of one part after those of another.

    Attributes:
        parts: spaces; what one of them does not bind, the base of the sweep does.
    """

    parts: tuple[Space, ...]

    def __post_init__(self) -> None:
        _check_parts("chain", self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Those of all parts."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.names))

    @property
    def size(self) -> int | None:
        """The sum of their sizes."""
        sizes = [part.size for part in self.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def _label(self, prefix: str) -> str:
        return prefix + "|".join(self.names)

    def draw(self, choices: Choices, prefix: str = "") -> Bindings:
        """A point of one of the parts."""
        branch = choices.choose(self._label(prefix), [f"part {index}" for index in range(len(self.parts))])
        return self.parts[branch].draw(choices, f"{prefix}{branch}/")

    def dimensions(self, prefix: str = "") -> dict[str, Any]:
        """Which part, and those of each part."""
        found: dict[str, Any] = {self._label(prefix): [f"part {index}" for index in range(len(self.parts))]}
        for index, part in enumerate(self.parts):
            found |= part.dimensions(f"{prefix}{index}/")
        return found


# ------------------------------------------------------------------------------------------------- the algebra


def values(name: str, *options: Any) -> Points:
    """One name, bound to each of the options.

    Raises:
        ConfigError: there is no option, or one is given twice.
    """
    if not options:
        raise ConfigError(f"space: values({name!r}) has no values: give at least one", field="space")
    if repeated := _repeated(options):
        raise ConfigError(f"space: values({name!r}, …) has {repeated[0]!r} twice", field="space")
    return Points(tuple(((_checked_name(name), option),) for option in options))


def table(rows: Sequence[Bindings]) -> Points:
    """The bindings that a list names.

    Raises:
        ConfigError: it is empty, or names the same bindings twice.
    """
    if repeated := _repeated(rows):
        raise ConfigError(f"space: table has {repeated[0]!r} twice", field="space")
    return _as_points([{_checked_name(name): value for name, value in row.items()} for row in rows])


def pin(name: str, value: Any) -> Points:
    """One name, bound to one value."""
    return values(name, value)


def log_uniform(name: str, low: float, high: float) -> Range:
    """One name, bound to numbers that are uniform in their logarithm."""
    return Range(_checked_name(name), float(low), float(high), log=True)


def uniform(name: str, low: float, high: float) -> Range:
    """One name, bound to uniform numbers."""
    return Range(_checked_name(name), float(low), float(high), log=False)


def product(*spaces: Space) -> Product:
    """Every combination; the last space varies fastest.

    Raises:
        ConfigError: there is no space, or two bind the same name.
    """
    return Product(spaces)


def zip(*spaces: Space) -> Points:
    """The first points of all spaces together, then the second ones, and so on.

    Raises:
        ConfigError: there is no space, two bind the same name, their lengths differ, or one has a range in it.
    """
    _check_parts("zip", spaces)
    _check_disjoint("zip", spaces)
    lists = [points(space) for space in spaces]
    if len({len(rows) for rows in lists}) > 1:
        lengths = ", ".join(f"{'+'.join(s.names)}: {len(rows)}" for s, rows in builtins.zip(spaces, lists, strict=True))
        raise ConfigError(f"space: zip of unequal lengths ({lengths}); accepted are equal ones", field="space")
    return _as_points([{k: v for row in rows for k, v in row.items()} for rows in builtins.zip(*lists, strict=True)])


def chain(*spaces: Space) -> Chain:
    """The points of the first space, then those of the second, and so on.

    Raises:
        ConfigError: there is no space.
    """
    return Chain(spaces)


def sample(space: Space, count: int, seed: int = 0) -> Points:
    """Different points of a space, drawn at random.

    Args:
        space: any.
        count: how many.
        seed: of the drawing.

    Raises:
        ConfigError: fewer than one, or more than the space has.
    """
    if count < 1:
        raise ConfigError(f"space: sample(…, {count}): accepted are 1 and more", field="space")
    rng = random.Random(seed)
    if space.size is not None and space.size < count:
        raise ConfigError(f"space: sample(…, {count}) of a space of {space.size} points", field="space")
    if space.size is not None and space.size <= _MOST_ENUMERATED:
        everything = points(space)
        if count > len(everything):
            raise ConfigError(f"space: sample(…, {count}) of a space of {len(everything)} points", field="space")
        return _as_points(rng.sample(everything, count))
    found: dict[str, Bindings] = {}
    while len(found) < count:
        row = space.draw(_Random(rng))
        found.setdefault(_text(row), row)
    return _as_points(list(found.values()))


# --------------------------------------------------------------------------------------------- what is in a space


def walk(space: Space) -> Iterator[tuple[dict[str, Any], Bindings]]:
    """All draws of a finite space in order, each with the choices that lead to it (label: option).

    Raises:
        ConfigError: the space has a range in it.
    """
    if space.size is None:
        ranges = [label for label, what in space.dimensions().items() if isinstance(what, Mapping)]
        raise ConfigError(
            f"space: {', '.join(ranges)} is a range, whose points cannot be listed; use values, or sample(…, count)",
            field="space",
        )
    path: list[int] = []
    while True:
        choices = _Replay(path)
        bindings = space.draw(choices)
        yield choices.chosen, bindings
        taken = choices.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        path = [index for index, _ in taken[:-1]] + [taken[-1][0] + 1]


def points(space: Space) -> list[Bindings]:
    """The different points of a finite space, in order.

    Raises:
        ConfigError: the space has a range in it.
    """
    found: dict[str, Bindings] = {}
    for _, bindings in walk(space):
        found.setdefault(_text(bindings), bindings)
    return list(found.values())


def parse_space(text: str) -> Space:
    """Reads a space from an expression of this module's functions and literals.

    Raises:
        ConfigError: it is none; names the part.
    """
    functions = {f.__name__: f for f in (values, pin, log_uniform, uniform, product, zip, chain, sample, table)}

    def read(node: ast.expr) -> Any:
        if not isinstance(node, ast.Call):
            try:
                return ast.literal_eval(node)
            except (ValueError, TypeError, SyntaxError):
                raise ConfigError(f"space: {ast.unparse(node)!r} is no literal", field="space") from None
        name = ast.unparse(node.func)
        if name not in functions:
            raise ConfigError(f"space: no function {name!r}; accepted are {', '.join(functions)}", field="space")
        arguments = [read(argument) for argument in node.args]
        keywords = {str(keyword.arg): read(keyword.value) for keyword in node.keywords}
        try:
            return functions[name](*arguments, **keywords)
        except (TypeError, AttributeError, ValueError) as error:
            raise ConfigError(f"space: {ast.unparse(node)}: {error}", field="space") from error

    if not text.strip():
        raise ConfigError("space: empty; give an expression such as values('PEAK_LR', 0.01, 0.02)", field="space")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ConfigError(f"space: {text.strip()!r}: {error.msg}", field="space") from error
    space = read(tree.body)
    if not isinstance(space, (Points, Range, Product, Chain)):
        raise ConfigError(f"space: {text.strip()!r} is a literal, no space", field="space")
    return space


def expression(space: Space) -> str:
    """The expression that `parse_space` makes the same space of."""
    if isinstance(space, Range):
        return f"{'log_uniform' if space.log else 'uniform'}({space.name!r}, {space.low!r}, {space.high!r})"
    if isinstance(space, Points):
        if len(space.names) == 1 and all(space.rows):
            return f"values({', '.join(map(repr, [space.names[0], *(row[0][1] for row in space.rows)]))})"
        return f"table({[dict(row) for row in space.rows]!r})"
    assert isinstance(space, (Product, Chain))
    return f"{type(space).__name__.lower()}({', '.join(map(expression, space.parts))})"


class _Replay:
    """Takes the choices of a path, and the first option of each further one."""

    def __init__(self, path: Sequence[int]):
        self._path = path
        self.taken: list[tuple[int, int]] = []
        self.chosen: dict[str, Any] = {}

    def choose(self, label: str, options: Sequence[Any]) -> int:
        index = self._path[len(self.taken)] if len(self.taken) < len(self._path) else 0
        self.taken.append((index, len(options)))
        self.chosen[label] = options[index]
        return index

    def uniform(self, label: str, low: float, high: float, log: bool) -> float:
        raise AssertionError(f"{label} is a range in a finite space")


class _Random:
    """Chooses at random."""

    def __init__(self, rng: random.Random):
        self._rng = rng

    def choose(self, label: str, options: Sequence[Any]) -> int:
        return self._rng.randrange(len(options))

    def uniform(self, label: str, low: float, high: float, log: bool) -> float:
        if log:
            return min(max(math.exp(self._rng.uniform(math.log(low), math.log(high))), low), high)
        return self._rng.uniform(low, high)


def _as_points(rows: Sequence[Bindings]) -> Points:
    return Points(tuple(tuple(row.items()) for row in rows))


def _repeated(options: Sequence[Any]) -> list[Any]:
    texts = [_text(option) for option in options]
    return [option for option, text in builtins.zip(options, texts, strict=True) if texts.count(text) > 1]


def _text(value: Any) -> str:
    """The same for the same bindings in any order; tells 1, 1.0 and True apart."""
    if isinstance(value, dict):
        return json.dumps({str(name): _text(part) for name, part in value.items()}, sort_keys=True)
    return repr(value)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"space: {name!r} is no name of a macro or binding, such as 'PEAK_LR'", field="space")
    return name


def _check_parts(function: str, spaces: Sequence[Any]) -> None:
    if not spaces:
        raise ConfigError(f"space: {function}() of no spaces is empty: give at least one", field="space")
    for space in spaces:
        if not isinstance(space, (Points, Range, Product, Chain)):
            raise ConfigError(f"space: {function} of {space!r}, which is no space", field="space")


def _check_disjoint(function: str, spaces: Sequence[Space]) -> None:
    names = [name for space in spaces for name in space.names]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"space: {function} binds {', '.join(repeated)} twice", field="space")
