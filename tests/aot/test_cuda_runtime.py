"""The CUDA kernels of `export/cuda/` through nvcc, for GPUs that are not there: do they compile, without spills?"""

import shutil

import pytest

from benchmarks.cuda_kernels import MOST_REGISTERS, MOST_SHARED, architectures, compile_kernels, declared_kernels

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]


def test_all_architectures_are_asked_for():
    assert architectures() == ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])  # the others are in the benchmark
def test_every_kernel_compiles_without_spills(architecture):
    found = compile_kernels(architecture)
    assert set(found) == declared_kernels()
    for usage in found.values():
        assert 0 < usage.registers <= MOST_REGISTERS
        assert usage.shared <= MOST_SHARED * 1024
        assert usage.spilled == 0
