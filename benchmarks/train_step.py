"""A training step beside PyTorch, eager and compiled: the same model, batch, optimizer and threads, in float32.

    python -m benchmarks.train_step [--sizes 15m] [--lengths 512 2048] [--repeats 9] [--threads 2]

Each side lives in a process of its own, bound to the same cores, and the sides take their steps in turn, so that a busy
machine slows all alike; the table has medians. Before anything is timed, the loss of two steps and the gradient of the
first (as it stands, clipped, in the optimizer's first moment) must be equal. A step is all of it: forward, backward,
clipping, AdamW; ours counts and measures besides what `make_train_step` reports. Peak memory is that of the timed
steps, less what the process held before it made the model.

Then what it takes to compile a step of 32 layers, scanned and unrolled.
"""

import argparse
import contextlib
import dataclasses
import gc
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.results import Benchmark
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.optimizer import OptimizerConfig

_15M = ModelConfig(  # arch/minicpm4.gin with size/15m.gin: 18.2M parameters with its embedding
    vocab_size=8192,
    num_layers=7,
    d_model=384,
    num_heads=6,
    num_kv_heads=2,
    d_ff=1536,
    rms_norm_eps=1e-6,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=256,
    initializer_range=0.1,
    tie_word_embeddings=True,
    dtype="float32",
    scan_layers=False,
)
MODELS = {
    "15m": _15M,
    # size/36m.gin with the vocabulary of the small models: 40.3M parameters.
    "36m": dataclasses.replace(_15M, num_layers=10, d_model=512, num_heads=8, d_ff=1920),
}
TOKENS = 4096  # a step
# Ours takes a step's rows in two parts: half the temporaries, whose pages XLA takes anew each step (docs/speed.md).
# PyTorch, which keeps its memory, gains nothing by it.
NUM_MICROBATCHES = 2
COMPILED_LAYERS = 32  # MiniCPM4-8B's
LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0
OPTIMIZER = OptimizerConfig(max_grad_norm=MAX_GRAD_NORM)
GOALS = {"eager": 1.3, "compiled": 1.0}
SIDES = ("ours", *GOALS)


class Side(Protocol):
    """One implementation of the training step, with its state."""

    def step(self) -> float:
        """Takes one step, waits for it and returns its loss."""

    def first_moment(self) -> dict[str, np.ndarray]:
        """Adam's first moment by path of the parameter: after one step (1 - b1) times the clipped gradient."""


class OurSide:
    """`cpm_jax.training.train_step`."""

    def __init__(self, config: ModelConfig, params: dict[str, np.ndarray], rows: np.ndarray):
        import jax
        import jax.numpy as jnp
        from flax import traverse_util

        from cpm_jax.training.optimizer import make_optimizer
        from cpm_jax.training.schedules import Phase, ScheduleConfig
        from cpm_jax.training.train_state import state_from_params
        from cpm_jax.training.train_step import make_train_step

        optimizer = make_optimizer(OPTIMIZER, ScheduleConfig((Phase(1, LEARNING_RATE),)), config)
        tree = traverse_util.unflatten_dict({path: jnp.array(x) for path, x in params.items()}, sep="/")
        self._state = state_from_params(tree, optimizer)
        self._batch = jax.device_put(full_batch(rows))
        self._step = make_train_step(config, optimizer, num_microbatches=NUM_MICROBATCHES)
        self._flatten = lambda tree: {
            path: np.asarray(x) for path, x in traverse_util.flatten_dict(tree, sep="/").items()
        }

    def step(self) -> float:
        """See `Side`."""
        self._state, metrics = self._step(self._state, self._batch)
        return float(metrics["loss"])

    def first_moment(self) -> dict[str, np.ndarray]:
        """See `Side`."""
        import optax

        return self._flatten(optax.tree.get(self._state.opt_state, "mu"))


class TorchSide:
    """`benchmarks.torch_decoder`, eager or compiled."""

    def __init__(self, config: ModelConfig, params: dict[str, np.ndarray], rows: np.ndarray, *, compiled: bool):
        import torch

        from benchmarks.torch_decoder import TorchDecoder, make_adamw

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model = TorchDecoder(config, rows.shape[1] - 1)
        self._model.load(params)
        self._optimizer = make_adamw(self._model, OPTIMIZER, LEARNING_RATE)
        self._loss = torch.compile(self._model) if compiled else self._model
        self._inputs = [torch.tensor(x, dtype=torch.long) for x in (rows[:, :-1], rows[:, 1:])]
        self._clip = torch.nn.utils.clip_grad_norm_

    def step(self) -> float:
        """See `Side`."""
        self._optimizer.zero_grad()
        loss = self._loss(*self._inputs)
        loss.backward()
        self._clip(self._model.parameters(), MAX_GRAD_NORM)
        self._optimizer.step()
        return loss.item()

    def first_moment(self) -> dict[str, np.ndarray]:
        """See `Side`."""
        return self._model.export({p: self._optimizer.state[p]["exp_avg"] for p in self._model.parameters()})


def make_side(name: str, config: ModelConfig, params: dict[str, np.ndarray], rows: np.ndarray) -> Side:
    """The side of a name in SIDES."""
    if name == "ours":
        return OurSide(config, params, rows)
    return TorchSide(config, params, rows, compiled=name == "compiled")


def full_batch(rows: np.ndarray) -> dict[str, np.ndarray]:
    """A batch as in docs/architecture.md from rows of T + 1 tokens, each one document."""
    tokens, ones = rows[:, :-1], np.ones((len(rows), rows.shape[1] - 1), np.int32)
    return {
        "tokens": tokens,
        "targets": rows[:, 1:],
        "loss_weights": ones.astype(np.float32),
        "segment_ids": ones,
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
        "source_ids": np.zeros(len(rows), np.int32),
    }


def memory_mib(field: str) -> float:
    """This process's memory now (VmRSS) or at most since `forget_peak` (VmHWM)."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def forget_peak() -> None:
    """Lets the peak of this process's memory start from what it holds now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def serve(connection: Connection, name: str, config: ModelConfig, folder: Path, threads: int) -> None:
    """Runs in a worker process: checks itself in with its first steps, then takes a step whenever asked.

    Sends the two losses, the seconds of the first step (compilation included) and a file of first moments; then for
    each "step" its seconds, and for "peak" the MiB that the steps took.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    if name == "ours":
        import jax

        jax.devices()
    else:
        import torch._inductor  # noqa: F401  the compiler's own modules are not the model's memory
    before = memory_mib("VmRSS")
    with np.load(folder / "params.npz") as saved, np.load(folder / "rows.npz") as rows:
        side = make_side(name, config, dict(saved), rows["rows"])
    begin = time.perf_counter()
    losses = [side.step()]
    compile_seconds = time.perf_counter() - begin
    np.savez(folder / f"{name}.npz", **side.first_moment())  # type: ignore[arg-type]
    losses.append(side.step())
    forget_peak()
    connection.send((losses, compile_seconds))
    while (request := connection.recv()) != "stop":
        if request == "peak":
            connection.send(memory_mib("VmHWM") - before)
            continue
        begin = time.perf_counter()
        side.step()
        connection.send(time.perf_counter() - begin)


@contextlib.contextmanager
def worker(target: Any, *args: Any) -> Iterator[Connection]:
    """A fresh process that runs `target(connection, *args)`; gives this end of the connection."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(there, *args))
    process.start()
    there.close()  # so that a dead worker ends the wait for it
    try:
        yield here
        here.send("stop")
        process.join()
    finally:
        process.kill()
        process.join()


def check_equal(losses: dict[str, list[float]], folder: Path) -> None:
    """Compares the losses of two steps, and the first moments that workers wrote.

    Raises:
        ValueError: if they differ by more than float32 sums in another order do.
    """
    with np.load(folder / "ours.npz") as ours:
        mine = dict(ours)
    for name in SIDES[1:]:
        np.testing.assert_allclose(losses["ours"], losses[name], rtol=1e-5, err_msg=f"losses of {name}")
        with np.load(folder / f"{name}.npz") as theirs:
            if set(mine) != set(theirs):
                raise ValueError(f"{name} has other parameters: {set(mine) ^ set(theirs)}")
            for path, x in mine.items():
                error = np.linalg.norm(x - theirs[path]) / np.linalg.norm(theirs[path])
                if not error < 1e-4:
                    raise ValueError(f"the gradient of {path} differs by {error:.1e} from that of {name}")


def compare(
    bench: Benchmark, case: str, config: ModelConfig, length: int, *, tokens: int, repeats: int, threads: int
) -> None:
    """Times the sides in turn and adds their rows.

    Args:
        bench: takes the rows.
        case: what to call the model.
        config: the model.
        length: T.
        tokens: B·T.
        repeats: timed steps of each side.
        threads: cores of each process.

    Raises:
        ValueError: if the sides do not compute the same.
    """
    import jax
    from flax import traverse_util

    from cpm_jax.modeling.decoder import init_params

    params = traverse_util.flatten_dict(init_params(config, jax.random.key(0)), sep="/")
    rows = np.random.default_rng(0).integers(0, config.vocab_size, (tokens // length, length + 1), dtype=np.int32)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        np.savez(folder / "params.npz", **params)
        np.savez(folder / "rows.npz", rows=rows)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        sides = {side: stack.enter_context(worker(serve, side, config, folder, threads)) for side in SIDES}
        started = {side: connection.recv() for side, connection in sides.items()}
        check_equal({side: losses for side, (losses, _) in started.items()}, folder)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(repeats):
            for side, connection in sides.items():
                connection.send("step")
                seconds[side].append(connection.recv())
        peaks = {}
        for side, connection in sides.items():
            connection.send("peak")
            peaks[side] = connection.recv()
    title = f"{case}, {tokens // length}x{length} tokens"
    medians = {side: statistics.median(times) for side, times in seconds.items()}
    spread = ", ".join(f"{side} {min(times):.2f}-{max(times):.2f}" for side, times in seconds.items())
    print(f"{title}: seconds a step {spread}; first step { ({s: round(t, 1) for s, (_, t) in started.items()}) }")
    for side, goal in GOALS.items():
        bench.add(
            title,
            "tokens/s",
            tokens / medians["ours"],
            larger_is_better=True,
            baseline_name=f"PyTorch, {side}",
            baseline=tokens / medians[side],
            goal=goal,
        )
    for side in GOALS:
        bench.add(
            f"{title}: peak memory",
            "MiB",
            peaks["ours"],
            larger_is_better=False,
            baseline_name=f"PyTorch, {side}",
            baseline=peaks[side],
        )


def compile_step(connection: Connection, config: ModelConfig, rows: np.ndarray) -> None:
    """Runs in a worker process: sends the seconds and the MiB that tracing and compiling the training step take."""
    import jax

    from cpm_jax.training.optimizer import make_optimizer
    from cpm_jax.training.schedules import Phase, ScheduleConfig
    from cpm_jax.training.train_state import abstract_state
    from cpm_jax.training.train_step import make_train_step

    jax.devices()
    optimizer = make_optimizer(OPTIMIZER, ScheduleConfig((Phase(1, LEARNING_RATE),)), config)
    state = abstract_state(config, optimizer)
    before = memory_mib("VmRSS")
    forget_peak()
    begin = time.perf_counter()
    make_train_step(config, optimizer).lower(state, full_batch(rows)).compile()  # type: ignore[attr-defined]
    connection.send((time.perf_counter() - begin, memory_mib("VmHWM") - before))
    connection.recv()


def compare_compilation(bench: Benchmark, config: ModelConfig, length: int, tokens: int) -> None:
    """Compiles the step of a deep model with and without a scan over layers and adds the rows."""
    rows, figures = np.zeros((tokens // length, length + 1), np.int32), {}
    for scan in (True, False):
        deep = dataclasses.replace(config, num_layers=COMPILED_LAYERS, scan_layers=scan)
        with worker(compile_step, deep, rows) as connection:
            figures[scan] = connection.recv()
    for unit, ours, baseline in zip(("s", "MiB"), figures[True], figures[False], strict=True):
        bench.add(
            f"compiling the step of {COMPILED_LAYERS} layers, scanned",
            unit,
            ours,
            larger_is_better=False,
            baseline_name="unrolled",
            baseline=baseline,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes `results/train_step.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=["15m"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(argv)
    bench = Benchmark("train_step")
    for size in args.sizes:
        for length in args.lengths:
            compare(bench, size, MODELS[size], length, tokens=TOKENS, repeats=args.repeats, threads=args.threads)
            bench.write()  # a run that is cut short keeps what it has
    compare_compilation(bench, MODELS["15m"], length=512, tokens=TOKENS)
    bench.write()


if __name__ == "__main__":
    main()
