"""Reading a prompt into a cache, and decoding from it, sparse beside dense: what one attention layer takes.

    python -m benchmarks.sparse_cache --work DIR

A layer writes its new keys, chooses blocks and attends, as in the model; projections and feed-forward are left out. A
prompt is read in chunks of 512 tokens. Of a long one 8 chunks are timed, evenly spread, and counted for all: what a
chunk takes grows in proportion to its position where attention is dense, and is about the same from 6,144 tokens on
where it is sparse. Queries and keys drift as in `benchmarks.sparse_attention`. Every case that is done stays in
`--work`: a call that was cut off goes on from there and writes all rows so far.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import RESULTS_DIR, Benchmark
from benchmarks.sparse_attention import drifting
from cpm_jax.common.files import write_json
from cpm_jax.inference.decode_loop import PREFILL_CHUNKS
from cpm_jax.modeling import sparse_cache
from cpm_jax.modeling.config import SparseConfig
from cpm_jax.modeling.kv_cache import Cache, KVCache, attend_to_cache
from cpm_jax.modeling.sparse_attention import compress
from cpm_jax.modeling.sparse_cache import SparseKVCache, attend_to_sparse_cache

# Query heads, key/value heads and their width.
LAYERS = {"smollm2_135m": (9, 3, 64), "minicpm4_0.5b": (16, 2, 64), "minicpm4_8b": (32, 2, 128)}
PREFILL_LENGTHS = (4096, 8192, 16_384, 32_768)
DECODE_CASES = (("minicpm4_0.5b", 32_768), ("minicpm4_0.5b", 131_072), ("minicpm4_8b", 32_768))
DECODE_GOALS = {("minicpm4_0.5b", 131_072): 7.0}
CHUNK = PREFILL_CHUNKS[0]
MOST_CHUNKS = 8
DECODE_REPEATS = 30
SPARSE = SparseConfig(dense_len=-1)

# A call writes and attends from a position on, and returns the attended values and the cache, whose buffers it reuses.
Attend = Callable[..., tuple[jax.Array, Cache]]


def sparse(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, cache: SparseKVCache) -> tuple:
    """Writes [1, T, heads, H] from a position on and attends to what was chosen."""
    positions = start + jnp.arange(q.shape[1])[None]
    return attend_to_sparse_cache(q, k, v, (q, k), positions, cache, 0)


def dense(q: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, cache: KVCache) -> tuple:
    """The same with all keys up to each query's own."""
    return attend_to_cache(q, k, v, start + jnp.arange(q.shape[1])[None], cache, 0)


def full_caches(k: jax.Array, v: jax.Array) -> tuple[SparseKVCache, KVCache]:
    """Caches of one layer that hold [1, S, K, H] keys and values; what lies behind a position is not looked at."""

    def slots() -> tuple[jax.Array, jax.Array]:
        return jnp.swapaxes(k, 1, 2)[None], jnp.swapaxes(v, 1, 2)[None]

    fine, coarse = compress(k, SPARSE)
    assert coarse is not None
    return SparseKVCache(*slots(), None, fine[None], coarse[None], SPARSE), KVCache(*slots())


def times(attend: Attend, cache: Cache, args: tuple[jax.Array, ...], starts: Sequence[int], size: int) -> np.ndarray:
    """Returns the seconds of reading `size` tokens at each position, after one call that is not counted."""
    program = jax.jit(attend, donate_argnames="cache")
    seconds = []
    for start in (starts[0], *starts):
        new = [x[:, start : start + size] for x in args]
        jax.block_until_ready((new, cache))
        begin = time.perf_counter()
        out, cache = program(*new, jnp.int32(start), cache)
        jax.block_until_ready((out, cache))
        seconds.append(time.perf_counter() - begin)
    return np.array(seconds[1:])


def inputs(layer: str, length: int) -> tuple[jax.Array, ...]:
    """Queries, keys and values of a layer, [1, S, heads, H]."""
    num_heads, num_kv_heads, width = LAYERS[layer]
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return tuple(drifting(key, length, n, width) for key, n in zip(keys, heads, strict=True))


def measure_prefill(layer: str, length: int) -> dict[str, float]:
    """Returns the seconds of a whole prompt: "shared" (reads), "each" (query reads its own blocks), "dense"."""
    args = inputs(layer, length)
    chunks = length // CHUNK
    timed = min(MOST_CHUNKS, chunks)
    starts = [CHUNK * int((i + 0.5) * chunks / timed) for i in range(timed)]
    of_sides = {}
    # Three caches: each call reuses the buffers of its own.
    of_sides["shared"] = times(sparse, full_caches(*args[1:])[0], args, starts, CHUNK)
    with mock.patch.object(sparse_cache, "SHARING_QUERIES", CHUNK + 1):
        each = functools.partial(sparse)  # a function of its own: jit would take what it has compiled
        of_sides["each"] = times(each, full_caches(*args[1:])[0], args, starts, CHUNK)
    of_sides["dense"] = times(dense, full_caches(*args[1:])[1], args, starts, CHUNK)
    return {side: float(seconds.mean()) * chunks for side, seconds in of_sides.items()}


def measure_decode(layer: str, length: int) -> dict[str, float]:
    """Returns the median seconds of a token at the end of a full cache: "sparse" and "dense"."""
    args = inputs(layer, length)
    starts = [length - 1] * DECODE_REPEATS
    sparse_one, dense_one = full_caches(*args[1:])
    of_sides = {"sparse": times(sparse, sparse_one, args, starts, 1), "dense": times(dense, dense_one, args, starts, 1)}
    return {side: float(np.median(seconds)) for side, seconds in of_sides.items()}


def report(cases: dict[tuple[str, str, int], dict[str, float]], directory: Path) -> None:
    """Writes `sparse_cache.json`."""
    bench = Benchmark("sparse_cache")
    for (which, layer, length), case in sorted(cases.items(), key=lambda item: (item[0][0] == "decode", item[0])):
        name = f"{layer}, {length // 1024}K"
        if which == "decode":
            bench.add(
                f"{name} in the cache: a token",
                "ms",
                1e3 * case["sparse"],
                larger_is_better=False,
                baseline_name="our dense",
                baseline=1e3 * case["dense"],
                goal=DECODE_GOALS.get((layer, length)),
            )
            continue
        for side, baseline in (("our dense", "dense"), ("each query reads its own blocks", "each")):
            bench.add(
                f"{name}: reading a prompt",
                "s",
                case["shared"],
                larger_is_better=False,
                baseline_name=side,
                baseline=case[baseline],
            )
    bench.write(directory)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures what is not measured yet and writes `results/sparse_cache.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the cases that are done")
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(PREFILL_LENGTHS), help="of prompts")
    parser.add_argument("--directory", type=Path, default=RESULTS_DIR, help="where the results go")
    args = parser.parse_args(argv)
    prefills = [("prefill", layer, length) for layer in args.layers for length in args.lengths]
    decodes = [("decode", layer, length) for layer, length in DECODE_CASES if layer in args.layers]
    for which, layer, length in (*prefills, *decodes):
        path = args.work / f"{which}-{layer}-{length}.json"
        if not path.exists():
            args.work.mkdir(parents=True, exist_ok=True)
            write_json(path, (measure_prefill if which == "prefill" else measure_decode)(layer, length))
    cases = {}
    for path in args.work.glob("*.json"):
        which, layer, length = path.stem.split("-")
        cases[which, layer, int(length)] = json.loads(path.read_text("utf-8"))
    report(cases, args.directory)


if __name__ == "__main__":
    main()
