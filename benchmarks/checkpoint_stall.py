"""What a checkpoint costs the training loop: saved in the background, and saved while the loop waits.

    python -m benchmarks.checkpoint_stall

Stretches of training steps are timed in turn with no save, with one in the background and with one that the loop waits
for, on a model of 8M parameters with its optimizer state. Two things are told apart: for how long `save` keeps the
loop from its next step, and by how much the whole stretch is longer (on a CPU, hashing and writing take cores from the
steps; on an accelerator they do not).
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.results import Benchmark
from cpm_jax.checkpoints.manager import CheckpointConfig, Checkpointer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import Phase, ScheduleConfig
from cpm_jax.training.train_state import TrainState, init_state
from cpm_jax.training.train_step import make_train_step

MODEL = ModelConfig(vocab_size=8192, num_layers=8, d_model=384, num_heads=6, num_kv_heads=2, d_ff=1024, dtype="float32")
REPEATS, STEPS, ROWS, SEQ_LEN = 5, 16, 1, 64
MODES = ("none", "background", "waiting")


def main(repeats: int = REPEATS) -> None:
    """Runs the benchmark and writes results/checkpoint_stall.json."""
    schedule = ScheduleConfig((Phase(10, 1e-3, "linear"),))
    optimizer = make_optimizer(OptimizerConfig(), schedule, MODEL)
    state = init_state(MODEL, optimizer, jax.random.key(0))
    step = make_train_step(MODEL, optimizer)
    rows = np.random.default_rng(0).integers(0, MODEL.vocab_size, (ROWS, SEQ_LEN + 1), dtype=np.int32)
    batch = {
        "tokens": rows[:, :-1],
        "targets": rows[:, 1:],
        "loss_weights": np.ones((ROWS, SEQ_LEN), np.float32),
        "segment_ids": np.ones((ROWS, SEQ_LEN), np.int32),
        "positions": np.tile(np.arange(SEQ_LEN, dtype=np.int32), (ROWS, 1)),
        "source_ids": np.zeros(ROWS, np.int32),
    }

    def stretch(state: TrainState, checkpointer: Checkpointer | None, number: int) -> tuple[TrainState, float, float]:
        """Takes STEPS steps, with a save after the second; returns the state, all seconds and those within `save`."""
        blocked, start = 0.0, time.perf_counter()
        for i in range(STEPS):
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            if i == 1 and checkpointer is not None:
                begin = time.perf_counter()
                checkpointer.save(number, state, {"step": number})
                blocked = time.perf_counter() - begin
        return state, time.perf_counter() - start, blocked

    state, _, _ = stretch(state, None, 0)  # compiles
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    blocked: dict[str, list[float]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        savers = {
            mode: Checkpointer(Path(folder) / mode, CheckpointConfig(keep_last=1, asynchronous=mode == "background"))
            for mode in MODES[1:]
        }
        for number in range(repeats + 1):
            for mode in MODES:
                state, whole, save = stretch(state, savers.get(mode), number)
                if mode in savers:
                    savers[mode].wait()
                if number:  # the first makes the folders and the threads
                    seconds[mode].append(whole)
                    blocked[mode].append(save)
        size = sum(path.stat().st_size for path in (Path(folder) / "waiting").rglob("*") if path.is_file())
        for saver in savers.values():
            saver.close()

    benchmark = Benchmark("checkpoint_stall")
    benchmark.add("checkpoint", "MB", size / 1e6, larger_is_better=False)
    benchmark.add(
        "loop kept from its next step per save",
        "s",
        statistics.median(blocked["background"]),
        larger_is_better=False,
        baseline_name="a save that is waited for",
        baseline=statistics.median(blocked["waiting"]),
    )
    extra = {
        mode: max(statistics.median(a - b for a, b in zip(seconds[mode], seconds["none"], strict=True)), 0.0)
        for mode in MODES[1:]
    }
    benchmark.add(
        "all time lost per save, with steps slowed by writing",
        "s",
        extra["background"],
        larger_is_better=False,
        baseline_name="a save that is waited for",
        baseline=extra["waiting"],
    )
    benchmark.write()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
