"""The training loop: restore, step, log, evaluate, save, until done, asked to stop, or something is wrong.

What it guarantees is in docs/fault_tolerance.md: killed at any moment, the same call goes on from the newest checkpoint
and ends with the weights that an unbroken run has, bit for bit, on the same devices.
"""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from cpm_jax.checkpoints.averaging import write_average
from cpm_jax.checkpoints.manager import CHECKPOINTS_DIR, CheckpointConfig, Checkpointer, Restored, list_steps
from cpm_jax.common import exit_codes, provenance
from cpm_jax.common.config import (
    ConfigError,
    InputError,
    config_dataclass,
    config_differences,
    config_from_dict,
    config_to_dict,
)
from cpm_jax.common.metrics import MetricWriter, make_metric_writer
from cpm_jax.common.progress import Progress
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import train_flops_per_token
from cpm_jax.training.distillation import load_teacher
from cpm_jax.training.losses import Batch, LossConfig, LossSums
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.preemption import StopRequest
from cpm_jax.training.profiling import Profiler
from cpm_jax.training.schedules import ScheduleConfig, make_schedule
from cpm_jax.training.throughput import Throughput
from cpm_jax.training.train_state import TrainState, abstract_state, init_state
from cpm_jax.training.train_step import Metrics, check_batch_size, make_eval_step, make_train_step, put_batch
from cpm_jax.training.watchdog import Watchdog

AVERAGED_DIR = "averaged"  # within a workdir
STACKS_FILE = "stacks.txt"  # within a workdir

_GC_EVERY = 1000  # steps; Python's own moments would differ between hosts, and each host waits for the slowest

logger = logging.getLogger(__name__)


class NonFiniteError(exit_codes.Stop):
    """Too many steps in a row had a loss or gradient that is not finite."""

    def __init__(self, message: str):
        super().__init__(exit_codes.NON_FINITE, message)


@config_dataclass
class TrainConfig:
    """How long to train, and what happens besides.

    Attributes:
        steps: optimizer steps in all, those before a restart too.
        batch_size: rows of a global batch.
        num_microbatches: parts of the batch whose gradients are accumulated one after the other, to save memory.
        seed: of the initial parameters and the order of the data.
        log_every: steps between lines in metrics.jsonl.
        eval_every: steps between evaluations on held-out data, and one at the end; 0 for none.
        eval_batches: batches of an evaluation; 0 takes all the held-out data.
        max_consecutive_nonfinite: this many steps in a row that are not finite end the run. Each is skipped and
            counted; parameters stay as they were.
        watchdog_seconds: without a step in this time the process dumps its stacks and exits; 0 switches it off.
        watchdog_compile_seconds: the same for what compiles or restores: the first step, the first evaluation.
        profile_start: step after which `jax.profiler` traces; None traces nothing.
        profile_steps: number of traced steps.
        average_last: writes the average of this many of the newest checkpoints to `averaged/` at the end; 0 for none.
        compilation_cache_dir: folder in which JAX keeps compiled programs for the next start; "" leaves JAX's
            own setting (JAX_COMPILATION_CACHE_DIR).
    """

    steps: PositiveInt
    batch_size: PositiveInt
    num_microbatches: PositiveInt = 1
    seed: NonNegativeInt = 0
    log_every: PositiveInt = 10
    eval_every: NonNegativeInt = 0
    eval_batches: NonNegativeInt = 50
    max_consecutive_nonfinite: PositiveInt = 10
    watchdog_seconds: NonNegativeFloat = 900.0
    watchdog_compile_seconds: NonNegativeFloat = 7200.0
    profile_start: NonNegativeInt | None = None
    profile_steps: PositiveInt = 3
    average_last: NonNegativeInt = 0
    compilation_cache_dir: str = ""


class Batches(Protocol):
    """An iterator of batches that may hold processes and files until it is closed."""

    def __iter__(self) -> Iterator[Batch]:
        """Returns itself."""

    def __next__(self) -> Batch:
        """The next batch."""

    def close(self) -> None:
        """Ends reading."""


@dataclasses.dataclass(frozen=True)
class TrainData:
    """What a run reads.

    Attributes:
        batches: gives this process's rows of the batches of the steps from the given one on.
        eval_batches: gives those of the held-out data, from its beginning; None where there is none.
        sources: names of the mixture components, which `source_ids` index.
        seq_len: T of a batch.
    """

    batches: Callable[[int], Batches]
    eval_batches: Callable[[], Batches] | None
    sources: tuple[str, ...]
    seq_len: int


def train(
    config: TrainConfig,
    *,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    loss: LossConfig,
    checkpoint: CheckpointConfig,
    data: TrainData,
    mesh: Mesh,
    workdir: Path,
    fixed: Mapping[str, Any],
    initial_state: Callable[[TrainState], Restored] | None = None,
) -> int:
    """Trains, from the newest checkpoint in the workdir where there is one.

    Args:
        config: how long, and what besides.
        model: the model.
        optimizer: the optimizer.
        schedule: learning rate; a restart may change its future, not its past.
        loss: weights of the losses, and a teacher.
        checkpoint: when to save and what to keep.
        data: batches.
        mesh: from `common.sharding.make_mesh`; a restart may change it.
        workdir: folder of the run.
        fixed: settings, as JSON, that must be the same at each restart.
        initial_state: gives the first state, laid out as the abstract one it is called with, and `tokens_seen` as
            its metadata; None draws parameters by the seed. "imported" in its metadata, what an imported model was
            published with, goes into all checkpoints of this run.

    Returns:
        Number of steps that this call took; 0 says that the run was done.

    Raises:
        ConfigError: sizes do not fit each other, or settings changed since the last start.
        InputError: data or checkpoints cannot be read.
        NonFiniteError: too many steps in a row were not finite.
        exit_codes.Stop: PREEMPTED, after SIGTERM or SIGINT and a save.
    """
    if config.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", config.compilation_cache_dir)
    check_batch_size(config.batch_size, data.seq_len, mesh, config.num_microbatches)
    tokens_per_step = config.batch_size * data.seq_len
    update = make_optimizer(optimizer, schedule, model)
    about = describe_run(model, schedule, fixed, tokens_per_step, mesh)
    same = about | {"train": config_to_dict(config), "checkpoint": config_to_dict(checkpoint)}
    _check_same_everywhere({key: value for key, value in same.items() if key not in ("git_revision", "versions")})

    abstract = abstract_state(model, update, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        watchdog = stack.enter_context(Watchdog(config.watchdog_seconds, workdir / STACKS_FILE))
        watchdog.beat("restoring", config.watchdog_compile_seconds)
        checkpointer = stack.enter_context(Checkpointer(workdir / CHECKPOINTS_DIR, checkpoint))
        restored = checkpointer.restore_latest(abstract, lambda meta: _check_unchanged(meta, about))
        if restored is None:
            restored = (
                initial_state(abstract)
                if initial_state
                else Restored(0, init_state(model, update, jax.random.key(config.seed), mesh), {"tokens_seen": 0})
            )
            if restored.step >= config.steps:
                raise ConfigError(
                    f"TrainConfig.steps = {config.steps}: the state to start from is at step {restored.step} already; "
                    "steps count from the beginning of its run, so give more than that",
                    field="TrainConfig.steps",
                )
        state, step = restored.state, restored.step
        if "imported" in restored.meta:
            about["imported"] = restored.meta["imported"]

        writer = make_metric_writer(workdir, step, jax.process_index())
        stack.callback(writer.close)
        progress = stack.enter_context(
            Progress(
                "train",
                config.steps,
                initial=step,
                tokens_per_step=tokens_per_step,
                enabled=jax.process_index() == 0,
            )
        )
        progress.write(f"{workdir}: {f'going on from step {step}' if step else 'starting'}")
        throughput = Throughput(tokens_per_step, train_flops_per_token(model, data.seq_len))
        log = _StepLog(config, data.sources, writer, progress, throughput, watchdog, restored.meta["tokens_seen"])
        evaluate = _make_evaluate(config, model, data, mesh)
        teacher = None
        if loss.distillation is not None:
            teacher = load_teacher(loss.distillation, model, mesh, fixed.get("tokenizer_sha256"))
        train_step = _train_step(
            model,
            optimizer,
            schedule,
            loss,
            len(data.sources),
            config.num_microbatches,
            mesh,
            teacher.config if teacher else None,
        )
        frozen = (teacher.params,) if teacher else ()
        stack.enter_context(_quiet_gc())
        profiler = stack.enter_context(Profiler(config.profile_start, config.profile_steps, workdir))

        watchdog.beat("the first step", config.watchdog_compile_seconds)
        batches = stack.enter_context(contextlib.closing(data.batches(step)))
        for batch in islice(batches, max(config.steps - step, 0)):
            profiler.before(step)
            state, metrics = train_step(state, put_batch(batch, mesh), *frozen)
            step += 1
            log.add(step, metrics)  # waits for the step before, so that the device always has one to go on with
            checkpointer.check_for_errors()
            last, stopping = step == config.steps, stop.requested(step)
            if profiler.ends(step):
                log.drain()
                profiler.stop()
            if evaluate and (last or step % config.eval_every == 0):
                log.drain()
                watchdog.beat("evaluation", config.watchdog_compile_seconds)
                writer.write(step, evaluate(state.params))
                throughput.restart(step)
            if last or stopping or step % checkpoint.every == 0:
                log.drain()
                writer.flush()  # the lines up to this step are on disk before a checkpoint that makes them final
                watchdog.beat("saving", config.watchdog_compile_seconds)
                checkpointer.save(step, state, about | {"step": step, "tokens_seen": log.tokens_seen})
                throughput.restart(step)
            if stopping and not last:
                checkpointer.wait()
                raise exit_codes.Stop(
                    exit_codes.PREEMPTED, f"stopped and saved at step {step}; the same command goes on from there"
                )
            if step % _GC_EVERY == 0:
                gc.collect()
        checkpointer.wait()
        if step < config.steps:
            raise InputError(f"the data ended at step {step}, {config.steps} were asked for")
        if config.average_last and list_steps(workdir / AVERAGED_DIR) != [config.steps]:
            watchdog.beat("averaging", config.watchdog_compile_seconds)
            write_average(workdir, workdir / AVERAGED_DIR, last=config.average_last, abstract_params=abstract.params)
    return step - restored.step


def describe_run(
    model: ModelConfig, schedule: ScheduleConfig, fixed: Mapping[str, Any], tokens_per_step: int, mesh: Mesh
) -> dict[str, Any]:
    """What a run's checkpoints say of it, as JSON, beside `step` and `tokens_seen`.

    Args:
        model: the model.
        schedule: learning rate.
        fixed: settings that must be the same at each restart.
        tokens_per_step: of all processes.
        mesh: that it runs on.
    """
    about = {
        "model": config_to_dict(model),
        "schedule": config_to_dict(schedule),
        "fixed": json.loads(json.dumps(fixed)),
        "tokens_per_step": tokens_per_step,
        "git_revision": provenance.git_revision(),
        "versions": provenance.versions(),
        "mesh": dict(mesh.shape),
        "process_count": jax.process_count(),
    }
    return about | {"config_sha256": _sha256([about["model"], about["fixed"]])}


# Runs that one process makes after each other, of the same sizes and schedule, share their compiled programs.
@functools.lru_cache(maxsize=4)
def _train_step(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    loss: LossConfig,
    num_sources: int,
    num_microbatches: int,
    mesh: Mesh,
    teacher: ModelConfig | None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    update = make_optimizer(optimizer, schedule, model)
    return make_train_step(
        model,
        update,
        loss=loss,
        num_sources=num_sources,
        num_microbatches=num_microbatches,
        mesh=mesh,
        teacher=teacher,
    )


@functools.lru_cache(maxsize=4)
def _eval_step(model: ModelConfig, num_sources: int, mesh: Mesh) -> Callable[[Any, Batch], LossSums]:
    return make_eval_step(model, num_sources=num_sources, mesh=mesh)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_same_everywhere(settings: Any) -> None:
    """Refuses processes with different settings, which would wait for each other in different places.

    Raises:
        ConfigError: in all processes, naming those that differ from process 0.
    """
    ours = np.frombuffer(bytes.fromhex(_sha256(settings)), np.uint8)
    hashes = np.reshape(multihost_utils.process_allgather(ours), (-1, ours.size))
    if others := [str(i) for i, theirs in enumerate(hashes) if (theirs != hashes[0]).any()]:
        raise ConfigError(
            f"of {len(hashes)} processes number {', '.join(others)} have other settings than number 0: start the same "
            "command, with the same files, on every host"
        )


# They decide how the arithmetic is laid out, not what it is.
_FREE_MODEL_FIELDS = ("remat", "scan_layers")
_SETTINGS = {"model": ModelConfig, "optimizer": OptimizerConfig, "loss": LossConfig}


def _check_unchanged(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuses to go on with a checkpoint of a run with other settings.

    Args:
        old: metadata of the checkpoint.
        new: what this start would write.

    Raises:
        ConfigError: naming each setting that changed, with both values.
    """

    def settings(meta: Mapping[str, Any]) -> dict[str, Any]:
        found = meta["fixed"] | {"model": meta["model"]}
        for name, cls in _SETTINGS.items():
            if name in found:  # a field that is younger than the checkpoint had its default
                found[name] = config_to_dict(config_from_dict(cls, found[name]))
        return found | {"model": {k: v for k, v in found["model"].items() if k not in _FREE_MODEL_FIELDS}}

    changed = [
        f"  {name}: {was!r} at the last start, now {now!r}"
        for name, (was, now) in config_differences(settings(old), settings(new)).items()
    ]
    rate_was, rate_is = (make_schedule(config_from_dict(ScheduleConfig, meta["schedule"])) for meta in (old, new))
    for step in np.unique(np.linspace(0, old["step"] - 1, 200).astype(int)):
        was, now = float(rate_was(int(step))), float(rate_is(int(step)))
        if was != now:
            changed.append(f"  schedule: the learning rate of step {step} was {was:.6g}, now {now:.6g}")
            break
    if changed:
        raise ConfigError(
            f"the workdir holds a run at step {old['step']} with other settings:\n" + "\n".join(changed) + "\n"
            "Give them back their values, or use another --workdir (with init_from to start from this run's weights). "
            "Numbers of steps to come, logging, evaluation, checkpoints, mesh, remat and scan_layers may change."
        )


class _StepLog:
    """Takes the metrics of each step, and reads them one step late."""

    def __init__(
        self,
        config: TrainConfig,
        sources: tuple[str, ...],
        writer: MetricWriter,
        progress: Progress,
        throughput: Throughput,
        watchdog: Watchdog,
        tokens_seen: int,
    ):
        self.tokens_seen = tokens_seen
        self._config, self._sources = config, sources
        self._writer, self._progress, self._throughput, self._watchdog = writer, progress, throughput, watchdog
        self._waiting: tuple[int, dict[str, jax.Array]] | None = None
        self._first = True

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Reads the metrics that were added before, and keeps these."""
        self.drain()
        self._waiting = (step, metrics)

    def drain(self) -> None:
        """Reads what waits.

        Raises:
            NonFiniteError: too many steps in a row were not finite.
        """
        if self._waiting is None:
            return
        (step, arrays), self._waiting = self._waiting, None
        metrics = jax.device_get(arrays)  # waits until the device has done the step
        self._watchdog.beat(f"step {step + 1}")
        self.tokens_seen += int(metrics["tokens"])
        self._progress.update(step, loss=float(metrics["loss"]), lr=float(metrics["lr"]))
        run, limit = int(metrics["nonfinite_run"]), self._config.max_consecutive_nonfinite
        if run:
            logger.warning("step %s skipped: loss or gradient is not finite (%s in a row)", step, run)
        if self._first:  # its time is that of compiling
            self._throughput.restart(step)
        if step % self._config.log_every == 0 or step in (1, self._config.steps) or run >= limit:
            self._writer.write(step, self._line(step, metrics))
        self._first = False
        if run >= limit:
            raise NonFiniteError(
                f"{run} steps in a row up to step {step} had a loss or gradient that is not finite "
                f"(max_consecutive_nonfinite = {limit}). Starting again would repeat them: go on from an earlier "
                "checkpoint with a lower learning rate, or look at the data of these steps."
            )

    def _line(self, step: int, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        sources = zip(self._sources, metrics.pop("source_loss"), metrics.pop("source_tokens"), strict=True)
        line = {name: float(value) for name, value in metrics.items()}
        line |= {f"loss/{name}": float(loss) for name, loss, tokens in sources if tokens > 0}
        line["tokens_seen"] = self.tokens_seen
        return line if self._first else line | self._throughput.read(step)


def _make_evaluate(
    config: TrainConfig, model: ModelConfig, data: TrainData, mesh: Mesh
) -> Callable[[Any], dict[str, float]] | None:
    """A function of the parameters that gives the mean loss on held-out data; None where it is not asked for."""
    if not config.eval_every or data.eval_batches is None:
        return None
    held_out = data.eval_batches
    eval_step = _eval_step(model, len(data.sources), mesh)

    def evaluate(params: Any) -> dict[str, float]:
        nll, weight = np.zeros(len(data.sources)), np.zeros(len(data.sources))
        with contextlib.closing(held_out()) as batches:
            for batch in islice(batches, config.eval_batches or None):
                sums = jax.device_get(eval_step(params, put_batch(batch, mesh)))
                nll += sums.source_nll
                weight += sums.source_weight
        if not weight.sum():
            raise InputError("the held-out data has no token to evaluate on; set eval_every = 0 to go without")
        result = {"eval/loss": float(nll.sum() / weight.sum()), "eval/tokens": float(weight.sum())}
        return result | {
            f"eval/loss/{name}": float(n / w) for name, n, w in zip(data.sources, nll, weight, strict=True) if w
        }

    return evaluate


@contextlib.contextmanager
def _quiet_gc() -> Iterator[None]:
    """Leaves garbage collection to the loop."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
