"""The Triton kernels of the PyTorch runtime through Triton's compiler: what they take of GPUs that are not there.

    JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot python -m benchmarks.torch_runtime_kernels

Each kernel is compiled at the shapes of MiniCPM4-8B for every GPU, and its machine code is asked for shared memory,
registers, and the bytes a thread that do not fit them. Nothing is timed: `make aot` brings the compiler, not a GPU.
"""

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import Benchmark

# Compute capability of A100, Jetson AGX Orin, RTX 4090, H100 and B200, and the shared memory in KiB that a program may
# have.
SHARED_KIB = {80: 163, 87: 163, 89: 99, 90: 227, 100: 227}
MOST_REGISTERS = 255


class Kernel(NamedTuple):
    """A kernel with the types and constants of one of its calls.

    Attributes:
        place: module and function in `export.torch_runtime.triton_kernels`.
        types: of its arguments that are no constants, in their order; ":16" where those of the 8B model are multiples
            of 16, for which Triton makes other code.
        constants: by their names.
        num_warps: of a program.
        num_stages: steps of a loop whose tiles are in memory at once.
    """

    place: str
    types: str
    constants: dict[str, int]
    num_warps: int = 4
    num_stages: int = 3


_HEADS = {"GROUP": 16, "ROWS": 16, "SIZE": 128, "DIMS": 128}
KERNELS = {
    "int4 product, decoding": Kernel(
        "int4_matmul.int4_matmul_kernel",
        "*fp16 *i32 *fp16 *u8 *fp32 i32 i32:16 i32:16 i32:16 i32",
        {"ROWS": 16, "OUTPUTS": 64, "INPUTS": 64},
    ),
    "int4 product, prefill": Kernel(
        "int4_matmul.int4_matmul_kernel",
        "*fp16 *i32 *fp16 *u8 *fp16 i32:16 i32:16 i32:16 i32:16 i32:16",
        {"ROWS": 64, "OUTPUTS": 128, "INPUTS": 64},
        num_warps=8,
    ),
    "sparse attention": Kernel(
        "sparse_attention.sparse_attention_kernel",
        "*bf16 *bf16 *bf16 *i64 *i64 *fp32 *fp32 fp32 i32:16 i32 i32:16 i32 i32",
        _HEADS | {"TILE": 64, "TILES": 1},
    ),
    "normaliser": Kernel(
        "block_scores.normaliser_kernel",
        "*bf16 *bf16 *i64 *fp32 fp32 i32:16 i32 i32 i32 i32:16 i32:16",
        _HEADS | {"KERNELS": 64},
    ),
    "block scores": Kernel(
        "block_scores.block_scores_kernel",
        "*bf16 *bf16 *fp32 *i64 *fp32 fp32 i32:16 i32 i32 i32 i32:16 i32:16 i32:16",
        _HEADS | {"PER_BLOCK": 4, "BEFORE": 1, "BLOCKS": 16},
    ),
    "compressed keys": Kernel(
        "compress_keys.compress_keys_kernel",
        "*bf16 *bf16 *i64 i32:16 i32 i32:16 i32:16",
        {"SIZE": 128, "DIMS": 128, "KEYS": 32},
    ),
    "rotary embedding": Kernel(
        "rotary.rotary_kernel",
        "*bf16 *bf16 *fp32 *bf16 *bf16 i32:16 i32:16 i32:16",
        {"NUM_HEADS": 32, "NUM_KV_HEADS": 2, "HALF": 64, "PAIRS": 64, "HEADS": 8},
    ),
    "residual and norm": Kernel(
        "residual_norm.residual_norm_kernel",
        "*bf16 *bf16 *bf16 *bf16 *bf16 i32:16 fp32 fp32",
        {"WIDTH": 4096},
        num_warps=16,
    ),
}


class Usage(NamedTuple):
    """What a program takes.

    Attributes:
        shared: bytes of shared memory.
        registers: of a thread.
        spilled: bytes of a thread that do not fit them.
    """

    shared: int
    registers: int
    spilled: int


def compile_kernel(kernel: Kernel, capability: int) -> Usage:
    """Compiles a kernel to machine code for one GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = kernel.place.split(".")
    function = getattr(importlib.import_module(f"export.torch_runtime.triton_kernels.{module}"), name)
    types = kernel.types.split()
    arguments = [argument for argument in function.arg_names if argument not in kernel.constants]
    source = ASTSource(
        function,
        signature=dict(zip(arguments, [kind.removesuffix(":16") for kind in types], strict=True))
        | dict.fromkeys(kernel.constants, "constexpr"),
        constexprs=kernel.constants,
        # PyTorch's tensors begin at multiples of 16 bytes.
        attrs={(at,): [["tt.divisibility", 16]] for at, kind in enumerate(types) if kind[0] == "*" or ":" in kind},
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
    return _usage(triton.compile(source, target=target, options=options))


def _usage(compiled: Any) -> Usage:
    """Asks the disassembler that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        said = subprocess.run([tool, "-res-usage", binary.name], capture_output=True, text=True, check=True).stdout
    found = {name: re.search(rf"{name}:(\d+)", said) for name in ("REG", "STACK")}
    registers, stack = (int(match[1]) if match else -1 for match in found.values())
    return Usage(compiled.metadata.shared, registers, stack)


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles all kernels for all GPUs."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    command = "JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot python -m benchmarks.torch_runtime_kernels"
    benchmark = Benchmark("torch_runtime_kernels", command)
    for name, kernel in KERNELS.items():
        used = {capability: compile_kernel(kernel, capability) for capability in SHARED_KIB}
        for capability, usage in used.items():
            for what, unit, value, most in (
                ("registers", "", usage.registers, MOST_REGISTERS),
                ("shared memory", "KiB", usage.shared / 1024, SHARED_KIB[capability]),
                ("beside the registers", "bytes a thread", usage.spilled, 0),
            ):
                benchmark.add(
                    f"{name}, sm_{capability}: {what}",
                    unit,
                    value,
                    larger_is_better=False,
                    baseline_name="at most",
                    baseline=most,
                    goal=1.0,
                )
    benchmark.write()


if __name__ == "__main__":
    main()
