"""The GPU kernels of InfLLM v2 through Triton's compiler: machine code for GPUs that are not there.

JAX lowers a kernel to a Triton module; the `triton` package makes of it what XLA would make on a machine with the GPU.
"""

import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import jax
import pytest
from jaxlib.mlir import ir
from jaxlib.triton import dialect

from kernels_pallas.block_selection import api as selection
from kernels_pallas.block_selection.arg_specs import ARG_SPECS as SELECTION_SPECS
from kernels_pallas.block_sparse_attention import api
from kernels_pallas.block_sparse_attention.arg_specs import ARG_SPECS
from kernels_pallas.sparse_decode_attention import api as decode
from kernels_pallas.sparse_decode_attention.arg_specs import ARG_SPECS as DECODE_SPECS

pytestmark = pytest.mark.aot

# Compute capability of A100, RTX 4090, H100 and B200, and the shared memory in KiB that a program may have.
GPUS = {80: 163, 89: 99, 90: 227, 100: 227}


@pytest.fixture(scope="module", autouse=True)
def triton_compiler():
    if importlib.util.find_spec("triton") is None:
        pytest.fail("Triton's compiler is not installed: make aot")


def longest(specs):
    """Of each model's shapes the longest one: on a GPU the length is no more than strides."""
    return [name for name in specs if not re.fullmatch(r"minicpm4_.*_(4|32)k", name)]


def triton_kernels(function, args):
    """The Triton modules of a function lowered for CUDA, with what they are to be compiled with."""
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).compiler_ir()
    found = []

    def collect(op):
        if op.name == "stablehlo.custom_call" and "triton" in str(op.attributes["call_target_name"]):
            found.append(ir.DictAttr(op.attributes["mhlo.backend_config"]))
        return ir.WalkResult.ADVANCE

    with lowered.context:
        lowered.operation.walk(collect)
        configs = [
            (ir.StringAttr(c["ir"]).value_bytes, *(ir.IntegerAttr(c[n]).value for n in ("num_warps", "num_stages")))
            for c in found
        ]
    with ir.Context() as context:
        dialect.register_dialect(context)
        return [(str(ir.Module.parse(code)), warps, stages) for code, warps, stages in configs]


def machine_code(module, capability, num_warps, num_stages, directory: Path):
    """Compiles for one GPU; returns shared memory in bytes, registers a thread, and bytes that do not fit registers."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = directory / "kernel.ttir"
    source.write_text(module)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = triton.compile(str(source), target=GPUTarget("cuda", capability, 32), options=options)
    binary = directory / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return compiled.metadata.shared, registers, stack


def check(function, args, most_spilled, tmp_path, monkeypatch):
    """Compiles a function's kernels, which may put at most so many bytes a thread beside the registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    kernels = triton_kernels(function, args)
    assert len(kernels) == len(most_spilled)
    for (module, warps, stages), spilled in zip(kernels, most_spilled, strict=True):
        for capability, most in GPUS.items():
            shared, registers, stack = machine_code(module, capability, warps, stages, tmp_path)
            assert shared <= most * 1024
            assert registers <= 255
            assert stack <= spilled, f"{stack} bytes a thread do not fit the registers of sm_{capability}"


@pytest.mark.parametrize("name", longest(ARG_SPECS))
def test_block_sparse_attention(name, tmp_path, monkeypatch):
    spec = ARG_SPECS[name]

    def both(q, k, v, ids, segments, dout):
        attend = functools.partial(
            api.block_sparse_attention, block_size=spec.block_size, segment_ids=segments, implementation="pallas_gpu"
        )
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, ids), q, k, v)
        return out, vjp(dout)

    args = spec.abstract_args()
    # The gradients to the keys are quicker on an H100 with some of their sums in memory (`tuned_block_sizes.py`).
    check(both, (*args, args[0]), (0, 0, 272), tmp_path, monkeypatch)


@pytest.mark.parametrize("name", [name for name, spec in DECODE_SPECS.items() if spec.block_size >= 16])
def test_sparse_decode_attention(name, tmp_path, monkeypatch):
    spec = DECODE_SPECS[name]

    def attend(q, k, v, ids, positions, *table):
        page_table = table[0] if table else None
        return decode.sparse_decode_attention(
            q, k, v, ids, positions, block_size=spec.block_size, page_table=page_table, implementation="pallas_gpu"
        )

    check(attend, spec.abstract_args(), (0,), tmp_path, monkeypatch)


@pytest.mark.parametrize("name", longest(SELECTION_SPECS))
def test_block_selection(name, tmp_path, monkeypatch):
    spec = SELECTION_SPECS[name]

    def select(q, fine, coarse, segments):
        return selection.select_blocks(
            q, fine, coarse, selection=spec.selection, segment_ids=segments, implementation="pallas_gpu"
        )

    check(select, spec.abstract_args(), (0, 0, 0), tmp_path, monkeypatch)
