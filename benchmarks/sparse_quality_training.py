"""Published weights trained further with sparse attention, and dense on the same tokens as a control."""

import functools
import json
import math
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from benchmarks.block_rules import sparse_config, token_losses
from benchmarks.compile_ahead import CompileAhead
from benchmarks.custom_attention import Implementation, attention_by_config, make_step
from benchmarks.results import origin
from benchmarks.sparse_quality_texts import TRAIN_LENGTH
from cpm_jax.checkpoints.manager import Checkpointer
from cpm_jax.common.files import write_json
from cpm_jax.common.progress import Progress
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.decoder import Params
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import cosine
from cpm_jax.training.train_state import TrainState, state_from_params

TRAIN_BLOCKS = 8
CHUNK = 10  # steps of a call of the compiled program
HELD_OUT_EVERY = 50  # steps
PEAK_LR = 1e-4


class OutOfTimeError(Exception):
    """The time that was given is over; what was done is kept."""


class Plan(NamedTuple):
    """What one training does.

    Attributes:
        config: the model.
        sparse: its attention in training; None is dense.
        steps: a multiple of `CHUNK`.
        batch_size: rows of a step.
        implementation: of attention and loss.
    """

    config: ModelConfig
    sparse: SparseConfig | None
    steps: int
    batch_size: int
    implementation: Implementation

    @property
    def optimizer(self) -> Any:
        """AdamW."""
        return make_optimizer(OptimizerConfig(), cosine(PEAK_LR, self.steps, max(self.steps // 10, 1)), self.config)


def _steps(plan: Plan, state: TrainState, rows: Int[jax.Array, "n B T+1"]) -> tuple[TrainState, Float[jax.Array, " n"]]:
    attend = attention_by_config(plan.sparse, plan.implementation)
    step = make_step(plan.config, plan.optimizer, attend, plan.implementation)

    def one(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        weights = jnp.ones((tokens.shape[0], TRAIN_LENGTH))
        return step(state, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_weights": weights})

    return jax.lax.scan(one, state, rows)


def _held_out(plan: Plan, sparse: SparseConfig | None, params: Params, tokens: jax.Array) -> jax.Array:
    """The mean loss of each row's second half, where there is something to choose."""
    attend = attention_by_config(sparse, plan.implementation)

    def one(tokens: jax.Array) -> jax.Array:
        losses, _ = token_losses(plan.config, attend, params, tokens[None], implementation=plan.implementation)
        return losses[0, TRAIN_LENGTH // 2 :].mean()

    return jax.lax.map(one, tokens)


class Programs(NamedTuple):
    """The compiled ones of a training: its steps, and its losses on held-out rows run dense and sparse."""

    steps: Future[Any]
    held_out: dict[str, Future[Any]]


def prepare(plan: Plan, params: Params, num_held_out: int, ahead: CompileAhead) -> Programs:
    """Begins to compile what `train` calls."""
    shape = (CHUNK, plan.batch_size, TRAIN_LENGTH + 1)
    rows, tokens = (jax.ShapeDtypeStruct(x, jnp.int32) for x in (shape, (num_held_out, TRAIN_LENGTH + 1)))

    def state() -> TrainState:
        return jax.eval_shape(functools.partial(state_from_params, optimizer=plan.optimizer), params)

    # Products as the device usually takes them: this is where most of the time goes.
    steps = ahead.get(
        ("steps", plan), functools.partial(_steps, plan), lambda: (state(), rows), donate=(0,), precision=None
    )
    held_out = {
        name: ahead.get(
            ("held out", plan._replace(sparse=None), sparse),
            functools.partial(_held_out, plan, sparse),
            lambda: (jax.eval_shape(lambda: params), tokens),
        )
        for name, sparse in (("dense", None), ("sparse", sparse_config("lse", TRAIN_BLOCKS)))
    }
    return Programs(steps, held_out)


def train(
    plan: Plan,
    params: Params,
    rows: Int[np.ndarray, "n T+1"],
    held_out: Int[np.ndarray, "m T+1"],
    folder: Path,
    programs: Programs,
    deadline: float = math.inf,
) -> Params:
    """Trains, or goes on with it.

    What it came to is kept in `training.json`: "curve", a list of [step, loss of each held-out row run dense, and run
    sparse], "losses" of each step on its own rows, and the `origin`.

    Args:
        plan: what to do.
        params: to begin with.
        rows: to train on, in this order, and again from the first.
        held_out: to measure on, on the way.
        folder: for the checkpoint and what it came to.
        programs: from `prepare`.
        deadline: by `time.monotonic()`, when to end.

    Returns:
        The trained parameters.

    Raises:
        OutOfTimeError: the deadline has passed; the state so far is kept.
    """
    step, curve, losses = 0, [], []
    with Checkpointer(folder / "checkpoints") as checkpointer:
        state = jax.eval_shape(functools.partial(state_from_params, optimizer=plan.optimizer), params)
        restored = checkpointer.restore_latest(state)
        if restored is not None:
            state, step, curve, losses = restored.state, restored.step, restored.meta["curve"], restored.meta["losses"]
        else:
            state = state_from_params(jax.tree.map(jnp.copy, params), plan.optimizer)  # its own are donated

        def look() -> None:
            found = {name: np.asarray(run.result()(state.params, held_out)) for name, run in programs.held_out.items()}
            curve.append([step, *(found[name].tolist() for name in ("dense", "sparse"))])

        def save() -> None:
            checkpointer.save(step, state, {"step": step, "curve": curve, "losses": losses})

        run = programs.steps.result()
        if step == 0:
            look()
        with Progress(folder.name, plan.steps, initial=step) as bar:
            while step < plan.steps:
                if time.monotonic() > deadline:
                    save()
                    raise OutOfTimeError
                numbers = np.arange(step * plan.batch_size, (step + CHUNK) * plan.batch_size) % len(rows)
                state, new = run(state, rows[numbers].reshape(CHUNK, plan.batch_size, -1))
                step += CHUNK
                losses += np.asarray(new).tolist()
                bar.update(step, loss=losses[-1])
                if step % HELD_OUT_EVERY == 0 or step == plan.steps:
                    look()
        if not (folder / "training.json").exists():
            save()
            write_json(folder / "training.json", {"curve": curve, "losses": losses, **origin()})
        return state.params


def curve_of(folder: Path) -> list[tuple[int, list[float], list[float]]]:
    """What `train` kept in a folder: step, and of each held-out row the loss run dense and run sparse."""
    return [tuple(point) for point in json.loads((folder / "training.json").read_text("utf-8"))["curve"]]
