"""The Triton kernels of the PyTorch runtime: their values by the interpreter or a GPU, and machine code for GPUs."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from benchmarks.torch_runtime_kernels import KERNELS, MOST_REGISTERS, SHARED_KIB, compile_kernel
from cpm_jax.modeling.config import SparseConfig
from export.gptq import export_gptq
from tests.export.quantized_models import rounded_model
from tests.export.small_models import small_tokenizer

pytestmark = pytest.mark.aot


@pytest.fixture(scope="module", autouse=True)
def triton_compiler():
    if importlib.util.find_spec("triton") is None:
        pytest.fail("Triton is not installed: make aot")


@pytest.mark.parametrize("interpret", ["1", "0"], ids=["interpreter", "GPU"])
def test_values_are_those_of_plain_pytorch(interpret, tmp_path):
    import torch

    if interpret == "0" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    sparse = SparseConfig(kernel_size=8, kernel_stride=4, block_size=16, window_size=16, topk=2, dense_len=16)
    model = rounded_model(num_layers=1, sparse_config=sparse)
    export_gptq(model, small_tokenizer(), tmp_path / "gptq", layout="minicpm")
    command = [sys.executable, "-m", "tests.export.torch_runtime.triton_cases", str(tmp_path / "gptq")]
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 41
    # Values of 16 bits may differ in the last of their 8 or 11 bits, as the interpreter cuts off where PyTorch rounds.
    most = {case: 2**-7 if "bfloat16" in case else 2**-10 if "float16" in case else 1e-5 for case in errors}
    assert {case: found for case, found in errors.items() if not found <= most[case]} == {}


@pytest.mark.parametrize(("name", "rows"), [("int4 product, decoding", 1), ("int4 product, prefill", 512)])
def test_what_is_compiled_is_what_runs(name, rows):
    from export.torch_runtime.triton_kernels.int4_matmul import tiles

    assert tiles(rows, group_size=128) == KERNELS[name].constants | {"num_warps": KERNELS[name].num_warps}


@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for capability, most in SHARED_KIB.items():
        usage = compile_kernel(KERNELS[name], capability)
        assert usage.shared <= most * 1024
        assert 0 < usage.registers <= MOST_REGISTERS
        assert usage.spilled == 0, f"{usage.spilled} bytes a thread do not fit the registers of sm_{capability}"


@pytest.mark.parametrize("name", ["int4 product, prefill", "sparse attention"])
def test_float32_fits_a_gpu_with_little_shared_memory(name, tmp_path, monkeypatch):
    import torch

    from export.torch_runtime.triton_kernels.int4_matmul import stages

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    types = KERNELS[name].types.replace("bf16", "fp32").replace("fp16", "fp32")
    usage = compile_kernel(KERNELS[name]._replace(types=types, num_stages=stages(torch.float32)), 89)
    assert usage.shared <= SHARED_KIB[89] * 1024
    assert usage.spilled == 0
