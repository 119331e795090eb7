"""The coordinate check of µP at widths 64 to 1,024: how activations and their changes grow with the width.

`python -m benchmarks.coordinate_check`: MiniCPM4's multipliers on a model of 2 layers with heads of 32, steps on one
batch of Python's own source code as bytes, under µP and under standard parametrisation, which are the same training at
width 64. Writes `results/coordinate_check.json` and `docs/images/coordinate_check.svg`.
"""

import argparse
import dataclasses
import itertools
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from matplotlib.figure import Figure

from benchmarks.results import Benchmark
from cpm_jax.common.figures import COLORS
from cpm_jax.common.files import write_json
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.scaling.coordinate_check import (
    CoordinateCheckConfig,
    Measurement,
    Quantity,
    measure,
    slopes,
)
from cpm_jax.scaling.mup import standard
from cpm_jax.training.losses import Batch

IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "coordinate_check.svg"
MODEL = ModelConfig(
    vocab_size=256,
    num_layers=2,
    d_model=64,
    num_heads=2,
    num_kv_heads=2,
    d_ff=256,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=64,
    initializer_range=0.1,
    dtype="float32",
    scan_layers=False,
)
PARAMETRIZATIONS = {"µP": MODEL, "standard": standard(MODEL)}
SITES = ("attention", "mlp", "residual")  # what is held to be flat, or to climb
FLAT, CLIMBS = 0.1, 0.5


def bytes_batch(rows: int = 4, length: int = 64) -> Batch:
    """Rows of Python's standard library, a token a byte."""
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()
    tokens = np.frombuffer(text[: rows * (length + 1)], np.uint8).reshape(rows, length + 1).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones((rows, length), np.float32),
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "source_ids": np.zeros(rows, np.int32),
    }


def measure_all(cells: Path, widths: Sequence[int], seeds: Sequence[int]) -> dict[str, list[Measurement]]:
    """Measures each width, seed and parametrisation, or takes what an earlier call left in `cells`."""
    cells.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Measurement]] = {}
    batch = bytes_batch()
    for name, model in PARAMETRIZATIONS.items():
        config = CoordinateCheckConfig(model=model, widths=tuple(widths), seeds=tuple(seeds))
        found[name] = []
        for width, seed in itertools.product(widths, seeds):
            path = cells / f"{'mup' if name == 'µP' else name}_{width}_seed_{seed}.json"
            if not path.exists():
                write_json(path, [dataclasses.asdict(m) for m in measure(config, width, seed, batch)])
            found[name] += [Measurement(**row) for row in json.loads(path.read_text())]
            print(f"{name}, width {width}, seed {seed}: done", flush=True)
    return found


def steepest(measurements: Sequence[Measurement], step: int, quantity: Quantity, *, least: bool) -> float:
    """The slope that is furthest from flat, or the least, of the activations that should grow together."""
    found = [slope for site, slope in slopes(measurements, step, quantity).items() if site.rpartition("/")[2] in SITES]
    return min(found) if least else max(map(abs, found))


def plot(found: dict[str, list[Measurement]], path: Path, step: int) -> None:
    """Draws size and change over the width, a line for each activation."""
    canvas = Figure(figsize=(8.6, 5.6), layout="constrained")
    axes = canvas.subplots(2, len(found), sharex=True, sharey="row")
    for column, (name, measurements) in enumerate(found.items()):
        sites = [m.site for m in measurements if not m.site.startswith("parameters/")]
        for color, site in zip(COLORS * 3, dict.fromkeys(sites), strict=False):
            for row, quantity in enumerate(get_args(Quantity)):
                widths = sorted({m.width for m in measurements})
                values = [
                    np.exp(
                        np.mean(
                            [
                                np.log(getattr(m, quantity))
                                for m in measurements
                                if (m.width, m.step, m.site) == (width, step, site)
                            ]
                        )
                    )
                    for width in widths
                ]
                axes[row, column].loglog(widths, values, "o-", color=color, label=site, markersize=3, linewidth=1.3)
                axes[row, column].set_xticks(widths, [str(width) for width in widths], minor=False)
                axes[row, column].minorticks_off()
                what = "size" if quantity == "size" else f"change in {step} steps"
                axes[row, column].set_title(f"{name}: {what}", loc="left", fontsize=10)
        axes[1, column].set_xlabel("d_model")
    axes[0, -1].legend(fontsize=7, loc="upper left", frameon=False)
    canvas.savefig(path, format="svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, draws and writes the slopes down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", type=Path, default=Path("runs/coordinate_check"), help="what is measured already")
    parser.add_argument("--no-results", action="store_true", help="print the slopes only")
    args = parser.parse_args(argv)
    found = measure_all(args.cells, args.widths, range(args.seeds))
    bench = Benchmark("coordinate_check")
    for step in (1, 3, 10):
        for what in get_args(Quantity):
            bench.add(
                f"µP: steepest slope of a {what}, {step} steps",
                "log size / log width",
                steepest(found["µP"], step, what, least=False),
                larger_is_better=False,
                baseline_name="at most",
                baseline=FLAT,
                goal=1.0,
            )
            bench.add(
                f"standard: least slope of a {what}, {step} steps",
                "log size / log width",
                max(steepest(found["standard"], step, what, least=True), 0.0),
                larger_is_better=True,
                baseline_name="at least",
                baseline=CLIMBS,
                goal=1.0,
            )
    for name, measurements in found.items():
        # They fall as 1/sqrt(width) before training, and flatten as the head learns: growth alone would be wrong.
        growth = slopes(measurements, 1, "change")["logits"]
        bench.add(
            f"{name}: growth of the change of logits, 1 step",
            "log size / log width",
            max(growth, 0.0),
            larger_is_better=name != "µP",
            baseline_name="at most" if name == "µP" else "at least",
            baseline=FLAT if name == "µP" else CLIMBS,
            goal=1.0,
        )
    if args.no_results:
        for name, measurements in found.items():
            for step in (0, 1, 3, 10):
                for what in get_args(Quantity):
                    by_site = slopes(measurements, step, what)
                    print(name, step, what, {site: round(slope, 3) for site, slope in by_site.items()})
        return
    bench.write()
    plot(found, IMAGE, 10)


if __name__ == "__main__":
    main()
