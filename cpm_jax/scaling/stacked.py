"""Trainings that differ in scalars only, as one program (`stacked_program`); each leaves the files of its own, its
checkpoints too, from which it goes on alone.

docs/mup.md says what may differ, and when it is faster than trainings one after another.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from cpm_jax.checkpoints.manager import CHECKPOINTS_DIR, CheckpointConfig, Checkpointer, list_steps
from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.common.metrics import METRICS_FILE, JsonlWriter
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.scaling.stacked_program import Method, StackedProgram, Trial
from cpm_jax.training.loop import TrainConfig, TrainData, describe_run
from cpm_jax.training.losses import LossConfig
from cpm_jax.training.preemption import StopRequest
from cpm_jax.training.train_state import TrainState
from cpm_jax.training.train_step import Metrics, check_batch_size

Status = Literal["done", "diverged"]


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """What came of a trial.

    Attributes:
        name: of the trial.
        status: "diverged" where `max_consecutive_nonfinite` steps in a row were not finite: it ends there, the others
            go on.
        steps: that it took.
        losses: training loss after each of them, [steps].
        eval_loss: of the last evaluation, in nats per token; None where there was none or it is not finite.
        state: parameters and moments at the end.
        seconds: its equal share of the time of all trials' steps, the first left out, which compiles.
    """

    name: str
    status: Status
    steps: int
    losses: np.ndarray
    eval_loss: float | None
    state: TrainState
    seconds: float


def train_stacked(
    config: TrainConfig,
    *,
    trials: Sequence[Trial],
    loss: LossConfig,
    data: Callable[[int], TrainData],
    workdir: Path,
    checkpoint: CheckpointConfig | None = None,
    fixed: Callable[[Trial], Mapping[str, Any]] = lambda trial: {},
    method: Method | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> list[TrialResult]:
    """Trains all trials as one program.

    Each writes `<workdir>/<its name>/metrics.jsonl` as a training of its own does, and, where asked to, checkpoints,
    with which `training.loop.train` goes on. This function itself always begins at step 0.

    Args:
        config: steps, batch size, evaluation and logging of every trial. Its `seed` is not read, nor is what concerns
            the process: watchdog and compilation cache.
        trials: what differs.
        loss: weights of the losses.
        data: batches by seed; on one process.
        workdir: of all trials.
        checkpoint: when to save and what to keep; None keeps nothing, and a call that was ended starts again.
        fixed: for checkpoints, the settings of a trial that must be the same at each restart, as for `train`.
        method: None takes what is faster for the model's size.
        devices: over which trials are spread, as many to each.

    Returns:
        One result for each trial, in their order.

    Raises:
        ConfigError: the trials cannot share a program, sizes do not fit each other, `config` asks for an average of
            checkpoints or for a profile, or a trial has checkpoints already.
        InputError: the data ended early, or none of it is held out.
        CheckpointError: a checkpoint cannot be written.
        exit_codes.Stop: PREEMPTED, after SIGTERM or SIGINT and a save; only where checkpoints are kept.
    """
    if config.average_last or config.profile_start is not None:
        raise ConfigError(
            f"TrainConfig.average_last = {config.average_last}, profile_start = {config.profile_start}: must be 0 and "
            "None for trials in one program, which write neither",
            field="TrainConfig.average_last",
        )
    seeds = list(dict.fromkeys(trial.seed for trial in trials))
    sources = {seed: data(seed) for seed in seeds}
    first = sources[seeds[0]]
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    check_batch_size(config.batch_size, first.seq_len, one, config.num_microbatches)
    program = StackedProgram(
        trials,
        steps=config.steps,
        loss=loss,
        num_sources=len(first.sources),
        num_microbatches=config.num_microbatches,
        shared_batch=len(seeds) == 1,
        method=method,
        devices=devices,
    )
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest()) if checkpoint else None
        save = _Save(checkpoint, trials, fixed, config, first.seq_len, workdir, stack) if checkpoint else None
        log = _Log(config, trials, first.sources, config.batch_size * first.seq_len, workdir, stack)
        streams = {s: stack.enter_context(contextlib.closing(sources[s].batches(0))) for s in seeds}
        states, step = program.init(), 0
        for batches in islice(zip(*streams.values(), strict=True), config.steps):
            by_seed = dict(zip(seeds, batches, strict=True))
            if len(seeds) == 1:
                batch = by_seed[seeds[0]]
            else:
                each = [by_seed[trial.seed] for trial in trials]
                batch = program.put({key: np.stack([b[key] for b in each]) for key in each[0]})
            states, metrics = program.step(states, batch)
            step += 1
            log.add(step, metrics)
            last = step == config.steps
            if config.eval_every and first.eval_batches and (last or step % config.eval_every == 0):
                log.drain()
                log.write_evaluation(step, _evaluate(program, states.params, first, config.eval_batches))
            stopping = stop is not None and stop.requested(step)
            if save and (last or stopping or step % save.every == 0):
                log.drain()
                save(step, states, log)
            if stopping and not last:
                raise exit_codes.Stop(exit_codes.PREEMPTED, f"stopped and saved {len(trials)} trials at step {step}")
            if log.all_ended:
                break
        log.drain()
        if step < config.steps and not log.all_ended:
            raise InputError(f"the data ended at step {step}, {config.steps} were asked for")
        return log.results(jax.device_get(states))


def _evaluate(program: StackedProgram, params: Any, data: TrainData, num_batches: int) -> np.ndarray:
    """Held-out loss of every trial, [N]."""
    assert data.eval_batches is not None
    nll, weight = np.zeros(len(program.trials)), np.zeros(len(program.trials))
    with contextlib.closing(data.eval_batches()) as batches:
        for batch in islice(batches, num_batches or None):
            sums = jax.device_get(program.evaluate(params, batch))
            nll += sums.source_nll.sum(axis=1, dtype=np.float64)
            weight += sums.source_weight.sum(axis=1, dtype=np.float64)
    if not weight.all():
        raise InputError("the held-out data has no token to evaluate on; set eval_every = 0 to go without")
    return nll / weight


class _Save:
    """Writes each trial's own checkpoint, as the training loop does."""

    def __init__(
        self,
        checkpoint: CheckpointConfig,
        trials: Sequence[Trial],
        fixed: Callable[[Trial], Mapping[str, Any]],
        config: TrainConfig,
        seq_len: int,
        workdir: Path,
        stack: contextlib.ExitStack,
    ):
        self.every = checkpoint.every
        one = make_mesh(MeshConfig(), jax.devices()[:1])
        self._saves = []
        for trial in trials:
            directory = workdir / trial.name / CHECKPOINTS_DIR
            if steps := list_steps(directory):
                raise ConfigError(
                    f"Trial.name = {trial.name!r}: {directory} holds checkpoints (steps {', '.join(map(str, steps))}), "
                    "and trials in one program begin at step 0; go on with the trial by itself",
                    field="Trial.name",
                )
            about = describe_run(trial.model, trial.schedule, fixed(trial), config.batch_size * seq_len, one)
            self._saves.append((stack.enter_context(Checkpointer(directory, checkpoint)), about))

    def __call__(self, step: int, states: TrainState, log: "_Log") -> None:
        """Saves the trials that are still finite."""
        host = jax.device_get(states)
        log.flush()  # the lines up to this step are on disk before a checkpoint that makes them final
        for i, (checkpointer, about) in enumerate(self._saves):
            if log.ended[i] is None:
                state = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), host)
                checkpointer.save(step, state, about | {"step": step, "tokens_seen": log.tokens_seen[i]})
        log.restart_clock()


class _Log:
    """Takes the metrics of each step, reads them one step late, and writes each trial's own file."""

    def __init__(
        self,
        config: TrainConfig,
        trials: Sequence[Trial],
        sources: tuple[str, ...],
        tokens_per_step: int,
        workdir: Path,
        stack: contextlib.ExitStack,
    ):
        self._config, self._trials, self._sources, self._tokens = config, trials, sources, tokens_per_step
        self._writers = []
        for trial in trials:
            folder = workdir / trial.name
            folder.mkdir(parents=True, exist_ok=True)
            writer = JsonlWriter(folder / METRICS_FILE)
            stack.callback(writer.close)
            self._writers.append(writer)
        self._losses: list[list[float]] = [[] for _ in trials]
        self.tokens_seen = [0] * len(trials)
        self._evaluation: list[float | None] = [None] * len(trials)
        self.ended: list[int | None] = [None] * len(trials)
        self._waiting: tuple[int, Metrics] | None = None
        self._clock, self._seconds = 0.0, 0.0

    @property
    def all_ended(self) -> bool:
        """Whether no trial is left that is finite."""
        return all(step is not None for step in self.ended)

    def add(self, step: int, metrics: Metrics) -> None:
        """Reads the metrics that were added before, and keeps these."""
        self.drain()
        self._waiting = (step, metrics)

    def drain(self) -> None:
        """Reads what waits."""
        if self._waiting is None:
            return
        (step, arrays), self._waiting = self._waiting, None
        metrics = jax.device_get(arrays)
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        share = seconds / len(self._trials)
        if step > 1:  # the first compiles
            self._seconds += share
        for i in range(len(self._trials)):
            if self.ended[i] is None:
                self._take(i, step, {name: value[i] for name, value in metrics.items()}, share if step > 1 else None)

    def _take(self, i: int, step: int, metrics: dict[str, np.ndarray], seconds: float | None) -> None:
        sources = zip(self._sources, metrics.pop("source_loss"), metrics.pop("source_tokens"), strict=True)
        line = {name: float(value) for name, value in metrics.items()}
        self._losses[i].append(line["loss"])
        self.tokens_seen[i] += int(line["tokens"])
        if line["nonfinite_run"] >= self._config.max_consecutive_nonfinite:
            self.ended[i] = step
        if step % self._config.log_every == 0 or step in (1, self._config.steps) or self.ended[i]:
            line |= {f"loss/{name}": float(loss) for name, loss, tokens in sources if tokens > 0}
            line["tokens_seen"] = self.tokens_seen[i]
            if seconds:
                line |= {"seconds_per_step": seconds, "tokens_per_second": self._tokens / seconds}
            self._writers[i].write(step, line)

    def write_evaluation(self, step: int, losses: np.ndarray) -> None:
        """Records the held-out loss of the trials that are still finite."""
        for i, loss in enumerate(losses):
            if self.ended[i] is None:
                self._evaluation[i] = float(loss) if np.isfinite(loss) else None
                self._writers[i].write(step, {"eval/loss": float(loss)})
        self.restart_clock()

    def flush(self) -> None:
        """Waits until all lines are on the disk."""
        for writer in self._writers:
            writer.flush()

    def restart_clock(self) -> None:
        """What went before is no part of the next step's time."""
        self._clock = time.perf_counter()

    def results(self, states: TrainState) -> list[TrialResult]:
        """What came of each trial."""
        return [
            TrialResult(
                name=trial.name,
                status="done" if self.ended[i] is None else "diverged",
                steps=self.ended[i] or self._config.steps,
                losses=np.array(self._losses[i]),
                eval_loss=self._evaluation[i] if self.ended[i] is None else None,
                state=jax.tree.map(lambda leaf, i=i: leaf[i], states),
                seconds=self._seconds,
            )
            for i, trial in enumerate(self._trials)
        ]
