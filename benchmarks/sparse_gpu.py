"""InfLLM v2's GPU kernels on a GPU: their values beside the plain ones, their speed beside FlashAttention's.

`python -m benchmarks.sparse_gpu` runs on the GPU at hand and needs nothing but jax and, for the outside witness, torch.
Dense attention is cuDNN's (`jax.nn.dot_product_attention`) and PyTorch's FlashAttention-2, both in bfloat16. Queries
and keys drift slowly, so that neighbours choose much the same blocks, as on text.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import RESULTS_DIR, Benchmark
from benchmarks.sparse_attention import SELECTION, drifting, union_ratio
from kernels_pallas.block_selection.api import select_blocks
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.block_sparse_attention.api import Implementation, block_sparse_attention
from kernels_pallas.compress_keys.api import compress_keys
from kernels_pallas.sparse_decode_attention.api import sparse_decode_attention

# Query heads, key/value heads, head width.
LAYERS = {"minicpm4_8b": (32, 2, 128), "minicpm4_0.5b": (16, 2, 64)}
# Layers whose values are compared: heads, key/value heads, width, tokens, type.
CHECKED = (
    (32, 2, 128, 1024, "bfloat16"),
    (9, 3, 64, 1001, "bfloat16"),
    (4, 4, 64, 700, "bfloat16"),
    (5, 1, 32, 777, "float32"),
)
SMALL = BlockSelection(kernel_size=32, kernel_stride=16, block_size=64, window_size=256, topk=6)


def layer_inputs(heads: int, kv_heads: int, width: int, length: int, dtype: str) -> tuple[jax.Array, ...]:
    """Returns q, k, v of one sequence."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (heads, kv_heads, kv_heads)
    q, k, v = (drifting(key, length, n, width).astype(dtype) for key, n in zip(keys, shapes, strict=True))
    return q, k, v


@functools.partial(jax.jit, static_argnames=("sizes", "implementation"))
def choose(q: jax.Array, k: jax.Array, sizes: BlockSelection, implementation: str | None = None) -> jax.Array:
    """Compresses the keys and selects."""
    fine = compress_keys(k, kernel_size=sizes.kernel_size, kernel_stride=sizes.kernel_stride)
    coarse = compress_keys(k, kernel_size=sizes.coarse_kernel_size, kernel_stride=sizes.coarse_kernel_stride)
    return select_blocks(q, fine, coarse, selection=sizes, implementation=implementation)  # type: ignore[arg-type]


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """‖got - want‖ / ‖want‖ in float64."""
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@functools.partial(jax.jit, static_argnames="implementation")
def output_and_gradients(
    args: tuple, dout: jax.Array, ids: jax.Array, segments: jax.Array, implementation: Implementation
) -> tuple:
    """Returns the output and the gradients to q, k and v."""
    attend = functools.partial(
        block_sparse_attention, block_size=64, segment_ids=segments, implementation=implementation
    )
    out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, ids), *args)
    return out, *vjp(dout.astype(out.dtype))


def check_values(bench: Benchmark) -> None:
    """Compares values and gradients with the plain ones in float32 for the same lists, and the lists themselves."""
    for heads, kv_heads, width, length, dtype in CHECKED:
        q, k, v = layer_inputs(heads, kv_heads, width, length, dtype)
        segments = jnp.asarray(np.searchsorted([length // 3, length // 2], np.arange(length), "right"))[None]
        ids = choose(q, k, SMALL)
        with jax.default_matmul_precision("highest"):
            plain_ids = choose(q.astype("float32"), k.astype("float32"), SMALL, "reference")
        name = f"{heads}/{kv_heads} heads of {width}, {length} tokens, {dtype}"
        bench.add(
            f"{name}: lists unlike the plain ones",
            "of lists",
            float((ids != plain_ids).any(-1).mean()),
            larger_is_better=False,
        )
        dout = jax.random.normal(jax.random.key(1), q.shape)

        ours = output_and_gradients((q, k, v), dout, ids, segments, "pallas_gpu")
        with jax.default_matmul_precision("highest"):
            plain = output_and_gradients(
                tuple(x.astype("float32") for x in (q, k, v)), dout, ids, segments, "reference"
            )
        for what, got, want in zip(("output", "dq", "dk", "dv"), ours, plain, strict=True):
            goal = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]
            bench.add(
                *(f"{name}: {what}", "relative error", relative_error(got, want)),
                larger_is_better=False,
                baseline_name="at most",
                baseline=goal,
                goal=1.0,
            )


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Returns the median time of some calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., tuple]:
    """Returns the output and the gradients to q, k, v, for a given gradient to the output."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dout: jax.Array, *args: jax.Array) -> tuple:
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, *args), q, k, v)
        return out, *vjp(dout)

    return both


def measure(bench: Benchmark, layer: str, length: int, torch: dict[str, float]) -> None:
    """Times a layer's attention with its selection beside dense attention."""
    q, k, v = layer_inputs(*LAYERS[layer], length, "bfloat16")
    dout = jax.random.normal(jax.random.key(1), q.shape, q.dtype)
    ids = jax.block_until_ready(choose(q, k, SELECTION))
    name = f"{layer}, {length // 1024}K"
    bench.add(
        *(f"{name}: union of 4 neighbours", "× one's blocks", union_ratio(np.asarray(ids[0, 0]), 4)),
        larger_is_better=False,
    )
    sparse = functools.partial(block_sparse_attention, block_size=SELECTION.block_size)
    dense = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    selecting = seconds(lambda: choose(q, k, SELECTION))
    sides = {
        "forward": (jax.jit(sparse), jax.jit(dense), (q, k, v)),
        "forward+backward": (jax.jit(with_gradients(sparse)), jax.jit(with_gradients(dense)), (q, k, v, dout)),
    }
    for which, (ours, theirs, args) in sides.items():
        attending = seconds(lambda ours=ours, args=args: ours(*args, ids))  # type: ignore[misc]
        base = seconds(lambda theirs=theirs, args=args: theirs(*args))  # type: ignore[misc]
        total = selecting + attending
        for side, value in (("cuDNN", base), ("PyTorch FlashAttention-2", torch.get(f"{name} {which}"))):
            if value is not None:
                bench.add(
                    *(f"{name}, {which}", "ms", 1e3 * total),
                    larger_is_better=False,
                    baseline_name=side,
                    baseline=1e3 * value,
                )
        bench.add(f"{name}, {which}: of it selection", "of the time", selecting / total, larger_is_better=False)
        memory = ours.lower(*args, ids).compile().memory_analysis()
        if memory is not None:
            bench.add(f"{name}, {which}: temporaries", "MiB", memory.temp_size_in_bytes / 2**20, larger_is_better=False)


def measure_decode(bench: Benchmark, layer: str, length: int, batch: int) -> None:
    """Times one token's attention over a cache, with its selection, beside cuDNN's over the whole cache."""
    heads, kv_heads, width = LAYERS[layer]
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (batch, 1, heads, width), jnp.bfloat16)
    k, v = (jax.random.normal(key, (batch, length, kv_heads, width), jnp.bfloat16) for key in keys[1:])
    positions = jnp.full((batch, 1), length - 1)
    fine, coarse = (
        compress_keys(k, kernel_size=size, kernel_stride=stride)
        for size, stride in (
            (SELECTION.kernel_size, SELECTION.kernel_stride),
            (SELECTION.coarse_kernel_size, SELECTION.coarse_kernel_stride),
        )
    )
    k_cache, v_cache = (x.transpose(0, 2, 1, 3)[None] for x in (k, v))

    @jax.jit
    def sparse(q: jax.Array, fine: jax.Array, coarse: jax.Array, k_cache: jax.Array, v_cache: jax.Array) -> jax.Array:
        ids = select_blocks(q, fine, coarse, selection=SELECTION, query_positions=positions)
        return sparse_decode_attention(q, k_cache, v_cache, ids, positions, block_size=SELECTION.block_size)

    dense = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"))
    ours = seconds(lambda: sparse(q, fine, coarse, k_cache, v_cache), 20)
    bench.add(
        *(f"{layer}, a token of {batch} sequences, {length // 1024}K in the cache", "ms", 1e3 * ours),
        larger_is_better=False,
        baseline_name="cuDNN",
        baseline=1e3 * seconds(lambda: dense(q, k, v), 20),
    )


def torch_times(layers: Sequence[str], lengths: Sequence[int]) -> dict[str, float]:
    """Times PyTorch's FlashAttention in a process of its own, as both want the card's memory; {} without torch."""
    program = f"""
import statistics, time, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
def seconds(call):
    times = []
    for _ in range(6):
        torch.cuda.synchronize(); begin = time.perf_counter()
        call()
        torch.cuda.synchronize(); times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])
for layer, (heads, kv_heads, width) in {[(x, LAYERS[x]) for x in layers]}:
    for length in {list(lengths)}:
        q = torch.randn(1, heads, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.randn_like(q[:, :kv_heads]).requires_grad_() for _ in "kv")
        dout = torch.randn_like(q)
        def forward():
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        print("TIME", f"{{layer}}, {{length // 1024}}K forward", seconds(forward), sep="\\t")
        both = lambda: torch.autograd.grad(forward(), (q, k, v), dout)
        print("TIME", f"{{layer}}, {{length // 1024}}K forward+backward", seconds(both), sep="\\t")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if done.returncode:
        print("no times of PyTorch:", done.stderr[-500:])
    lines = (line.split("\t") for line in done.stdout.splitlines() if line.startswith("TIME"))
    return {name: float(value) for _, name, value in lines}


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, measures and writes `results/sparse_gpu.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[16_384, 32_768, 65_536, 131_072])
    parser.add_argument("--directory", type=Path, default=RESULTS_DIR, help="where the results go")
    args = parser.parse_args(argv)
    if jax.default_backend() != "gpu":
        parser.error(f"jax runs on {jax.default_backend()}: needs a GPU")
    torch = torch_times(args.layers, args.lengths)
    bench = Benchmark("sparse_gpu", f"on {jax.devices()[0].device_kind}: python -m benchmarks.sparse_gpu")
    check_values(bench)
    for layer in args.layers:
        for length in args.lengths:
            measure(bench, layer, length, torch)
        for batch in (1, 8):
            measure_decode(bench, layer, args.lengths[-1], batch)
    bench.write(args.directory)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
