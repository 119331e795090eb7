"""Does the best learning rate stay as models widen and deepen? Loss over learning rate, under µP and without.

`python -m benchmarks.mup_transfer [--size half_hour | full]`: Python's standard library as bytes, files held out by
name; MiniCPM4's multipliers, WSD. All learning rates of a width, depth and seed train as one program, in a process on a
core of its own; each such cell stays in `--cells`, and a second call goes on. Writes `results/mup_transfer.json` and
`docs/images/mup_transfer.svg`.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.cores import process_on_each_core
from benchmarks.results import Benchmark
from cpm_jax.common.figures import COLORS
from cpm_jax.common.files import write_json
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.scaling.mup import at_width, standard
from cpm_jax.scaling.stacked_program import StackedProgram, Trial
from cpm_jax.training.losses import Batch, LossConfig
from cpm_jax.training.optimizer import OptimizerConfig
from cpm_jax.training.schedules import wsd

IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "mup_transfer.svg"
PARAMETRIZATIONS = ("µP", "standard")
EVAL_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Study:
    """How large a study is.

    Attributes:
        base_width: at which µP and standard parametrisation are the same training.
        widths: d_model, at the least depth.
        depths: numbers of layers, at the base width.
        learning_rates: peaks, in equal ratios.
        seeds: of parameters and data order.
        steps: of a training.
        rows: of a batch.
        seq_len: tokens of a row.
    """

    base_width: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    steps: int
    rows: int = 8
    seq_len: int = 128

    def cells(self) -> list[tuple[str, int, int, int]]:
        """Parametrisation, width, depth and seed of every cell, the small ones first."""
        sizes = [(width, self.depths[0]) for width in self.widths]
        sizes += [(self.base_width, depth) for depth in self.depths[1:]]
        sizes.sort(key=lambda size: size[0] ** 2 * size[1])
        return [(name, *size, seed) for size, seed, name in itertools.product(sizes, self.seeds, PARAMETRIZATIONS)]


_RATES = tuple(0.01 * 2.0**i for i in range(-3, 4))
STUDIES = {
    "smoke": Study(32, (32, 64), (1, 2), (0.005, 0.02), (0,), steps=6, rows=2, seq_len=32),
    "half_hour": Study(32, (32, 64, 128), (2, 4), _RATES, (0, 1), steps=300),
    "full": Study(64, (64, 128, 256, 512), (4, 8, 16), _RATES, (0, 1), steps=150, rows=4),
}


def model_of(study: Study, parametrization: str, width: int, depth: int) -> ModelConfig:
    """A model of the study: heads of 16, two key and value heads."""
    base = ModelConfig(
        vocab_size=256,
        num_layers=depth,
        d_model=study.base_width,
        num_heads=study.base_width // 16,
        num_kv_heads=2,
        d_ff=4 * study.base_width,
        tie_word_embeddings=True,
        scale_emb=12.0,
        scale_depth=1.4,
        dim_model_base=study.base_width,
        initializer_range=0.1,
        dtype="float32",
    )
    model = at_width(base, width)
    if parametrization == "µP":
        return model
    # Without a rule for depth either, branches are as at the base depth.
    return dataclasses.replace(standard(model), scale_depth=model.scale_depth * math.sqrt(depth / study.depths[0]))


def read_text() -> dict[bool, np.ndarray]:
    """Bytes of the standard library's modules: held out (one in ten, by its name) and not."""
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        held_out = hashlib.sha256(path.name.encode()).digest()[0] % 10 == 0
        parts[held_out].append(path.read_bytes())
    return {key: np.frombuffer(b"\n".join(texts), np.uint8) for key, texts in parts.items()}


def batch_of(text: np.ndarray, study: Study, seed: int, number: int) -> Batch:
    """Rows from random places of a text."""
    rng = np.random.default_rng((seed, number))
    starts = rng.integers(0, len(text) - study.seq_len - 1, study.rows)
    tokens = np.stack([text[start : start + study.seq_len + 1] for start in starts]).astype(np.int32)
    shape = (study.rows, study.seq_len)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(study.seq_len, dtype=np.int32), shape),
        "source_ids": np.zeros(study.rows, np.int32),
    }


def run_cell(study: Study, parametrization: str, width: int, depth: int, seed: int) -> dict[str, Any]:
    """Trains one model with every learning rate; the held-out loss of each, None where it is not finite."""
    begin, text = time.perf_counter(), read_text()
    model = model_of(study, parametrization, width, depth)
    decay, warmup = study.steps // 5, study.steps // 10
    trials = [
        Trial(f"{rate:g}", model, OptimizerConfig(), wsd(rate, study.steps, warmup, decay), seed)
        for rate in study.learning_rates
    ]
    program = StackedProgram(trials, steps=study.steps, loss=LossConfig())
    states = program.init()
    for number in range(study.steps):
        states, _ = program.step(states, batch_of(text[False], study, seed, number))
    nll, weight = np.zeros(len(trials)), 0.0
    for number in range(EVAL_BATCHES):
        sums = jax.device_get(program.evaluate(states.params, batch_of(text[True], study, 10**6, number)))
        nll, weight = nll + sums.nll, weight + float(sums.source_weight[0].sum())
    skipped = jax.device_get(states.nonfinite_total)
    losses = [
        float(loss) if math.isfinite(loss) and not bad else None
        for loss, bad in zip(nll / weight, skipped, strict=True)
    ]
    return {"losses": losses, "seconds": time.perf_counter() - begin}


def record(name: str, found: dict[tuple[str, int, int, int], dict[str, Any]]) -> None:
    """Writes down how far the best learning rate moves, and draws the curves.

    Raises:
        ValueError: a model diverges with every learning rate.
    """
    study, bench = STUDIES[name], Benchmark("mup_transfer", f"python -m benchmarks.mup_transfer --size {name}")
    sizes = sorted({cell[1:3] for cell in found})
    at_base = sizes.index((study.base_width, study.depths[0]))
    canvas = Figure(figsize=(8.6, 3.8), layout="constrained")
    axes = canvas.subplots(1, 2, sharey=True)
    for axis, parametrization in zip(axes, PARAMETRIZATIONS, strict=True):
        # [sizes, seeds, learning rates]; what diverges is worse than all else.
        losses = np.array([[found[parametrization, *size, s]["losses"] for s in study.seeds] for size in sizes], float)
        means = np.nan_to_num(losses.mean(axis=1), nan=np.inf)
        if np.isinf(means.min(axis=1)).any():
            raise ValueError(f"{parametrization}: a size of {sizes} has no learning rate with a finite loss")
        best = means.argmin(axis=1)
        for i, (width, depth) in enumerate(sizes):
            color, label = COLORS[i % len(COLORS)], f"d {width}, {depth} layers"
            axis.fill_between(study.learning_rates, losses[i].min(0), losses[i].max(0), color=color, alpha=0.2)
            axis.plot(study.learning_rates, losses[i].mean(0), "o-", color=color, label=label, markersize=3)
            edge = ", an end of the grid" if best[i] in (0, len(study.learning_rates) - 1) else ""
            spread = np.ptp(losses[i, :, best[i]])
            if np.isfinite(means[i, best[at_base]]):
                bench.add(
                    f"{parametrization}, {label}, best at {study.learning_rates[best[i]]:g}{edge} (seeds differ by "
                    f"{spread:.3f}): loss at the base's best",
                    "nats a byte",
                    float(means[i, best[at_base]]),
                    larger_is_better=False,
                    baseline_name="at its own best",
                    baseline=float(means[i].min()),
                )
        axis.set(xscale="log", xlabel="learning rate", title=parametrization)
        axis.set_xticks(study.learning_rates, [f"{rate:g}" for rate in study.learning_rates], fontsize=7)
        axis.minorticks_off()
        moves = np.abs(best - best[at_base])
        for what, of_these in (
            ("widths", [depth == study.depths[0] for _, depth in sizes]),
            ("depths", [width == study.base_width for width, _ in sizes]),
        ):
            bench.add(
                f"{parametrization}: best learning rate moves over {what} by",
                "steps of the grid (a factor of 2 each)",
                float(moves[of_these].max()),
                larger_is_better=False,
                baseline_name="at most",
                baseline=1.0,
                goal=1.0 if parametrization == "µP" else None,
            )
    axes[0].set_ylabel("held-out loss, nats a byte")
    axes[0].legend(fontsize=7, frameon=False)
    bench.write()
    canvas.savefig(IMAGE, format="svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the cells that are missing and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=STUDIES, default="half_hour")
    parser.add_argument("--cells", type=Path, default=Path("runs/mup_transfer"), help="what is trained already")
    parser.add_argument("--no-results", action="store_true", help="train only")
    args = parser.parse_args(argv)
    study = STUDIES[args.size]
    folder = args.cells / f"{args.size}_{hashlib.sha256(repr(study).encode()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        cell: folder / f"{'mup' if cell[0] == 'µP' else 'sp'}_d{cell[1]}_l{cell[2]}_seed{cell[3]}.json"
        for cell in study.cells()
    }
    with process_on_each_core() as pool:
        pending = {cell: pool.submit(run_cell, study, *cell) for cell, path in paths.items() if not path.exists()}
        for cell, future in pending.items():
            write_json(paths[cell], future.result())
            print(*cell, paths[cell].read_text("utf-8"), flush=True)
    found = {cell: json.loads(path.read_text("utf-8")) for cell, path in paths.items()}
    if not args.no_results:
        record(args.size, found)


if __name__ == "__main__":
    main()
