"""Do annealings of several candidates pay as one program? Steps of N trainings one after another, and as one `vmap`.

`python -m benchmarks.batched_cells [--trials N]`: the models of the two CPU studies of verification, the training step
of the verb, each training with its own parameters and batch. Both ways alternate, so that other load meets both. The
processors' time is given too: on a machine that others use it says more than the clock.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results import Benchmark
from benchmarks.verification_trust_study import small_model
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import init_params
from cpm_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import wsd
from cpm_jax.training.train_state import TrainState, state_from_params
from cpm_jax.training.train_step import make_train_step

CELLS, STEPS = 4, 2
# Name, model, tokens of a row and rows of a step: that of papers/minicpm4/verification_trust.gin, and a larger one.
CASES = (
    ("0.23M parameters", small_model(2048, 2, 64, 2, 128), 128, 10),
    ("0.85M parameters", small_model(2048, 3, 128, 2, 128), 128, 20),
)


def make_batches(model: ModelConfig, seq_len: int, rows: int) -> dict[str, jax.Array]:
    """A batch for each training: full rows of random tokens, [N, B, T]."""
    tokens = np.random.default_rng(0).integers(model.vocab_size, size=(CELLS, rows, seq_len + 1), dtype=np.int32)
    shape = (CELLS, rows, seq_len)
    return {
        "tokens": jnp.asarray(tokens[..., :-1]),
        "targets": jnp.asarray(tokens[..., 1:]),
        "loss_weights": jnp.ones(shape, jnp.float32),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(seq_len, dtype=jnp.int32), shape),
        "source_ids": jnp.zeros(shape[:2], jnp.int32),
    }


def start(model: ModelConfig, optimizer: Optimizer, seed: int) -> TrainState:
    """A training that has not begun."""
    return state_from_params(init_params(model, jax.random.key(seed)), optimizer)


def timed(run: Callable[[], Any]) -> np.ndarray:
    """Seconds of the clock and of the processors."""
    begin = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return np.array([time.perf_counter() - begin[0], time.process_time() - begin[1]])


def measure(bench: Benchmark, name: str, model: ModelConfig, seq_len: int, rows: int, trials: int) -> None:
    """Adds how many tokens a second both ways train on."""
    optimizer = make_optimizer(OptimizerConfig(), wsd(0.01, 10_000, 10, 10), model)
    step = make_train_step(model, optimizer)
    together = jax.jit(jax.vmap(step), donate_argnums=0)
    batches = make_batches(model, seq_len, rows)
    each = [{key: value[i] for key, value in batches.items()} for i in range(CELLS)]
    states = [start(model, optimizer, seed) for seed in range(CELLS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def one_after_another() -> Any:
        losses = [jnp.zeros(())] * CELLS
        for i in range(CELLS):
            for _ in range(STEPS):
                states[i], metrics = step(states[i], each[i])
            losses[i] = metrics["loss"]
        return jnp.stack(losses)

    def as_one() -> Any:
        nonlocal stacked
        for _ in range(STEPS):
            stacked, metrics = together(stacked, batches)
        return metrics["loss"]

    # Compiles both; they are the same trainings, so that it is the same work.
    np.testing.assert_allclose(one_after_another(), as_one(), rtol=1e-3)
    seconds = np.array([[timed(one_after_another), timed(as_one)] for _ in range(trials)])
    apart, joined = np.median(seconds, axis=0)
    tokens = CELLS * STEPS * rows * seq_len
    for clock, what in enumerate(("tokens/s", "tokens/s of processor time")):
        bench.add(
            f"{name}: {CELLS} trainings as one program",
            what,
            tokens / joined[clock],
            larger_is_better=True,
            baseline_name="one after another",
            baseline=tokens / apart[clock],
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures both models and writes `results/batched_cells.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=9)
    args = parser.parse_args(argv)
    bench = Benchmark("batched_cells", f"python -m benchmarks.batched_cells --trials {args.trials}")
    for case in CASES:
        measure(bench, *case, args.trials)
    bench.write()


if __name__ == "__main__":
    main()
