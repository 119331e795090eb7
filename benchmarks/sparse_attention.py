"""Attention of a long prompt: our sparse path with its selection, our own dense attention, PyTorch's dense attention.

One key/value head of a layer and its query heads are timed, forward and forward+backward; all heads cost the same. What
is dense is timed whole up to `--longest_dense` tokens and counted as T² beyond. Queries and keys drift slowly, so that
neighbours choose much the same blocks, as on text; the table says how much. Every case that is done stays in `--work`:
a call that was cut off, or one of another length, goes on from there and writes all rows so far.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import RESULTS_DIR, Benchmark
from cpm_jax.common.figures import Series, line_figure
from cpm_jax.common.files import write_json
from kernels_pallas.attention.api import dot_product_attention
from kernels_pallas.block_selection.api import select_blocks
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.block_sparse_attention.api import block_sparse_attention
from kernels_pallas.compress_keys.api import compress_keys

# Query heads on a key/value head, and their width.
LAYERS = {"minicpm4_0.5b": (8, 64), "minicpm4_8b": (16, 128)}
GOALS = {32_768: 1.6, 65_536: 3.0, 131_072: 6.0}
PASSES = ("forward", "forward+backward")
SELECTION = BlockSelection()


def drifting(key: jax.Array, length: int, heads: int, width: int) -> jax.Array:
    """Returns [1, T, heads, H] of unit variance, where a token and the one 64 later correlate at 0.5."""
    keep = 0.5 ** (1 / 64)
    noise = jax.random.normal(key, (length, heads, width))
    noise = noise.at[1:].multiply((1 - keep**2) ** 0.5)

    def step(last: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = keep * last + new
        return new, new

    return jax.lax.scan(step, jnp.zeros((heads, width)), noise)[1][None]


def union_ratio(block_ids: np.ndarray, tile: int) -> float:
    """Blocks that a tile of consecutive queries chose together, over those that one of them chose: the mean of tiles.

    Args:
        block_ids: [T, I], T at least `tile`.
        tile: queries of a tile.
    """
    tiles = block_ids[: len(block_ids) // tile * tile].reshape(-1, tile, block_ids.shape[1])
    return float(np.mean([len(np.unique(x[x >= 0])) / (x >= 0).sum(axis=1).mean() for x in tiles]))


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Returns the least time of some calls, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def compiled_side(attend: Callable[..., jax.Array], which: str, args: tuple[jax.Array, ...]) -> tuple[Callable, int]:
    """Returns a call of one pass over q, k, v and what else `attend` takes, and its temporary memory in bytes."""
    if which == PASSES[0]:
        program = jax.jit(attend)
    else:
        program = jax.jit(jax.grad(lambda *args: attend(*args).sum(), argnums=(0, 1, 2)))
    compiled = program.lower(*args).compile()
    memory: Any = compiled.memory_analysis()
    return lambda: jax.block_until_ready(compiled(*args)), memory.temp_size_in_bytes


def measure(layer: str, length: int, which: str, longest_dense: int, repeats: int) -> dict[str, float]:
    """Times one pass of all sides over a layer's one key/value head.

    Returns:
        Seconds of "selection", "attention" (the sparse one), "dense" and "torch", bytes of "memory" and
        "dense_memory", "dense_length" timed, and the union ratios "union_16" and "union_64".
    """
    groups, width = LAYERS[layer]
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        drifting(key, length, heads, width) for key, heads in zip(keys, (groups, 1, 1), strict=True)
    )  # [1, T, heads, H]
    sizes = SELECTION

    @jax.jit
    def select(q: jax.Array, k: jax.Array) -> jax.Array:
        fine = compress_keys(k, kernel_size=sizes.kernel_size, kernel_stride=sizes.kernel_stride)
        coarse = compress_keys(k, kernel_size=sizes.coarse_kernel_size, kernel_stride=sizes.coarse_kernel_stride)
        return select_blocks(q, fine, coarse, selection=sizes)

    block_ids = select(q, k)
    sparse = functools.partial(block_sparse_attention, block_size=sizes.block_size)
    sparse_call, memory = compiled_side(sparse, which, (q, k, v, block_ids))
    dense_length = min(length, longest_dense)
    short = q[:, :dense_length], k[:, :dense_length], v[:, :dense_length]
    dense_call, dense_memory = compiled_side(dot_product_attention, which, short)
    squared = (length / dense_length) ** 2
    return {
        "selection": seconds(lambda: jax.block_until_ready(select(q, k)), repeats),
        "attention": seconds(sparse_call, repeats),
        "dense": squared * seconds(dense_call, repeats),
        "torch": squared * seconds(torch_side(which, short), repeats),
        "memory": memory,
        "dense_memory": dense_memory,
        "dense_length": dense_length,
        **{f"union_{tile}": union_ratio(np.asarray(block_ids[0, 0]), tile) for tile in (16, 64)},
    }


def torch_side(which: str, args: tuple[jax.Array, ...]) -> Callable[[], object]:
    """Returns a call of PyTorch's causal attention on all cores."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    # PyTorch keeps heads before time: its inputs are laid out so beforehand.
    q, k, v = (torch.tensor(np.asarray(x)).transpose(1, 2).contiguous() for x in args)

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    if which == PASSES[0]:
        return forward
    for leaf in (q, k, v):
        leaf.requires_grad_()
    return lambda: torch.autograd.grad(forward().sum(), (q, k, v))


def report(cases: dict[tuple[str, int, str], dict[str, float]], directory: Path) -> None:
    """Writes `sparse_attention.json` and, for each layer and pass, a figure of the time over the length."""
    bench = Benchmark("sparse_attention", "python -m benchmarks.sparse_attention --work DIR --repeats 1")
    for (layer, length, which), case in sorted(cases.items()):
        name = f"{layer}, {length // 1024}K, {which}"
        ours = case["selection"] + case["attention"]
        how = "" if case["dense_length"] == length else f", from {case['dense_length'] / 1024:g}K by T²"
        for side, goal in (("dense", GOALS.get(length)), ("torch", None)):
            bench.add(
                f"{name}: one kv head with selection",
                "s",
                ours,
                larger_is_better=False,
                baseline_name=("our dense" if side == "dense" else "torch SDPA") + how,
                baseline=case[side],
                goal=goal,
            )
        bench.add(
            f"{name}: selection's share",
            "of the time",
            case["selection"] / ours,
            larger_is_better=False,
            baseline_name="at most",
            baseline=0.3,
            goal=1.0,
        )
        bench.add(f"{name}: temporaries a token", "bytes", case["memory"] / length, larger_is_better=False)
        for tile in (16, 64):
            bench.add(
                f"{name}: union of {tile} neighbours", "× one's blocks", case[f"union_{tile}"], larger_is_better=False
            )
    bench.write(directory)
    for layer, which in sorted({(layer, which) for layer, _, which in cases}):
        lengths = sorted(length for of, length, other in cases if (of, other) == (layer, which))
        of_length = [cases[layer, length, which] for length in lengths]
        times = {
            "ours, sparse": [case["selection"] + case["attention"] for case in of_length],
            "of it selection": [case["selection"] for case in of_length],
            "ours, dense": [case["dense"] for case in of_length],
            "torch SDPA": [case["torch"] for case in of_length],
        }
        lines = {name: Series([float(x) for x in lengths], y, markers=True) for name, y in times.items()}
        figure = line_figure(lines, xlabel="tokens", ylabel=f"{layer}, {which}: seconds", from_zero=True)
        (directory / f"sparse_attention_{layer}_{which.replace('+', '_')}.svg").write_text(figure.svg, "utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what is not measured yet and writes `results/sparse_attention.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the cases that are done")
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(GOALS))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--longest_dense", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=RESULTS_DIR, help="where the results go")
    args = parser.parse_args(argv)
    for layer in args.layers:
        for length in args.lengths:
            for which in args.passes:
                path = args.work / f"{layer}-{length}-{which}.json"
                if not path.exists():
                    args.work.mkdir(parents=True, exist_ok=True)
                    write_json(path, measure(layer, length, which, args.longest_dense, args.repeats))
    cases = {}
    for path in args.work.glob("*.json"):
        layer, length, which = path.stem.split("-")
        cases[layer, int(length), which] = json.loads(path.read_text("utf-8"))
    report(cases, args.directory)


if __name__ == "__main__":
    main()
