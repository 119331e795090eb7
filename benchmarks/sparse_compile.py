"""The kernels of InfLLM v2 through the TPU compiler: every chip, real shape and length, forward and backward.

    python -m benchmarks.sparse_compile --work DIR

No TPU is needed: libtpu compiles for chips that are not there (`make aot`). Each cell is compiled in a process of its
own, with the implementation that the op chooses by itself, and stays in `--work`: a call that was cut off goes on from
there and writes all rows so far. After a change of the kernels take a new folder. A cell has the memory that the
compiler reserves beside the chip's, and the seconds that it took; one that does not compile, or runs without its
kernel, is a goal that was missed.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.results import RESULTS_DIR, Benchmark
from cpm_jax.common.files import write_json
from cpm_jax.planning.aot import compiler_environment, libtpu_path
from cpm_jax.planning.chips import CHIPS
from kernels_pallas.block_selection.api import select_blocks
from kernels_pallas.block_selection.arg_specs import ARG_SPECS as SELECTION_SPECS
from kernels_pallas.block_sparse_attention.api import block_sparse_attention
from kernels_pallas.block_sparse_attention.arg_specs import ARG_SPECS
from kernels_pallas.sparse_decode_attention.api import sparse_decode_attention
from kernels_pallas.sparse_decode_attention.arg_specs import ArgSpec as DecodeSpec

SHAPES = tuple(f"minicpm4_{size}_{length}k" for size in ("0.5b", "8b") for length in (4, 32, 128))
# Of each op, the kernels that its program must have.
OPS = {
    "selection": ("block_selection_scores",),
    "attention": ("block_sparse_attention_forward",),
    "attention, backward": ("block_sparse_attention_forward", "block_sparse_attention_backward"),
    "decoding": ("sparse_decode_attention",),
}
MEMORY = ("argument", "output", "alias", "temp", "generated_code")
MIB = 2**20


def program(op: str, shape: str) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
    """Returns the function of a cell, and its arguments without their values."""
    spec = ARG_SPECS[shape]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, segments: jax.Array) -> jax.Array:
        return block_sparse_attention(q, k, v, ids, block_size=spec.block_size, segment_ids=segments)

    def gradients(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, segments: jax.Array) -> tuple:
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, ids, segments), q, k, v)
        return out, *vjp(out)

    def select(q: jax.Array, fine: jax.Array, coarse: jax.Array, segments: jax.Array) -> jax.Array:
        return select_blocks(q, fine, coarse, selection=SELECTION_SPECS[shape].selection, segment_ids=segments)

    def decode(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, positions: jax.Array) -> jax.Array:
        return sparse_decode_attention(q, k, v, ids, positions, block_size=spec.block_size)

    if op == "selection":
        return select, SELECTION_SPECS[shape].abstract_args()
    if op == "decoding":
        cache = DecodeSpec(1, spec.seq_len, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.dtype)
        return decode, cache.abstract_args()
    return {"attention": attend, "attention, backward": gradients}[op], spec.abstract_args()


def compile_cell(chip: str, shape: str, op: str) -> dict[str, Any]:
    """Compiles one cell for one chip.

    Returns:
        `seconds`, `cpu_seconds` (of all threads), `memory` (bytes by `memory_analysis()`) and `missing` (kernels that
        the program should have and has not); or `refusal`, what the compiler said.
    """
    topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:{CHIPS[chip].examples[0]}")
    mesh = Mesh(np.array(topology.devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    function, args = program(op, shape)

    def on_mesh(*args: jax.Array) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    lowered = jax.jit(on_mesh, in_shardings=NamedSharding(mesh, PartitionSpec())).lower(*args)
    start, cpu_start = time.monotonic(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return {"refusal": str(error)[:2000]}
    seconds, cpu_seconds = time.monotonic() - start, time.process_time() - cpu_start
    analysis, text = compiled.memory_analysis(), compiled.as_text() or ""
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "memory": {name: getattr(analysis, f"{name}_size_in_bytes") for name in MEMORY},
        "missing": [kernel for kernel in OPS[op] if kernel not in text],
    }


def compile_apart(path: Path, chip: str, shape: str, op: str, timeout: float) -> None:
    """Compiles a cell in a process of its own, which writes `path`; where it left nothing, that is its refusal."""
    command = [sys.executable, "-m", "benchmarks.sparse_compile", "--cell", chip, shape, op, str(path)]
    environment = compiler_environment(libtpu_path())
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        write_json(path, {"refusal": f"not compiled within {timeout:.0f} seconds"})
        return
    if not path.exists():
        write_json(path, {"refusal": f"the compiler failed with exit code {done.returncode}:\n{done.stderr[-2000:]}"})


def report(cells: dict[tuple[str, str, str], dict[str, Any]], directory: Path) -> None:
    """Writes `sparse_compile.json`."""
    bench = Benchmark("sparse_compile")
    for (chip, shape, op), cell in cells.items():
        name = f"{chip}, {shape}, {op}"
        if "refusal" in cell or cell["missing"]:
            print(f"{name}: {cell.get('refusal') or 'without ' + ', '.join(cell['missing'])}")
            what = f"{name}: compiles with its kernels"
            bench.add(what, "", 0, larger_is_better=True, baseline_name="all", baseline=1, goal=1)
            continue
        memory = cell["memory"]
        reserved = sum(memory.values()) - 2 * memory["alias"]
        bench.add(
            f"{name}: memory",
            "MiB",
            reserved / MIB,
            larger_is_better=False,
            baseline_name="of the chip",
            baseline=CHIPS[chip].hbm_bytes / MIB,
            goal=1,
        )
        bench.add(f"{name}: temporary memory", "MiB", memory["temp"] / MIB, larger_is_better=False)
        bench.add(f"{name}: compiling", "s", cell["seconds"], larger_is_better=False)
    bench.write(directory)


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles what is not compiled yet and writes `results/sparse_compile.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the cells that are done")
    parser.add_argument("--chips", nargs="+", choices=list(CHIPS), default=list(CHIPS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for a cell")
    parser.add_argument("--directory", type=Path, default=RESULTS_DIR, help="where the results go")
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cell:
        *cell, path = args.cell
        write_json(Path(path), compile_cell(*cell))
        return
    if args.work is None:
        parser.error("--work: must be a folder")

    def path_of(chip: str, shape: str, op: str) -> Path:
        return args.work / f"{chip}-{shape}-{op.replace(', ', '_')}.json"

    args.work.mkdir(parents=True, exist_ok=True)
    for cell in itertools.product(args.chips, args.shapes, args.ops):
        if not path_of(*cell).exists():
            compile_apart(path_of(*cell), *cell, args.timeout)
    done = [cell for cell in itertools.product(CHIPS, SHAPES, OPS) if path_of(*cell).exists()]
    report({cell: json.loads(path_of(*cell).read_text("utf-8")) for cell in done}, args.directory)


if __name__ == "__main__":
    main()
