"""The CUDA kernels of `export/cuda/` through nvcc, for GPUs that are not there: do they compile, without spills?"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]

SOURCES = Path(__file__).parents[2] / "export/cuda/src"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_every_kernel_compiles_without_spills(architecture, tmp_path):
    command = ["nvcc", "-std=c++17", "-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-DCPM_CUDA"]
    command += ["-o", str(tmp_path / "kernels.cubin"), str(SOURCES / "cuda_backend.cu")]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    kernels = set(re.findall(r"Compiling entry function '\w*?(\w+_kernel)", done.stderr))
    declared = re.findall(r"__global__ void (\w+)\(", (SOURCES / "cuda_kernels.cuh").read_text())
    assert all(any(name.endswith(kernel) for name in kernels) for kernel in declared), kernels
    assert not re.search(r"[1-9]\d* bytes spill", done.stderr), done.stderr
