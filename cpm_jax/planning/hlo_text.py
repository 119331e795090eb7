"""Reads the text of a compiled program: computations, their instructions, shapes and attributes.

The text form of HLO is what `jax.stages.Compiled.as_text()` returns on every platform.
"""

import dataclasses
import functools
import math
import re

_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array.

    Attributes:
        dtype: as HLO writes it, for example "bf16".
        dims: its sizes.
        in_hbm: whether it lies in the chip's main memory rather than in one of its small ones.
    """

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> float:
        """Bytes of its elements, without padding to tiles."""
        if self.dtype in _ITEM_BYTES:
            return self.size * _ITEM_BYTES[self.dtype]
        bits = re.search(r"\d+", self.dtype)  # bf16, s32, f8e4m3fn
        return self.size * int(bits[0]) / 8 if bits else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: unique in the program.
        opcode: for example "fusion".
        shapes: of its result; several for a tuple.
        operands: names of its operands.
        text: everything after the operands.
        is_root: whether it is its computation's result.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def shape(self) -> Shape:
        """The result, or the first of a tuple."""
        return self.shapes[0]

    def attribute(self, name: str) -> str | None:
        """The computation that an attribute such as `calls=` or `body=` names."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return found[1] if found else None

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from; "" where that is not known."""
        found = re.search(r'op_name="([^"]*)"', self.text)
        return found[1] if found else ""

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The numbers of an attribute such as `dimensions={0,1}`."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.text)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: the program's entry, a loop's body, what a fusion does.

    Attributes:
        name: unique in the program.
        instructions: by name, in the order of the schedule.
    """

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in self.instructions.values() if i.is_root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by their number."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {int(i.operands[0]): i for i in found}

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read a value."""
        return [i for i in self.instructions.values() if name in i.operands]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
        computations: by name.
        entry: name of the one that runs.
    """

    computations: dict[str, Computation]
    entry: str


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Reads the shape of an array, or the shapes of a (nested) tuple in order."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(n.replace("<=", "")) for n in dims.split(",") if n)
        found.append(Shape(dtype, sizes, re.search(r"S\([1-9]", layout) is None))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced parentheses in HLO: {text[:200]}")


def _parse_instruction(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    rest = match[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else re.match(r"\S+", rest).end()  # type: ignore[union-attr]
    head = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if head is None:
        return None
    opened = end + head.end() - 1
    closed = _closing(rest, opened)
    arguments = rest[opened + 1 : closed]
    names = re.findall(r"%([\w.\-]+)", arguments)
    if not names and head[1] in ("parameter", "constant"):
        names = [arguments.strip()]
    return Instruction(
        match[2], head[1], parse_shapes(rest[:end]), tuple(names), rest[closed + 1 :], match[1] is not None
    )


def parse(text: str) -> Module:
    """Reads a program.

    Raises:
        ValueError: if the text holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current, pending = "", None, ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = Computation(header[2], {})
            computations[header[2]] = current
            entry = header[2] if header[1] else entry
            continue
        if line.startswith("}") and not line.startswith("}}"):
            current, pending = None, ""
        elif current is not None:
            # Metadata of Pallas kernels runs over several lines.
            if _INSTRUCTION.match(line) is None and pending:
                last = current.instructions[pending]
                current.instructions[pending] = dataclasses.replace(last, text=f"{last.text} {line}")
            elif instruction := _parse_instruction(line):
                current.instructions[instruction.name] = instruction
                pending = instruction.name
    if not entry:
        raise ValueError("the text is no HLO module: it has no ENTRY computation")
    return Module(computations, entry)
