"""How often the loops of a compiled program run, and what they stack up."""

import re

from cpm_jax.planning.hlo_text import Computation, Instruction, Module

_PASS_THROUGH = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start")


def _constant(computation: Computation, name: str) -> int | None:
    """The value of an integer constant, also of a copy of one."""
    instruction = computation.instructions[name]
    while instruction.opcode in _PASS_THROUGH:
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands[0]):
        return int(instruction.operands[0])
    return None


def _carry_index(computation: Computation, name: str) -> int | None:
    """Which element of the loop's carry a value in its condition or body is."""
    instruction = computation.instructions[name]
    while instruction.opcode in _PASS_THROUGH:
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode != "get-tuple-element":
        return None
    found = re.search(r"index=(\d+)", instruction.text)
    return int(found[1]) if found else None


def _comparison(module: Module, condition: Computation) -> tuple[str, str, str] | None:
    """The two values that a condition compares, and how; also where a fusion does it."""
    root = condition.root
    compare, operands = root, root.operands
    if root.opcode == "fusion":
        inner = module.computations[root.attribute("calls") or ""]
        compare = inner.root
        parameters = {p.name: number for number, p in inner.parameters.items()}
        if any(name not in parameters for name in compare.operands):
            return None
        operands = tuple(root.operands[parameters[name]] for name in compare.operands)
    direction = re.search(r"direction=(\w+)", compare.text)
    if compare.opcode != "compare" or direction is None:
        return None
    return operands[0], operands[1], direction[1]


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body; None where the program does not say.

    XLA writes the count beside many loops. Else it is that of a counter that is compared with a constant and grows by
    a constant, as `lax.scan` and `lax.fori_loop` make.
    """
    if known := re.search(r'known_trip_count\\?"?:\s*\{\\?"n\\?":\\?"(\d+)', loop.text):
        return int(known[1])
    condition = module.computations[loop.attribute("condition") or ""]
    body = module.computations[loop.attribute("body") or ""]
    compared = _comparison(module, condition)
    carry = caller.instructions[loop.operands[0]]
    if compared is None or carry.opcode != "tuple" or body.root.opcode != "tuple":
        return None

    def first_value(name: str) -> int | None:
        """Of a value in the condition, before the first run of the body."""
        if (index := _carry_index(condition, name)) is not None:
            return _constant(caller, carry.operands[index])
        return _constant(condition, name)

    counter, limit, direction = compared
    index = _carry_index(condition, counter)
    start, end = first_value(counter), first_value(limit)
    if index is None or start is None or end is None or direction not in ("LT", "LE"):
        return None
    following = body.instructions[body.root.operands[index]]
    steps = [_constant(body, name) for name in following.operands] if following.opcode == "add" else []
    step = next((value for value in steps if value), None)
    # A fused counter does not show its step; a scan's is 1.
    step = 1 if step is None and following.opcode == "fusion" else step
    if step is None or step < 1:
        return None
    return max(-(-(end + (direction == "LE") - start) // step), 0)


def stacked_bytes(module: Module) -> tuple[float, float]:
    """Bytes of what loops stack up, one slice each time: (residuals of forward loops, gradients of backward loops).

    An element of the carry counts when the body returns it changed and its first dimension is the number of runs.
    """
    residuals = gradients = 0.0
    for caller in module.computations.values():
        for loop in caller.instructions.values():
            if loop.opcode != "while":
                continue
            trips = trip_count(module, caller, loop)
            body = module.computations[loop.attribute("body") or ""]
            if trips is None or trips < 2 or body.root.opcode != "tuple":
                continue
            for index, name in enumerate(body.root.operands):
                element = body.instructions[name]
                shape = element.shape
                unchanged = element.opcode == "get-tuple-element" and _carry_index(body, name) == index
                if len(shape.dims) < 2 or shape.dims[0] != trips or unchanged:
                    continue
                if "transpose(jvp" in loop.op_name:
                    gradients += shape.num_bytes
                else:
                    residuals += shape.num_bytes
    return residuals, gradients
