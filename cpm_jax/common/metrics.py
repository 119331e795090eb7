"""Where the figures of a run go: `metrics.jsonl`, which survives kills, and TensorBoard.

A line of `metrics.jsonl` is one JSON object: `step` and the scalars logged at that step. Training figures have plain
names (`loss`, `loss/<source>`, `grad_norm`), those of held-out data begin with `eval/`. A run that goes on from a
checkpoint first drops the lines after the checkpoint's step, so that the file holds every step once, whatever happened.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cpm_jax.common.files import write_text

METRICS_FILE = "metrics.jsonl"


class MetricWriter(Protocol):
    """Takes the scalars of a step."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the scalars of one step."""

    def flush(self) -> None:
        """Makes what was written safe from the death of this process and of the machine."""

    def close(self) -> None:
        """Flushes and releases the file."""


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads a `metrics.jsonl`.

    Args:
        path: the file; a missing one has no lines.

    Returns:
        One dict a line. Non-finite values come back as None. A last line that a kill cut short is left out.

    Raises:
        ValueError: naming a line, other than the last, that is not a JSON object with a step.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was cut short, or is empty
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object with a step: {line[:80]!r}") from error
        rows.append(row)
    return rows


class JsonlWriter:
    """Appends a JSON line a step, each in one write, so that a kill loses at most a part of the last line."""

    def __init__(self, path: str | os.PathLike[str], resume_step: int = 0):
        """Opens the file, and drops the lines after the step that the run goes on from.

        Args:
            path: the file, made where it is missing.
            resume_step: step of the restored state, 0 for a new run.
        """
        rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = Path(path).open("ab", buffering=0)  # noqa: SIM115 (close() closes it)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line; a non-finite value is written as null, which JSON has and NaN is not."""
        row = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps(row).encode() + b"\n")

    def flush(self) -> None:
        """Waits until the lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes the file."""
        self.flush()
        self._file.close()


class TensorBoardWriter:
    """Writes TensorBoard event files."""

    def __init__(self, directory: str | os.PathLike[str], resume_step: int = 0):
        """Opens a new event file that tells TensorBoard to forget what older ones say after `resume_step`."""
        import tensorboardX  # only the writing process needs it

        self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the scalars; TensorBoard shows non-finite ones as gaps."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Hands the events to the file system."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class MultiWriter:
    """Writes to several writers; to none, it is the writer of processes that do not log."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = tuple(writers)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Passes the scalars on."""
        for writer in self._writers:
            writer.write(step, metrics)

    def flush(self) -> None:
        """Flushes all writers."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes all writers."""
        for writer in self._writers:
            writer.close()


def make_metric_writer(workdir: str | os.PathLike[str], resume_step: int = 0, process_index: int = 0) -> MetricWriter:
    """The writer of a run: `metrics.jsonl` and `tensorboard/` on process 0, nothing on the others.

    Args:
        workdir: folder of the run.
        resume_step: step of the restored state, 0 for a new run.
        process_index: index of this process among the hosts.
    """
    if process_index != 0:
        return MultiWriter(())
    workdir = Path(workdir)
    return MultiWriter(
        (JsonlWriter(workdir / METRICS_FILE, resume_step), TensorBoardWriter(workdir / "tensorboard", resume_step))
    )
