"""What int8 and int4 caches and int8 weights cost and gain: SmolLM2-135M-Instruct beside float32 and bfloat16.

    python -m benchmarks.quantized_inference --work DIR

Errors: all variants read the same rows of books through their caches, chunk by chunk in turn, and their logits are
compared with those of float32 at every position. Agreement: greedy tokens before the first that differs. Speed: the
variants take turns in one process; the first turn, which compiles, does not count.

Keys of 4 bits are also read by two other rules: with a scale for each token and head, as values are, and the same after
a rotation of each head by a Hadamard matrix (QuaRot, arXiv 2404.00456). Values are quantised equally in all three.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Int

from benchmarks.pretrained import smollm2_path
from benchmarks.results import RESULTS_DIR, Benchmark
from benchmarks.sparse_quality_texts import Excerpt, make_rows
from cpm_jax.common.progress import Progress
from cpm_jax.inference.decode_loop import NO_TOKEN, extend, start
from cpm_jax.inference.generate import decoding_params, unstack_on_cpu
from cpm_jax.inference.load import LoadedModel, load_model
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling import decoder
from cpm_jax.modeling.absmax import quantize_absmax
from cpm_jax.modeling.config import DType, ModelConfig
from cpm_jax.modeling.decoder import Params, bind
from cpm_jax.modeling.int8 import WeightDType, quantize_layers
from cpm_jax.modeling.kv_cache import Cache, CacheDType, attend_to_cache, init_cache

GREEDY = SamplingConfig(temperature=0.0)
CHUNK = 256  # tokens that are read at once
BASE = "float32"


class Variant(NamedTuple):
    """What is held in which type; `keys` is the rule of 4-bit keys where it is not the cache's own."""

    dtype: DType = "float32"
    weight_dtype: WeightDType = ""
    cache_dtype: CacheDType = ""
    keys: str = ""


VARIANTS = {
    BASE: Variant(),
    "bfloat16": Variant("bfloat16"),
    "int8 weights": Variant(weight_dtype="int8"),
    "int8 cache": Variant(cache_dtype="int8"),
    "int4 cache": Variant(cache_dtype="int4"),
    "int8 weights and cache": Variant(weight_dtype="int8", cache_dtype="int8"),
}
# Only read, not decoded.
OTHER_KEYS = {
    "int4 cache, keys by token": Variant(keys="by token"),
    "int4 cache, keys by token, rotated": Variant(keys="rotated"),
}


class Model(NamedTuple):
    """A variant, ready to run.

    Attributes:
        config: in the variant's compute dtype.
        params: cast to that type, or in int8.
        variant: what it is.
    """

    config: ModelConfig
    params: Params
    variant: Variant

    @property
    def weight_bytes(self) -> int:
        """Of all parameters."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))

    def cache_bytes(self, batch_size: int, length: int) -> int:
        """Of a cache."""
        cache = jax.eval_shape(lambda: init_cache(self.config, batch_size, length, self.variant.cache_dtype))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def prepare(published: LoadedModel, variants: Mapping[str, Variant]) -> dict[str, Model]:
    """The models; those that differ in the cache alone share their parameters."""

    @functools.cache
    def parameters(dtype: DType, weight_dtype: WeightDType) -> tuple[ModelConfig, Params]:
        config = dataclasses.replace(published.config, dtype=dtype)
        params = quantize_layers(config, published.params) if weight_dtype else published.params
        return config, decoding_params(config, params)

    return {name: Model(*parameters(v.dtype, v.weight_dtype), v) for name, v in variants.items()}


def unstack(models: Mapping[str, Model]) -> dict[str, Model]:
    """The models with their parameters as `generate` decodes with them; still shared by those that share them."""
    shared = {id(model.params): model.params for model in models.values()}
    made = {place: unstack_on_cpu(params) for place, params in shared.items()}
    return {name: model._replace(params=made[id(model.params)]) for name, model in models.items()}


def by_token(x: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
    """Rounds to codes of 4 bits with a scale for each token and head, and back."""
    codes, scales = quantize_absmax(x, 4, axis=-1)
    return (codes.astype(jnp.float32) * scales[..., None].astype(jnp.float32)).astype(x.dtype)


def rotated_by_token(x: Float[Array, "B T K H"]) -> Float[Array, "B T K H"]:
    """The same to the channels of each head after a rotation, which is undone."""
    rotation = scipy.linalg.hadamard(x.shape[-1]) / x.shape[-1] ** 0.5  # symmetric: its own inverse
    return by_token(x @ rotation.astype(x.dtype)) @ rotation.astype(x.dtype)


def _attend(keys: Callable[[Array], Array], q: Array, k: Array, v: Array, *rest: Any) -> tuple[Array, Cache]:
    return attend_to_cache(q, keys(k), by_token(v), *rest)


@functools.partial(jax.jit, static_argnames=("config", "keys"), donate_argnames="cache")
def read(
    params: Params, tokens: Int[Array, " T"], first: Int[Array, ""], cache: Cache, *, config: ModelConfig, keys: str
) -> tuple[Float[Array, "T V"], Cache]:
    """Logits after each token of a chunk, and the cache with it; `keys` is the rule of another cache's keys."""
    attend = {
        "": attend_to_cache,
        "by token": functools.partial(_attend, by_token),
        "rotated": functools.partial(_attend, rotated_by_token),
    }
    with mock.patch.object(decoder, "attend_to_cache", attend[keys]):
        model = bind(config, params)
        hidden, cache = model.decode(tokens[None], first + jnp.arange(len(tokens))[None], cache)
        return model.logits(hidden)[0], cache


@jax.jit
def compare(
    logits: Float[Array, "T V"], base: Float[Array, "T V"], targets: Int[Array, " T"]
) -> dict[str, Float[Array, " T"]]:
    """For each position: nats of the target, KL from the base's distribution, and errors of the logits."""
    log_probs, base_log_probs = jax.nn.log_softmax(logits), jax.nn.log_softmax(base)
    return {
        "nats": -jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0],
        "kl": jnp.sum(jnp.exp(base_log_probs) * (base_log_probs - log_probs), axis=1),
        "squared_error": jnp.mean((logits - base) ** 2, axis=1),
        "largest_error": jnp.max(jnp.abs(logits - base), axis=1),
        "same_top": (logits.argmax(1) == base.argmax(1)).astype(jnp.float32),
    }


def read_rows(
    models: Mapping[str, Model], rows: Sequence[Int[np.ndarray, " T+1"]]
) -> dict[str, dict[str, Float[np.ndarray, "rows T"]]]:
    """What `compare` says of each model at every position of rows, whose length is a multiple of `CHUNK` and one."""
    found: dict[str, list[list[dict[str, np.ndarray]]]] = {name: [] for name in models}
    chunk_count = len(rows) * ((len(rows[0]) - 1) // CHUNK)
    with Progress("read", chunk_count, unit="chunk", tokens_per_step=CHUNK * len(models)) as bar:
        for i, row in enumerate(rows):
            length = len(row) - 1
            caches = {name: init_cache(m.config, 1, length, m.variant.cache_dtype) for name, m in models.items()}
            for chunks in found.values():
                chunks.append([])
            for first in range(0, length, CHUNK):
                targets = row[first + 1 : first + CHUNK + 1]
                base = None
                for name, model in models.items():  # the base is the first
                    logits, caches[name] = read(
                        model.params,
                        row[first : first + CHUNK],
                        np.int32(first),
                        caches[name],
                        config=model.config,
                        keys=model.variant.keys,
                    )
                    base = logits if base is None else base
                    found[name][-1].append(jax.tree.map(np.asarray, compare(logits, base, targets)))
                bar.update((i * length + first) // CHUNK + 1)
    return {
        name: {
            key: np.stack([np.concatenate([chunk[key] for chunk in chunks]) for chunks in by_row])
            for key in by_row[0][0]
        }
        for name, by_row in found.items()
    }


def decode_in_turns(
    models: Mapping[str, Model], prompts: Sequence[Sequence[int]], new_tokens: int, turns: int
) -> dict[str, tuple[Int[np.ndarray, "B new"], float]]:
    """Greedy tokens of each model, and tokens a second over all sequences: the median of the turns after the first.

    Args:
        models: that take turns, from `unstack`.
        prompts: token ids.
        new_tokens: of each sequence and turn.
        turns: two or more.
    """
    states = {
        name: start(
            model.params,
            prompts,
            config=model.config,
            sampling=GREEDY,
            max_new_tokens=new_tokens * turns,
            seed=0,
            indices=range(len(prompts)),
            cache_dtype=model.variant.cache_dtype,
        )
        for name, model in models.items()
    }
    tokens: dict[str, list[np.ndarray]] = {name: [] for name in models}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    no_end = np.array([NO_TOKEN])
    with Progress("decode", turns * len(models), unit="turn") as bar:
        for turn in range(turns):
            for i, (name, model) in enumerate(models.items()):
                jax.block_until_ready(states[name])
                begin = time.perf_counter()
                states[name], new = extend(
                    model.params, states[name], no_end, num_tokens=new_tokens, config=model.config, sampling=GREEDY
                )
                tokens[name].append(np.asarray(new))
                seconds[name].append(time.perf_counter() - begin)
                bar.update(turn * len(models) + i + 1)
    return {
        name: (
            np.concatenate(tokens[name], axis=1),
            len(prompts) * new_tokens / statistics.median(seconds[name][1:]),
        )
        for name in models
    }


def agreement(tokens: Int[np.ndarray, "B T"], base: Int[np.ndarray, "B T"]) -> float:
    """Tokens before the first that differs, the mean over sequences."""
    same = np.cumprod(tokens == base, axis=1)
    return float(same.sum(axis=1).mean())


def add_errors(
    bench: Benchmark, errors: Mapping[str, Mapping[str, np.ndarray]], excerpts: Sequence[Excerpt], length: int
) -> None:
    """Bits per byte, KL and errors of logits."""
    num_bytes = sum(excerpt.num_bytes(0, length) for excerpt in excerpts)
    where = f"{len(excerpts)} rows of {length:,} tokens"

    def bits_per_byte(name: str) -> float:
        return float(errors[name]["nats"].sum(dtype=np.float64)) / np.log(2) / num_bytes

    for name, found in errors.items():
        if name == BASE:
            continue
        bench.add(
            f"bits per byte, {name}, {where}",
            "bits",
            bits_per_byte(name),
            larger_is_better=False,
            baseline_name=BASE,
            baseline=bits_per_byte(BASE),
        )
        by_row = found["kl"].mean(axis=1)
        error = float(np.std(by_row, ddof=1)) / len(by_row) ** 0.5 if len(by_row) > 1 else 0.0
        figures = (
            (f"KL from {BASE}, {name}: ± {error:.2g} over {len(by_row)} rows", "nats/token", by_row.mean()),
            (f"error of logits, {name}: root mean square", "nats", found["squared_error"].mean() ** 0.5),
            (f"error of logits, {name}: largest", "nats", found["largest_error"].max()),
            (f"another most probable token, {name}", "%", 100 * (1 - found["same_top"].mean())),
        )
        for metric, unit, value in figures:
            bench.add(metric, unit, max(float(value), 0.0), larger_is_better=False)


def add_bytes(bench: Benchmark, models: Mapping[str, Model], batch_size: int, length: int) -> None:
    """Bytes of weights and caches, where they differ from the base's."""
    for name, model in models.items():
        sizes = {
            "weights": (model.weight_bytes, models[BASE].weight_bytes),
            f"cache of {batch_size} sequences of {length:,} tokens": (
                model.cache_bytes(batch_size, length),
                models[BASE].cache_bytes(batch_size, length),
            ),
        }
        for what, (ours, base) in sizes.items():
            if ours != base:
                bench.add(
                    f"{what}, {name}",
                    "MiB",
                    ours / 2**20,
                    larger_is_better=False,
                    baseline_name=BASE,
                    baseline=base / 2**20,
                )


def add_decoding(bench: Benchmark, models: Mapping[str, Model], prompts: Sequence[Sequence[int]], new: int) -> None:
    """Speed of decoding, and how long greedy tokens stay the same."""
    turns = 4
    decoded = decode_in_turns(models, prompts, new // turns, turns)
    case = f"{len(prompts)} sequences after {len(prompts[0]):,} tokens"
    for name in models:
        if name == BASE:
            continue
        bench.add(
            f"decoding, {case}, {name}",
            "tokens/s",
            decoded[name][1],
            larger_is_better=True,
            baseline_name=BASE,
            baseline=decoded[BASE][1],
        )
        bench.add(
            f"greedy tokens before the first that differs, {case}, {name}",
            f"of {new}",
            agreement(decoded[name][0], decoded[BASE][0]),
            larger_is_better=True,
        )


def main(argv: Sequence[str] | None = None, directory: Path = RESULTS_DIR) -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--rows", type=int, default=9, help="that are read, of 9 excerpts from 3 kinds of text")
    parser.add_argument("--length", type=int, default=1024, help=f"tokens of a row, a multiple of {CHUNK}")
    parser.add_argument("--new_tokens", type=int, default=256, help="that are decoded, a multiple of 4")
    parser.add_argument("--context", type=int, default=1536, help="tokens of the long prompts")
    args = parser.parse_args(argv)
    if args.length % CHUNK or args.new_tokens % 4:
        parser.error(f"--length must be a multiple of {CHUNK}, and --new_tokens of 4")
    published = load_model(smollm2_path())
    # In turn from each kind of text, so that any number of rows is of all.
    excerpts = sorted(make_rows(args.work, published.tokenizer).excerpts, key=lambda excerpt: excerpt.number)
    command = f"python -m benchmarks.quantized_inference --work DIR --rows {args.rows} --length {args.length}"
    bench = Benchmark("quantized_inference", f"{command} --new_tokens {args.new_tokens} --context {args.context}")
    models = prepare(published, VARIANTS | OTHER_KEYS)
    rows = [excerpt.tokens[: args.length + 1] for excerpt in excerpts[: args.rows]]
    add_errors(bench, read_rows(models, rows), excerpts[: args.rows], args.length)
    models = unstack({name: models[name] for name in VARIANTS})
    prompts = [excerpt.tokens[: args.context].tolist() for excerpt in excerpts]
    add_bytes(bench, models, 4, 2048)
    for chosen in ([prompts[0][:64]], [prompt[:64] for prompt in prompts[:8]], prompts[:4]):
        # Programs of 30 layers one by one map much memory, of which a process may have 65,530 pieces.
        jax.clear_caches()
        add_decoding(bench, models, chosen, args.new_tokens)
    bench.write(directory)


if __name__ == "__main__":
    main()
