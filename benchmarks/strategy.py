"""MiniCPM4's questions of strategy at a laptop's scale: which holds, of which only the direction, which not.

    python -m benchmarks.strategy --data DATASET --held-out DATASET [--size full.gin] [--workdir DIR]
        [--only QUESTION …] [--gin.X=VALUE …]

Each question is a sweep, `gin_configs/papers/minicpm4/strategy/<question>.gin`, or two. Sweeps go on where they were
cut off, and what is trained is not trained again. Losses are those of the last checkpoints on the held-out dataset. A
question's losses go to `results/strategy_losses.jsonl` (`strategy_full_losses.jsonl`); from all that are there, also
from another machine, `results/strategy.json` and `docs/images/strategy.svg` are written. `--gin.` flags go to every
sweep.
"""

import argparse
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.strategy_report import Comparison, read_answers, save_answers, write_results
from cpm_jax.checkpoints.averaging import average_params
from cpm_jax.checkpoints.manager import CHECKPOINTS_DIR, list_steps
from cpm_jax.common.gin_files import GIN_ROOT
from cpm_jax.common.gin_utils import Settings
from cpm_jax.data.loader import make_validation_loader, open_datasets
from cpm_jax.data.mixture import from_folders
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import count_params
from cpm_jax.scaling.runs import RUNS_FILE, Run, read_runs
from cpm_jax.training.train_step import make_eval_step
from experiments.pretrain import PretrainConfig
from experiments.sweep import SweepConfig
from experiments.sweep_trials import resolve, trial_folder

GIN_DIR = "papers/minicpm4/strategy"
SEEDS = (0, 1, 2)
AVERAGED = (2, 4, 8)  # of the newest checkpoints
# Standard parametrisation: no multipliers, and the usual standard deviation.
STANDARD = {
    "DIM_MODEL_BASE": 0,
    "ModelConfig.scale_emb": 1.0,
    "ModelConfig.scale_depth": 0.0,
    "ModelConfig.initializer_range": 0.02,
}
Losses = Mapping[int, float]


class Strategy:
    """The sweeps of one size, in a folder."""

    def __init__(self, data: str, held_out: str, size: str, workdir: Path, flags: Sequence[str]):
        """Takes both datasets' folders, the size's gin file ("" for that of base.gin), and flags of all sweeps.

        Raises:
            DataError: one of them is no dataset, the second has none held out, or their tokenizers differ.
        """
        open_datasets(from_folders((data, held_out)))
        self._held_out = from_folders(held_out)
        self._files = [f"{GIN_DIR}/{size}"] if size else []
        self.workdir, self._flags = workdir, [f"--gin.DATA={data}", *flags]
        self._done: dict[str, list[Run]] = {}
        self.answers: dict[str, list[Comparison]] = {}  # of questions that were asked before, on whatever machine
        settings = Settings(
            [f"{GIN_DIR}/base.gin", *self._files], [*self._flags, "--gin.SPACE=pin('SEED', 0)"], SweepConfig
        )
        config: SweepConfig = settings.build()
        self.base = config.bindings
        self.model = resolve(config.base(), {}).config.model

    def sweep(self, name: str, file: str = "", flags: Sequence[str] = ()) -> list[Run]:
        """Runs a sweep, or goes on with it, or takes what it has found.

        The loss of a run that is done is that of its last checkpoint on the held-out dataset.

        Args:
            name: of its folder.
            file: in `GIN_DIR`, without its end; "" is `name`.
            flags: of this sweep.

        Raises:
            subprocess.CalledProcessError: it failed, and has said why.
        """
        if name not in self._done:
            # What a size changes of one study alone comes last.
            own = [f"{GIN_DIR}/{name}_{Path(size).name}" for size in self._files]
            files = [
                f"{GIN_DIR}/{file or name}.gin",
                *self._files,
                *(path for path in own if (GIN_ROOT / path).exists()),
            ]
            files = [f"--gin_file={path}" for path in files]
            command = ["experiments.run", "sweep", f"--workdir={self.workdir / name}", *files, *self._flags, *flags]
            subprocess.run([sys.executable, "-m", *command], check=True)
            runs = read_runs(self.workdir / name / RUNS_FILE)
            self._done[name] = [
                replace(run, loss=self.loss_of(name, run)) if run.status == "done" else run for run in runs
            ]
        return self._done[name]

    def loss_of(self, name: str, run: Run, averaged: int = 1) -> float:
        """Held-out loss of the mean of a run's newest checkpoints, nats a token."""
        folder = trial_folder(self.workdir / name, run.id)
        config: PretrainConfig = Settings([folder / "config.gin"], [], PretrainConfig).build()
        params, _ = average_params(folder, list_steps(folder / CHECKPOINTS_DIR)[-averaged:])
        loader = make_validation_loader(self._held_out, config.train.batch_size)
        step = make_eval_step(config.model, num_sources=1)
        sums = [jax.device_get(step(params, batch)) for batch in loader]
        return sum(float(one.nll) for one in sums) / sum(float(np.sum(one.source_weight)) for one in sums)


def losses(runs: Sequence[Run], bindings: Mapping[str, Any]) -> Losses:
    """Held-out losses, by seed, of the runs that have these bindings.

    Raises:
        ValueError: a seed is missing, or did not end with a finite loss.
    """
    chosen = [run for run in runs if bindings.items() <= run.config.items()]
    found = {run.config["SEED"]: run.loss for run in chosen if run.status == "done" and run.loss is not None}
    if sorted(found) != list(SEEDS):
        said = {run.config.get("SEED"): run.status for run in chosen}
        raise ValueError(f"{dict(bindings)}: seeds {list(SEEDS)} are needed, there are {said}")
    return found


def schedule(study: Strategy) -> list[Comparison]:
    """WSD against a cosine; shapes and shares of the decay."""
    runs, steps = study.sweep("schedule"), study.base["DECAY_STEPS"]
    wsd = losses(runs, {"DECAY_SHAPE": "exponential", "DECAY_STEPS": steps})
    long = max(run.config["DECAY_STEPS"] for run in runs)
    whole = losses(runs, {"DECAY_SHAPE": "cosine", "DECAY_STEPS": long})
    found = [Comparison("schedule", "WSD", "cosine", "no worse", wsd, whole)]
    for shape in ("linear", "cosine", "sqrt"):
        other = losses(runs, {"DECAY_SHAPE": shape, "DECAY_STEPS": steps})
        found.append(Comparison("shape of the decay", shape, "exponential", "", other, wsd))
    for share in (0.5, 2, 4):
        other = losses(runs, {"DECAY_SHAPE": "exponential", "DECAY_STEPS": round(share * steps)})
        said = f"{share * steps / study.base['TRAIN_STEPS']:.0%} of the steps"
        ours = f"{steps / study.base['TRAIN_STEPS']:.0%}"
        found.append(Comparison("share of the decay", ours, said, "no worse", wsd, other))
    return found


def usual(study: Strategy) -> Losses:
    """Losses of the usual training, WSD with the decay that `base.gin` has; of `schedule`, if that has its answer."""
    if "schedule" in study.answers:
        return study.answers["schedule"][0].losses
    return schedule(study)[0].losses


def mtp(study: Strategy) -> list[Comparison]:
    """One MTP layer, of two weights, against none."""
    runs = study.sweep("mtp")
    without = losses(runs, {"NUM_NEXTN_PREDICT_LAYERS": 0})
    return [
        Comparison(
            "MTP", f"weight {weight}", "none", "better", losses(runs, {"LossConfig.mtp_weight": weight}), without
        )
        for weight in (0.1, 0.3)
    ]


def fp8(study: Strategy) -> list[Comparison]:
    """Linear projections in FP8 against bfloat16."""
    runs = study.sweep("fp8")
    return [Comparison("FP8", "FP8", "bfloat16", "no worse", losses(runs, {"FP8": True}), losses(runs, {"FP8": False}))]


def depth(study: Strategy) -> list[Comparison]:
    """Deep and thin against wide."""
    runs = study.sweep("depth")
    shapes = sorted({(run.num_layers, run.d_model) for run in runs})
    by_shape = {shape: losses(runs, {"NUM_LAYERS": shape[0], "D_MODEL": shape[1]}) for shape in shapes}
    names = {shape: f"{shape[0]} layers of {shape[1]}" for shape in shapes}
    wide, *deeper = shapes
    return [
        Comparison("depth", names[shape], names[wide], "better", by_shape[shape], by_shape[wide]) for shape in deeper
    ]


def batch_warmup(study: Strategy) -> list[Comparison]:
    """Half the batch for the first fifth of the tokens against one batch, at equal tokens."""
    steps, rows = study.base["TRAIN_STEPS"], study.base["BATCH_SIZE"]
    first = 2 * steps // 5  # of half a batch: a fifth of all tokens
    flags = [f"--gin.BATCH_SIZE={rows // 2}", f"--gin.TRAIN_STEPS={first}", f"--gin.CHECKPOINT_EVERY={first}"]
    begun = study.sweep("batch_warmup", flags=flags)
    points = [
        {
            "SEED": run.config["SEED"],
            "INIT_FROM": str(trial_folder(study.workdir / "batch_warmup", run.id)),
            "INIT": "state",
            "TRAIN_STEPS": first + steps - steps // 5,
            "EVAL_EVERY": first + steps - steps // 5,
        }
        for run in begun
    ]
    grown = study.sweep("batch_warmup_rest", "base", [f"--gin.SPACE=table({points!r})"])
    constant = usual(study)
    grows = f"{rows // 2} rows, then {rows}"
    return [Comparison("batch warm-up", grows, f"{rows}", "no worse", losses(grown, {}), constant)]


def averaging(study: Strategy) -> list[Comparison]:
    """The mean of the newest checkpoints at a constant rate against the last one, and against a decay."""
    runs = study.sweep("averaging")
    last = losses(runs, {})
    decayed = usual(study)
    found = []
    for count in AVERAGED:
        means = {run.config["SEED"]: study.loss_of("averaging", run, count) for run in runs}
        found.append(
            Comparison("averaging", f"mean of {count} at a constant rate", "the last of them", "better", means, last)
        )
    return [*found, Comparison("averaging", found[-1].arm, "WSD", "no worse", means, decayed)]


def step_law(num_params: float, tokens: float) -> tuple[float, float]:
    """StepLaw's learning rate and batch in tokens (Li et al. 2025, arXiv:2503.04715, eq. 1), N without embeddings."""
    return 1.79 * num_params**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def learning_rate(study: Strategy) -> list[Comparison]:
    """What a search by µP on a narrow model finds, against StepLaw's formula under standard parametrisation."""
    search = study.sweep("learning_rate")
    best = min((run for run in search if run.loss is not None), key=lambda run: run.loss or math.inf)
    seeds = f"values('SEED', {', '.join(map(str, SEEDS))})"
    point = {"PEAK_LR": best.learning_rate}
    by_mup = study.sweep("learning_rate_mup", "base", [f"--gin.SPACE=product(table([{point!r}]), {seeds})"])
    target = by_mup[0]
    rate, batch_tokens = step_law(target.num_params, target.tokens)
    seq_len = target.batch_tokens // study.base["BATCH_SIZE"]
    rows = max(1, round(batch_tokens / seq_len))
    steps = round(target.tokens / (rows * seq_len))
    warmup, decay = steps // 20, steps // 10
    flags = {"TRAIN_STEPS": steps, "EVAL_EVERY": steps, "CHECKPOINT_EVERY": steps, "WARMUP_STEPS": warmup}
    flags |= {"DECAY_STEPS": decay, "BATCH_SIZE": rows}
    point = {"PEAK_LR": round(rate, 6)} | STANDARD
    by_law = study.sweep(
        "learning_rate_steplaw",
        "base",
        [f"--gin.SPACE=product(table([{point!r}]), {seeds})", *(f"--gin.{k}={v}" for k, v in flags.items())],
    )
    bill = sum(run.flops for run in search) / target.flops
    return [
        Comparison(
            "learning rate",
            f"µP's search ({best.learning_rate:g}; {bill:.2f} trainings)",
            f"StepLaw ({rate:.3g}, {rows} rows)",
            "no worse",
            losses(by_mup, {}),
            losses(by_law, {}),
        )
    ]


QUESTIONS = {
    "schedule": schedule,
    "batch_warmup": batch_warmup,
    "mtp": mtp,
    "fp8": fp8,
    "depth": depth,
    "averaging": averaging,
    "learning_rate": learning_rate,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is left of the sweeps, and writes the answers down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset folder, made by prepare")
    parser.add_argument("--held-out", required=True, help="likewise, of other text, with the same tokenizer")
    parser.add_argument("--size", default="", help="full.gin or gpu.gin; else that of base.gin")
    parser.add_argument("--workdir", type=Path, help="of the sweeps; else runs/strategy or runs/strategy_<size>")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), help="train these alone")
    args, flags = parser.parse_known_args(argv)
    if unknown := [flag for flag in flags if not flag.startswith("--gin.")]:
        parser.error(f"{' '.join(unknown)}: accepted are the options above and --gin. flags")
    name = f"strategy_{Path(args.size).stem}" if args.size else "strategy"
    workdir = args.workdir or Path("runs") / name
    study = Strategy(args.data, args.held_out, args.size, workdir, flags)
    size = about(study.model, study.base)
    for question in args.only:
        study.answers = read_answers(name, size)
        found = QUESTIONS[question](study)
        print(*found, sep="\n", flush=True)
        save_answers(name, question, found, size)
    answers = read_answers(name, size)
    command = f"python -m benchmarks.strategy --data {args.data} --held-out {args.held_out}"
    command += f" --size {args.size}" if args.size else ""
    write_results(name, command, [one for question in QUESTIONS for one in answers.get(question, [])], size)


def about(model: ModelConfig, base: Mapping[str, Any]) -> str:
    """The size of a study, in words."""
    millions = count_params(model).total / 1e6
    return f"{millions:.2f}M parameters, {base['TRAIN_STEPS']} steps of {base['BATCH_SIZE']} rows"


if __name__ == "__main__":
    main()
