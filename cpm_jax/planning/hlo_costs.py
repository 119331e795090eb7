"""What a compiled program costs one chip: matrix FLOPs, traffic with its memory, and collectives.

The compiler's own `cost_analysis` counts the body of a loop once; here every instruction counts as often as its loops
run. Pallas kernels cost what they were declared to, which `costs.py` of each op in `kernels_pallas/` counts.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import get_args

from cpm_jax.planning.hlo_text import Computation, Instruction, Module, Shape, parse
from cpm_jax.planning.loops import trip_count
from kernels_pallas.attention.costs import SplashKernel, splash_cost

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Names for values, not work; what Pallas and XLA's allocator leave behind costs nothing either.
_FREE = frozenset(
    (
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
        *("partition-id", "replica-id", "copy-done", "async-done", "optimization-barrier"),
    )
)
_SLICES = ("dynamic-slice", "slice", "gather")
_PREFETCHES = ("copy-start", "slice-start")
# Work in place on their first operand; which operand is new.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that computes.

    Attributes:
        region: the computation whose schedule it is in.
        executions: how often it runs.
        flops: of its matrix products, each time.
        hbm_bytes: read from and written to the chip's main memory, each time.
        prefetch: whether it only moves data and the compiler runs it beside other operations.
    """

    region: str
    executions: int
    flops: float
    hbm_bytes: float
    prefetch: bool = False


@dataclasses.dataclass(frozen=True)
class Collective:
    """Communication between chips.

    Attributes:
        kind: one of KINDS.
        region: the computation whose schedule it is in.
        executions: how often it runs.
        num_bytes: of the whole array: gathered, reduced, before it is scattered, exchanged.
        group_size: chips that take part together.
        overlapped: whether the compiler runs it beside computation.
        op_name: where in the traced function it comes from.
    """

    kind: str
    region: str
    executions: int
    num_bytes: float
    group_size: int
    overlapped: bool
    op_name: str

    @property
    def wire_bytes(self) -> float:
        """Bytes that each chip sends, each time, by the best ring (or torus) algorithm."""
        share = (self.group_size - 1) / self.group_size
        return {
            "all-gather": self.num_bytes * share,
            "reduce-scatter": self.num_bytes * share,
            "all-reduce": 2 * self.num_bytes * share,
            # Each part travels a quarter of a ring on average, in the shorter direction.
            "all-to-all": self.num_bytes * self.group_size / 4 * share,
            "collective-permute": self.num_bytes,
        }[self.kind]


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a program costs one chip.

    Attributes:
        operations: that compute.
        collectives: that communicate.
        uncounted: kernels and loops whose cost could not be told, by name.
    """

    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]
    uncounted: tuple[str, ...]

    @property
    def flops(self) -> float:
        """Of all matrix products, loops multiplied out."""
        return sum(o.executions * o.flops for o in self.operations)

    @property
    def hbm_bytes(self) -> float:
        """Traffic with the chip's memory, loops multiplied out."""
        return sum(o.executions * o.hbm_bytes for o in self.operations)

    def wire_bytes(self, kind: str | None = None, overlapped: bool | None = None) -> float:
        """Bytes that each chip sends, of one kind and of those (not) run beside computation, or of all."""
        return sum(
            c.executions * c.wire_bytes
            for c in self.collectives
            if kind in (None, c.kind) and overlapped in (None, c.overlapped)
        )


def count_costs(text: str) -> Costs:
    """Counts the costs of a program from its optimised HLO.

    Args:
        text: of `jax.stages.Compiled.as_text()`.
    """
    counter = _Counter(parse(text))
    counter.visit(counter.module.entry, 1)
    return Costs(tuple(counter.operations), tuple(counter.collectives.values()), tuple(sorted(counter.uncounted)))


def _inputs(computation: Computation, instruction: Instruction) -> list[Shape]:
    return [computation.instructions[name].shape for name in instruction.operands if name in computation.instructions]


def _hbm(shapes: Sequence[Shape]) -> float:
    return sum(shape.num_bytes for shape in shapes if shape.in_hbm)


def dot_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a `dot`: two for each element of the result and of the dimensions that are contracted."""
    left = computation.instructions[instruction.operands[0]].shape
    contracted = math.prod(left.dims[dim] for dim in instruction.numbers("lhs_contracting_dims"))
    return 2.0 * instruction.shape.size * contracted


def convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a `convolution`, the form in which XLA for TPU writes matrix products.

    Only taps that meet the input count: a product with batch dimensions is written as a convolution whose window
    is almost all padding.
    """
    left, right = (computation.instructions[name].shape for name in instruction.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    if labels is None:
        return 0.0
    window = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window=\{([^}]*)\}", instruction.text) or [""] * 2)[1]))

    def per_dim(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(spatial)

    spatial = sorted(set(re.findall(r"\d", labels[1])))
    taps = 1
    for at, dim in enumerate(spatial):
        size = right.dims[labels[2].index(dim)]
        low = int(per_dim("pad", "0_0")[at].split("_")[0])
        stride, dilate = int(per_dim("stride", "1")[at]), int(per_dim("rhs_dilate", "1")[at])
        spread = int(per_dim("lhs_dilate", "1")[at])
        length = (left.dims[labels[1].index(dim)] - 1) * spread + 1
        outputs = instruction.shape.dims[labels[3].index(dim)]
        places = (o * stride + k * dilate - low for o in range(outputs) for k in range(size))
        taps *= sum(0 <= place < length and place % spread == 0 for place in places)
    # Groups are in the kernel's shape: it holds the input features of one group.
    rows, columns = (instruction.shape.dims[labels[3].index(label)] for label in "bf")
    batch_groups = int((re.search(r"batch_group_count=(\d+)", instruction.text) or [0, 1])[1])
    return 2.0 * rows * columns * right.dims[labels[2].index("i")] * taps / batch_groups


def kernel_cost(computation: Computation, instruction: Instruction) -> tuple[float, float] | None:
    """FLOPs and HBM bytes of a Pallas kernel; None where nothing tells them.

    They are those of the `cost_estimate` that the kernel was called with, which the compiled program keeps; what lies
    in a small memory is no traffic. JAX's splash attention has none and is counted by its shapes and causal mask.
    """
    if estimate := re.search(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', instruction.text):
        shapes = [*_inputs(computation, instruction), *instruction.shapes]
        elsewhere = sum(shape.num_bytes for shape in shapes if not shape.in_hbm)
        return float(estimate[1]), max(float(estimate[2]) - elsewhere, 0.0)
    kernel = next((name for name in get_args(SplashKernel) if f"splash_mqa_{name}" in instruction.name), None)
    # The first that is not a table of the mask: [..., G, T, H], without the heads and rows of which there is but one.
    queries = next((s for s in _inputs(computation, instruction) if s.dtype in ("bf16", "f32")), None)
    blocks = [re.search(rf'\b{name}\w*\\*": (\d+)', instruction.text) for name in ("block_q", "block_kv")]
    if kernel is None or queries is None or blocks[0] is None or blocks[1] is None:
        return None
    *heads, length, width = queries.dims
    cost = splash_cost(
        kernel,
        num_heads=math.prod(heads),
        length=length,
        width=width,
        itemsize=queries.num_bytes / queries.size,
        block_q=int(blocks[0][1]),
        block_kv=int(blocks[1][1]),
    )
    return cost.flops, cost.bytes_accessed


def _group_size(text: str) -> int:
    """Chips in each group of a collective."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(iota[2])
    # mesh['a'=8,'b'=64] {'b'}: the axes named at the end.
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", mesh[2]))
    if pairs := re.search(r"source_target_pairs=\{([^=]*?)\}\}", text):
        return max(pairs[1].count("{"), 2)
    return 1


class _Counter:
    def __init__(self, module: Module):
        self.module = module
        self.operations: list[Operation] = []
        # By identity, so that the steps of one collective in several fusions count once.
        self.collectives: dict[tuple, Collective] = {}
        self.uncounted: set[str] = set()

    def visit(self, name: str, executions: int) -> None:
        """Counts the schedule of a computation that runs `executions` times."""
        computation = self.module.computations[name]
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode == "while":
                trips = trip_count(self.module, computation, instruction)
                if trips is None:
                    self.uncounted.add(f"loop {instruction.op_name or instruction.name}: counted once")
                self.visit(instruction.attribute("body") or "", executions * (1 if trips is None else trips))
            elif opcode == "call":
                self.visit(instruction.attribute("to_apply") or "", executions)
            elif opcode == "conditional":
                # Which branch runs is not known: all are counted.
                for branch in re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.text) or re.findall(
                    r"%([\w.\-]+)", (re.search(r"branch_computations=\{([^}]*)\}", instruction.text) or ["", ""])[1]
                ):
                    self.visit(branch, executions)
            elif opcode.removesuffix("-start") in KINDS:
                overlapped = opcode.endswith("-start") and self._computes_before_done(computation, instruction)
                self._add_collective(computation, instruction, executions, overlapped=overlapped)
            elif opcode not in _FREE and not opcode.endswith("-done"):
                self._add_operation(computation, instruction, executions)

    def _computes_before_done(self, computation: Computation, start: Instruction) -> bool:
        after = False
        for instruction in computation.instructions.values():
            if after and start.name in instruction.operands:
                return False
            if after and instruction.opcode in ("fusion", "dot", "convolution", "custom-call", "call", "while"):
                return True
            after = after or instruction.name == start.name
        return False

    def _add_collective(
        self,
        computation: Computation,
        instruction: Instruction,
        executions: int,
        *,
        overlapped: bool,
        region: str = "",
        kind: str = "",
    ) -> None:
        opcode = instruction.opcode.removesuffix("-start")
        sizes = [shape.num_bytes for shape in instruction.shapes]
        if opcode == "reduce-scatter":
            sizes = [shape.num_bytes for shape in _inputs(computation, instruction)]
        elif instruction.opcode == "all-gather-start":
            sizes = [max(sizes)]  # the operand stands before the result
        elif instruction.opcode == "collective-permute-start":
            sizes = sizes[:1]
        channel = re.search(r"channel_id=(\d+)", instruction.text)
        region = region or computation.name
        # Steps of one asynchronous collective share its channel and shape; others are by themselves.
        key = (region, opcode, channel[1] if channel and overlapped else instruction.name, tuple(sizes))
        group_size = _group_size(instruction.text)
        if group_size > 1:
            self.collectives[key] = Collective(
                kind or opcode, region, executions, sum(sizes), group_size, overlapped, instruction.op_name
            )

    def _add_operation(self, computation: Computation, instruction: Instruction, executions: int) -> None:
        opcode, flops = instruction.opcode, 0.0
        hbm_bytes = _hbm(_inputs(computation, instruction)) + _hbm(instruction.shapes)
        if opcode == "dot":
            flops = dot_flops(computation, instruction)
        elif opcode == "convolution":
            flops = convolution_flops(computation, instruction)
        elif opcode == "fusion":
            inner = self.module.computations[instruction.attribute("calls") or ""]
            moved = self._collectives_inside(inner, computation.name, executions)
            flops, hbm_bytes = self._flops_inside(inner), self._fusion_bytes(computation, instruction, inner, moved)
        elif opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', instruction.text)
            if target is None or target[1] != "tpu_custom_call":
                hbm_bytes = 0.0  # allocations and annotations
            elif (cost := kernel_cost(computation, instruction)) is not None:
                flops, hbm_bytes = cost
            else:
                self.uncounted.add(f"kernel {instruction.name}: its FLOPs")
        elif opcode in _SLICES:
            hbm_bytes = 2 * _hbm(instruction.shapes)
        elif opcode in _UPDATES:
            update = computation.instructions[instruction.operands[_UPDATES[opcode]]]
            hbm_bytes = 2 * _hbm(update.shapes)
        elif opcode in _PREFETCHES:
            # The result lists source and destination; only those in main memory cost its bandwidth. Of the source as
            # much is read as arrives.
            moved_bytes = min(shape.num_bytes for shape in instruction.shapes[:2])
            hbm_bytes = moved_bytes * sum(shape.in_hbm for shape in instruction.shapes[:2])
        if flops or hbm_bytes:
            self.operations.append(
                Operation(computation.name, executions, flops, hbm_bytes, prefetch=opcode in _PREFETCHES)
            )

    def _flops_inside(self, computation: Computation) -> float:
        total = 0.0
        for instruction in computation.instructions.values():
            if instruction.opcode == "dot":
                total += dot_flops(computation, instruction)
            elif instruction.opcode == "convolution":
                total += convolution_flops(computation, instruction)
            elif instruction.opcode == "fusion":
                total += self._flops_inside(self.module.computations[instruction.attribute("calls") or ""])
        return total

    def _collectives_inside(self, inner: Computation, region: str, executions: int) -> set[Shape]:
        """Counts collectives that a fusion holds: steps that run beside its work, or a reduction that scatters.

        Returns:
            The shapes that they move, which are no traffic of the fusion's own.
        """
        moved: set[Shape] = set()
        for instruction in inner.instructions.values():
            if instruction.opcode == "fusion":
                moved |= self._collectives_inside(
                    self.module.computations[instruction.attribute("calls") or ""], region, executions
                )
            if instruction.opcode not in KINDS:
                continue
            # An all-reduce of which each chip takes its slice: how XLA for TPU writes a reduce-scatter.
            scatters = "all-reduce-scatter" in inner.name
            kind = "reduce-scatter" if scatters else instruction.opcode
            self._add_collective(inner, instruction, executions, overlapped=not scatters, region=region, kind=kind)
            moved |= {*instruction.shapes, *_inputs(inner, instruction)}
        return moved

    def _fusion_bytes(
        self, computation: Computation, fusion: Instruction, inner: Computation, moved: set[Shape]
    ) -> float:
        """HBM traffic of a fusion: slices count as what is sliced, updates in place as what is written."""
        plain = {(shape.dtype, shape.dims) for shape in moved}
        total = 0.0
        for number, name in enumerate(fusion.operands):
            shape = computation.instructions[name].shape
            parameter = inner.parameters.get(number)
            if not shape.in_hbm or (shape.dtype, shape.dims) in plain or parameter is None:
                continue
            total += min(self._read_bytes(inner, parameter.name), shape.num_bytes)
        roots = [inner.root]
        if inner.root.opcode == "tuple":
            roots = [inner.instructions[name] for name in inner.root.operands]
        for root, shape in zip(roots, fusion.shapes, strict=False):
            if shape.in_hbm and (shape.dtype, shape.dims) not in plain:
                total += self._written_bytes(inner, root)
        return total

    def _read_bytes(self, inner: Computation, name: str) -> float:
        """What a fusion reads of one of its operands: what is sliced of it, nothing of what is updated in place."""
        total = 0.0
        for user in self._users(inner, name):
            if user.opcode in _SLICES and user.operands[0] == name:
                total += user.shape.num_bytes
            elif user.opcode == "fusion":
                nested = self.module.computations[user.attribute("calls") or ""]
                places = [n for n, operand in enumerate(user.operands) if operand == name]
                total += sum(self._read_bytes(nested, nested.parameters[n].name) for n in places)
            elif user.opcode not in _UPDATES or user.operands[0] != name:
                return inner.instructions[name].shape.num_bytes
        return total

    def _written_bytes(self, inner: Computation, root: Instruction) -> float:
        """What a fusion writes of one of its results: of an update in place only what is new."""
        while root.opcode in ("bitcast", "copy", "fusion"):
            if root.opcode == "fusion":
                inner = self.module.computations[root.attribute("calls") or ""]
                root = inner.root
            elif root.operands[0] in inner.instructions:
                root = inner.instructions[root.operands[0]]
        if root.opcode in _UPDATES:
            return inner.instructions[root.operands[_UPDATES[root.opcode]]].shape.num_bytes
        return root.shape.num_bytes

    def _users(self, inner: Computation, name: str) -> list[Instruction]:
        """Who reads a value; a bitcast of it is the value under another name."""
        found = []
        for user in inner.users(name):
            if user.opcode == "bitcast":
                renamed = self._users(inner, user.name)
                found += [
                    dataclasses.replace(r, operands=tuple(name if o == user.name else o for o in r.operands))
                    for r in renamed
                ]
            else:
                found.append(user)
        return found
