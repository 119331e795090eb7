"""The CUDA kernels of `export/cuda/` through nvcc: what they take of GPUs that are not there.

    python -m benchmarks.cuda_kernels

All of them are compiled for every architecture that CMake builds for, and the assembler says how many registers a
thread takes, how much shared memory a block, and what does not fit the registers. Of a kernel that there is for several
formats of weights the largest figure is kept. Nothing is timed: this needs nvcc, and no GPU.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import Benchmark

CUDA = Path(__file__).resolve().parents[1] / "export/cuda"
MOST_REGISTERS, MOST_SHARED = 255, 48  # of a thread; KiB of a block that does not ask for more


class Usage(NamedTuple):
    """What a kernel takes.

    Attributes:
        registers: of a thread.
        shared: bytes of a block, without what is asked for at launch.
        spilled: bytes of a thread that do not fit the registers, stored and loaded.
    """

    registers: int
    shared: int
    spilled: int


def architectures() -> list[str]:
    """Those of CMakeLists.txt, as nvcc names them."""
    found = re.search(r"set\(CMAKE_CUDA_ARCHITECTURES ([\d ]+)\)", (CUDA / "CMakeLists.txt").read_text("utf-8"))
    assert found is not None
    return [f"sm_{number}" for number in found[1].split()]


def declared_kernels() -> set[str]:
    """Names of all kernels in the source."""
    return set(re.findall(r"__global__ void (\w+)\(", (CUDA / "src/cuda_kernels.cuh").read_text("utf-8")))


def compile_kernels(architecture: str) -> dict[str, Usage]:
    """Compiles all kernels for one architecture.

    Raises:
        RuntimeError: nvcc refuses, with what it says.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = ["nvcc", "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-DCPM_CUDA"]
        command += ["-o", f"{scratch}/kernels.cubin", str(CUDA / "src/cuda_backend.cu")]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    usage: dict[str, Usage] = {}
    for entry in done.stderr.split("Compiling entry function ")[1:]:
        found = re.match(r"'_ZN3cpm(\d+)(\w+)'", entry)
        registers, shared = re.search(r"Used (\d+) registers", entry), re.search(r"(\d+) bytes smem", entry)
        spills = re.findall(r"(\d+) bytes spill", entry)
        assert found is not None, entry
        assert registers is not None, entry
        assert spills, entry
        name = found[2][: int(found[1])]
        took = Usage(int(registers[1]), int(shared[1]) if shared else 0, sum(map(int, spills)))
        usage[name] = Usage(*(max(pair) for pair in zip(took, usage.get(name, took), strict=True)))
    return usage


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles all kernels for all architectures."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    benchmark = Benchmark("cuda_kernels")
    for architecture in architectures():
        for kernel, usage in sorted(compile_kernels(architecture).items()):
            for what, unit, value, most in (
                ("registers", "", usage.registers, MOST_REGISTERS),
                ("shared memory", "KiB", usage.shared / 1024, MOST_SHARED),
                ("beside the registers", "bytes a thread", usage.spilled, 0),
            ):
                benchmark.add(
                    f"{kernel.removesuffix('_kernel')}, {architecture}: {what}",
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
