"""Averages of the parameters of several checkpoints, which often evaluate better than the last one alone."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cpm_jax.checkpoints.manager import (
    CHECKPOINTS_DIR,
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    list_steps,
    restore_params,
)


def average_params(
    directory: str | os.PathLike[str], steps: Sequence[int], abstract_params: Any = None
) -> tuple[Any, dict[str, Any]]:
    """Averages parameters, holding two trees at a time; the mean is taken in f32.

    Args:
        directory: a workdir, or its checkpoints directory.
        steps: the checkpoints to average.
        abstract_params: the tree of ShapeDtypeStructs with shardings; None takes the saved shapes, on one device.

    Returns:
        The averaged parameters, in the dtypes of the last step's, and that checkpoint's metadata with `averaged_steps`.

    Raises:
        CheckpointError: if `steps` is empty, or one of them is missing or unreadable.
    """
    directory = _checkpoints_dir(directory)
    if not steps:
        raise CheckpointError("no steps to average were given")
    mean: Any = None
    for count, step in enumerate(sorted(steps), start=1):
        if step not in list_steps(directory):
            present = ", ".join(map(str, list_steps(directory))) or "none"
            raise CheckpointError(f"{directory} has no checkpoint of step {step}; it has: {present}")
        params, meta = restore_params(directory / str(step), abstract_params)
        params_f32 = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        if mean is None:
            mean = params_f32
        else:
            mean = jax.tree.map(lambda m, x, count=count: m + (x - m) / count, mean, params_f32)
    averaged = jax.tree.map(lambda m, x: m.astype(x.dtype), mean, params)
    return averaged, meta | {"averaged_steps": sorted(steps)}


def write_average(
    directory: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    last: int | None = None,
    steps: Sequence[int] = (),
    abstract_params: Any = None,
) -> Path:
    """Writes the average of some checkpoints as a checkpoint of its own, for `generate`, `export` and `sft`.

    It holds parameters only: training can start from it (`init_from`), not go on from it.

    Args:
        directory: a workdir, or its checkpoints directory.
        output_dir: folder to write to; an average of the same last step there is replaced.
        last: averages this many of the newest.
        steps: averages these instead.
        abstract_params: as in `average_params`.

    Returns:
        The folder of the averaged checkpoint.

    Raises:
        CheckpointError: if fewer than `last` checkpoints exist, or one is missing or unreadable.
    """
    source, output = _checkpoints_dir(directory), Path(output_dir)
    if last is not None:
        steps = list_steps(source)[-last:]
        if len(steps) < last:
            raise CheckpointError(f"{source} has {len(steps)} checkpoints, {last} are to be averaged")
    params, meta = average_params(source, steps, abstract_params)
    if jax.process_index() == 0:
        shutil.rmtree(output / str(max(steps)), ignore_errors=True)
    with Checkpointer(output, CheckpointConfig(every=1, keep_last=1, asynchronous=False)) as checkpointer:
        checkpointer.save(max(steps), {"params": params}, meta)
    return output / str(max(steps))


def _checkpoints_dir(directory: str | os.PathLike[str]) -> Path:
    directory = Path(directory)
    return directory / CHECKPOINTS_DIR if (directory / CHECKPOINTS_DIR).is_dir() else directory
