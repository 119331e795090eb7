"""How many of a training's tokens have to be trained ternary, after full precision: BitCPM4's claim on real text.

    python -m benchmarks.bitcpm --gin_file=papers/minicpm4/bitcpm_study.gin --gin.DATA=DATASET [--workdir DIR]
        [--seconds N] [--gin.NAME=VALUE …]

The size of the study is a gin file: `papers/minicpm4/bitcpm_study.gin` (ten minutes of two idle cores), `…_3h.gin` and
`…_gpu.gin`; `papers/minicpm4/bitcpm_groups.gin` asks what the group of 256 costs. DATASET is a folder that `prepare`
wrote. Cells are kept in the workdir, so that it may run in pieces of `--seconds`, and in several processes; the one
that ends last writes `results/<name of the gin file>.json`, the cells beside it, and `docs/images/<name>.svg`.
docs/bitcpm.md.
"""

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.bitcpm_study import (
    CELLS_FILE,
    FROM_SCRATCH,
    FULL_PRECISION,
    Study,
    StudyConfig,
    arms,
    groups,
    losses,
    second_stage,
)
from benchmarks.results import RESULTS_DIR, Benchmark
from benchmarks.strategy_report import IMAGES, Comparison, add_rows, draw
from cpm_jax.common.figures import COLORS
from cpm_jax.common.gin_utils import Settings
from cpm_jax.modeling.model_size import count_params

CLAIMED_SHARE = 0.4  # of the tokens, from which on the report finds the loss of ternary training from scratch
VERDICTS = ("holds", "direction only", "not at this scale")


def comparisons(study: StudyConfig, rows: Sequence[dict[str, Any]]) -> list[Comparison]:
    """All comparisons of a finished study."""
    by_arm = {arm.name: losses(rows, arm.name) for arm in arms(study)}

    def compare(question: str, arm: str, reference: str, claim: Any = "") -> Comparison:
        return Comparison(question, arm, reference, claim, by_arm[arm], by_arm[reference])

    found = [compare("cost of ternary weights", FROM_SCRATCH, FULL_PRECISION)]
    for share in study.shares:
        claim = "no worse" if share >= CLAIMED_SHARE else ""
        found.append(compare("second stage", second_stage(share), FROM_SCRATCH, claim))
    found += [compare("second stage", second_stage(share), FULL_PRECISION) for share in study.shares]
    if control := study.control_share:
        usual = second_stage(control)
        found.append(compare("warm-up", usual, f"{usual}, no warm-up", "better"))
        found.append(compare("distillation", f"{usual}, distilled", usual, "better"))
    for size in study.other_group_sizes:
        other = f"{FROM_SCRATCH}, {groups(size)}"
        found.append(compare(f"{groups(study.group_size)} against others", FROM_SCRATCH, other))
    return found


def claimed(found: Sequence[Comparison]) -> list[Comparison]:
    """Those that the report's claim is about: long enough second stages against ternary training from scratch."""
    return [one for one in found if one.question == "second stage" and one.claim]


def verdict(found: Sequence[Comparison]) -> str:
    """What is said of the claim as a whole: what is said of the share that agrees with it least."""
    return max((one.verdict for one in found), key=VERDICTS.index)


def draw_shares(study: StudyConfig, rows: Sequence[dict[str, Any]], size: str) -> Figure:
    """Held-out loss over the share of tokens trained ternary: each seed, and means with intervals."""
    canvas = Figure(figsize=(7.2, 4.4), layout="constrained")
    axis = canvas.subplots()
    scratch = losses(rows, FROM_SCRATCH)
    for name, color in ((FROM_SCRATCH, COLORS[1]), (FULL_PRECISION, COLORS[6])):
        values = losses(rows, name)
        axis.axhline(sum(values.values()) / len(values), color=color, linewidth=1.2, label=name)
        axis.plot(
            [100 if name == FROM_SCRATCH else 0] * len(values), list(values.values()), ".", color=color, alpha=0.6
        )
    level = sum(scratch.values()) / len(scratch)
    points = [Comparison("", "", "", "", losses(rows, second_stage(share)), scratch) for share in study.shares]
    at = [100 * share for share in study.shares]
    axis.errorbar(
        at,
        [level + one.mean for one in points],
        yerr=[one.half for one in points],
        fmt="o-",
        color=COLORS[0],
        capsize=3,
        label="second stage; 95% interval of the difference from scratch",
    )
    for x, one in zip(at, points, strict=True):
        axis.plot([x] * len(one.losses), list(one.losses.values()), ".", color=COLORS[0], alpha=0.4)
    axis.axvline(100 * CLAIMED_SHARE, color="#5b6675", linewidth=0.8, linestyle=":")
    axis.set_xlabel(f"tokens trained ternary, % ({size})")
    axis.set_ylabel("held-out loss, nats a token")
    axis.legend(fontsize=7, frameon=False)
    return canvas


def write(name: str, command: str, study: StudyConfig, rows: Sequence[dict[str, Any]]) -> None:
    """Prints and writes the results of a finished study, and its figure."""
    found, bench = comparisons(study, rows), Benchmark(name, command)
    print(*found, sep="\n")
    train = study.base.train
    millions = count_params(study.base.model).total / 1e6
    size = f"{millions:.2f}M parameters, {train.steps} steps of {train.batch_size} rows, {groups(study.group_size)}"
    add_rows(bench, found, size)
    if least := claimed(found):
        bench.add(
            f"{size}; claim: {CLAIMED_SHARE:.0%} of the tokens or more, trained ternary at the end, are no worse than "
            f"all of them: {verdict(least)}",
            "shares where it holds",
            sum(one.verdict == "holds" for one in least),
            larger_is_better=True,
            baseline_name="shares",
            baseline=len(least),
        )
    bench.write()
    figure = draw_shares(study, rows, size) if study.shares else draw(found, size)
    figure.savefig(IMAGES / f"{name}.svg", format="svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is left of the study, for as long as is allowed, and writes its results when it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", default="papers/minicpm4/bitcpm_study.gin", help="the size of the study")
    parser.add_argument("--workdir", type=Path, help="of the cells; else runs/<name of the gin file>")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after this time")
    args, flags = parser.parse_known_args(argv)
    if unknown := [flag for flag in flags if not flag.startswith("--gin.")]:
        parser.error(f"{' '.join(unknown)}: accepted are the options above and --gin. flags")
    name = Path(args.gin_file).stem
    study = Study(Settings([args.gin_file], flags, StudyConfig).build(), args.workdir or Path("runs") / name)
    if not study.run(time.monotonic() + args.seconds):
        print(f"{len(study.left())} cells are left; the same command goes on")
        return
    command = " ".join(["python -m benchmarks.bitcpm", f"--gin_file={args.gin_file}", *flags])
    write(name, command, study.config, study.rows())
    shutil.copyfile(study.workdir / CELLS_FILE, RESULTS_DIR / f"{name}_cells.jsonl")


if __name__ == "__main__":
    main()
