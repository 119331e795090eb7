"""The study of two-stage ternary training (BitCPM4, MiniCPM4 report §3.3): its size, its arms and its cells.

All arms see the same tokens in the same order. Full precision is trained once for each seed, at a constant rate after
the warm-up; every arm that begins with it goes on from one of that run's checkpoints, with the optimizer's moments and
the count of steps. A cell is one arm with one seed, an ordinary `pretrain` run in a folder of its own, which the same
call resumes; when it is done its line is added to `cells.jsonl` and its folder removed. Several processes may work on
one study.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from benchmarks.results import origin
from cpm_jax.checkpoints.manager import CHECKPOINTS_DIR, CheckpointConfig, list_steps
from cpm_jax.common.config import ConfigError, config_dataclass, config_differences, config_to_dict
from cpm_jax.common.files import write_json
from cpm_jax.common.metrics import METRICS_FILE, read_metrics
from cpm_jax.modeling.config import PER_CHANNEL, PER_TENSOR, TernaryConfig
from cpm_jax.training.distillation import DistillationConfig
from cpm_jax.training.schedules import wsd
from experiments import pretrain
from experiments.pretrain import PretrainConfig

STUDY_FILE, CELLS_FILE, CELLS_DIR = "study.json", "cells.jsonl", "cells"  # within a workdir
FULL_PRECISION, FROM_SCRATCH = "full precision", "ternary from scratch"


@config_dataclass
class StudyConfig:
    """The size of a study.

    Attributes:
        base: model, data, batch, steps and optimizer of all arms; its schedule is not used.
        peak_lr: learning rate of full precision, and of ternary training from scratch.
        qat_peak_lr: of the second stage.
        warmup_steps: of each stage.
        decay_steps: at the end of every arm; a second stage too short for it decays all the way after its warm-up.
        group_size: as `TernaryConfig.group_size`.
        other_group_sizes: that ternary training from scratch is tried with too.
        shares: of the tokens, trained ternary at the end.
        control_share: share at which a second stage without warm-up, and one distilled from the full-precision model,
            are tried too; 0 for neither.
        seeds: of the initial parameters and the order of the data.
    """

    base: PretrainConfig
    peak_lr: PositiveFloat
    qat_peak_lr: PositiveFloat
    warmup_steps: NonNegativeInt
    decay_steps: PositiveInt
    group_size: int
    other_group_sizes: tuple[int, ...]
    shares: tuple[PositiveFloat, ...]
    control_share: NonNegativeFloat
    seeds: tuple[NonNegativeInt, ...]

    def __post_init__(self) -> None:
        steps = self.base.train.steps
        for share in (*self.shares, self.control_share):
            if share >= 1 or round(100 * share) != round(100 * share, 6):
                raise ConfigError(
                    f"StudyConfig.shares = {self.shares}, control_share = {self.control_share}: must be whole percents "
                    "below 1",
                    field="StudyConfig.shares",
                )
        if steps % 100:
            raise ConfigError(
                f"TrainConfig.steps = {steps}: must be a multiple of 100, of which shares are percents",
                field="TrainConfig.steps",
            )
        if self.control_share and self.control_share not in self.shares:
            raise ConfigError(
                f"StudyConfig.control_share = {self.control_share}: must be 0 or one of shares = {self.shares}",
                field="StudyConfig.control_share",
            )
        if len(self.seeds) < 2:
            raise ConfigError(
                f"StudyConfig.seeds = {self.seeds}: an interval needs at least two", field="StudyConfig.seeds"
            )
        shortest = min((round(share * steps) for share in self.shares), default=steps)
        if not self.warmup_steps < min(shortest, steps - self.decay_steps):
            raise ConfigError(
                f"StudyConfig.warmup_steps = {self.warmup_steps}: must be below the {shortest} steps of the shortest "
                f"second stage, and below {steps} - decay_steps = {steps - self.decay_steps}",
                field="StudyConfig.warmup_steps",
            )


class Arm(NamedTuple):
    """A way to a model.

    Attributes:
        name: of its lines.
        share: of the tokens, trained ternary at the end; 0 is full precision throughout, 1 ternary from scratch.
        group_size: as `TernaryConfig.group_size`.
        warmup: whether the learning rate of the second stage warms up.
        distilled: whether the second stage has the full-precision model as its teacher.
    """

    name: str
    share: float
    group_size: int
    warmup: bool = True
    distilled: bool = False


def second_stage(share: float) -> str:
    """The name of the arm whose last tokens are trained ternary."""
    return f"{share:.0%} ternary"


def groups(size: int) -> str:
    """What shares a scale, in words."""
    return {PER_TENSOR: "a scale for each matrix", PER_CHANNEL: "a scale for each output"}.get(
        size, f"groups of {size}"
    )


def arms(study: StudyConfig) -> list[Arm]:
    """All arms, those first that others are compared with."""
    size, control = study.group_size, study.control_share
    found = [Arm(FULL_PRECISION, 0.0, size), Arm(FROM_SCRATCH, 1.0, size)]
    found += [Arm(second_stage(share), share, size) for share in study.shares]
    if control:
        found.append(Arm(f"{second_stage(control)}, no warm-up", control, size, warmup=False))
        found.append(Arm(f"{second_stage(control)}, distilled", control, size, distilled=True))
    return found + [Arm(f"{FROM_SCRATCH}, {groups(other)}", 1.0, other) for other in study.other_group_sizes]


class Study:
    """The cells of a study, each trained and measured once."""

    def __init__(self, config: StudyConfig, workdir: Path):
        """Takes a workdir for a study.

        Raises:
            ConfigError: it was taken for another one.
        """
        self.config, self.workdir = config, workdir
        path = workdir / STUDY_FILE
        asked = config_to_dict(config)
        if path.exists() and (saved := json.loads(path.read_text("utf-8"))) != json.loads(json.dumps(asked)):
            changed = config_differences(saved, asked)
            said = "; ".join(f"{name}: {was!r} there, now {now!r}" for name, (was, now) in changed.items())
            raise ConfigError(f"{workdir} holds another study: {said}; take another --workdir")
        write_json(path, asked)

    def rows(self) -> list[dict[str, Any]]:
        """The lines of the cells that are done."""
        try:
            lines = (self.workdir / CELLS_FILE).read_text("utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def left(self) -> list[tuple[Arm, int]]:
        """The cells that are not done, in their order."""
        done = {(row["arm"], row["seed"]) for row in self.rows()}
        cells = itertools.product(arms(self.config), self.config.seeds)
        return [(arm, seed) for arm, seed in cells if (arm.name, seed) not in done]

    def run(self, deadline: float) -> bool:
        """Trains what is left and no other process has taken, until the time is over; whether all cells are done."""
        for arm, seed in self.left():
            if time.monotonic() > deadline:
                return False
            with self._taken(arm.name, seed) as mine:
                if mine and (arm, seed) in self.left():
                    self._run(arm, seed)
        if self.left():
            return False
        shutil.rmtree(self.workdir / CELLS_DIR, ignore_errors=True)
        return True

    def _run(self, arm: Arm, seed: int) -> None:
        begin, folder = time.monotonic(), self._folder(arm.name, seed)
        config = self.cell(arm, seed)
        if config.init_from:
            self._train_stable(seed)
        if arm.distilled:
            with self._taken(FULL_PRECISION, seed, wait=True):  # another process may still train the teacher
                pass
        pretrain.run(config, folder)
        loss = next(row["eval/loss"] for row in reversed(read_metrics(folder / METRICS_FILE)) if "eval/loss" in row)
        row = {"arm": arm.name, "seed": seed, "loss": loss, "seconds": time.monotonic() - begin} | origin()
        with (self.workdir / CELLS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if arm.name != FULL_PRECISION:  # which is a teacher
            shutil.rmtree(folder)
        print(f"{arm.name}, seed {seed}: {loss:.4f} nats a token, {row['seconds']:.1f} s", flush=True)

    @contextlib.contextmanager
    def _taken(self, name: str, seed: int, wait: bool = False) -> Iterator[bool]:
        """A run for this process alone; False where another one has it, unless it waits for its end."""
        path = self._folder(name, seed).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    def cell(self, arm: Arm, seed: int) -> PretrainConfig:
        """The run of a cell; `init_from` is a checkpoint of the stable run, where it begins with that."""
        study, base = self.config, self.config.base
        steps = base.train.steps
        if arm.share == 0:
            first = steps - study.decay_steps
        else:
            first = steps - round(arm.share * steps)
        second = 0 < arm.share < 1
        warmup = study.warmup_steps if arm.warmup else 0
        schedule = wsd(
            study.qat_peak_lr if second else study.peak_lr,
            steps,
            warmup,
            min(study.decay_steps, steps - first - warmup) if second else study.decay_steps,
            first_step=first if second else 0,
        )
        teacher = None
        if arm.distilled:
            teacher = DistillationConfig(teacher=str(self._folder(FULL_PRECISION, seed)))
        return dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, ternary=TernaryConfig(arm.group_size) if arm.share else None),
            schedule=schedule,
            loss=dataclasses.replace(base.loss, distillation=teacher),
            train=dataclasses.replace(base.train, seed=seed, eval_every=steps, eval_batches=0),
            init_from=str(self._stable(seed) / CHECKPOINTS_DIR / str(first)) if first else "",
            init="state",
        )

    def stable(self, seed: int) -> PretrainConfig:
        """The run at a constant rate, with a checkpoint wherever an arm goes on from."""
        study, base = self.config, self.config.base
        total = base.train.steps
        starts = [total - study.decay_steps, *(total - round(share * total) for share in study.shares)]
        every = math.gcd(*starts)
        return dataclasses.replace(
            base,
            schedule=wsd(study.peak_lr, total, study.warmup_steps, 0),
            train=dataclasses.replace(base.train, seed=seed, steps=max(starts), eval_every=0),
            checkpoint=CheckpointConfig(every=every, keep_every=every),
        )

    def _train_stable(self, seed: int) -> None:
        config, folder = self.stable(seed), self._stable(seed)
        with self._taken("stable", seed, wait=True):
            if config.train.steps not in list_steps(folder / CHECKPOINTS_DIR):
                pretrain.run(config, folder)

    def _stable(self, seed: int) -> Path:
        return self._folder("stable", seed)

    def _folder(self, name: str, seed: int) -> Path:
        return self.workdir / CELLS_DIR / f"{name.replace('%', '').replace(',', '').replace(' ', '_')}-{seed}"


def losses(rows: Sequence[Mapping[str, Any]], arm: str) -> dict[int, float]:
    """Held-out losses of an arm by seed."""
    return {row["seed"]: row["loss"] for row in rows if row["arm"] == arm}
