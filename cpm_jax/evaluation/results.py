"""Figures of an evaluation: what was measured of each item, on disk as soon as it is known, and their means.

`<folder>/items/<task>.jsonl` holds an `Item` a line. Every figure is a ratio of sums over items: a mean where each item
weighs the same, bits per byte where an item weighs its bytes.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from cpm_jax.common.files import write_text
from cpm_jax.evaluation.errors import ResumeError

ITEMS_DIR = "items"
REJECTS_DIR = "rejects"
RESULTS_FILE = "results.json"


class Measured(NamedTuple):
    """A metric of one item.

    Attributes:
        value: its contribution to the numerator.
        weight: its contribution to the denominator.
    """

    value: float
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a task, and what the model made of it.

    Attributes:
        index: its place in the task.
        doc_hash: SHA-256 of the question with its answer, by which items of two evaluations are known to be the same.
        prompt: what the model was given.
        choices: the continuations whose likelihood was asked for, if it was that.
        target: the right answer.
        responses: what the model gave: [log-likelihood, is greedy] of each choice, or texts.
        metrics: what was measured.
        truncated: whether the prompt lost its beginning because it did not fit.
    """

    index: int
    doc_hash: str
    prompt: str
    choices: tuple[str, ...]
    target: str
    responses: tuple[Any, ...]
    metrics: Mapping[str, Measured]
    truncated: bool = False


class Estimate(NamedTuple):
    """A figure with its uncertainty.

    Attributes:
        value: ratio of the sums of values and weights; a mean, where all weights are 1.
        standard_error: of the value, taking items as independent draws (linearised; s / √n where all weights are 1).
            None of a single item.
        n: number of items.
    """

    value: float
    standard_error: float | None
    n: int

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.value:.4f}{error} (n = {self.n})"


def ratio(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> Estimate:
    """The ratio of two sums over independent items, and its linearised standard error.

    Args:
        values: numerators; at least one.
        weights: denominators, of a positive sum.
    """
    n, total = len(values), float(weights.sum())
    value = float(values.sum()) / total
    if n == 1:
        return Estimate(value, None, n)
    deviations = values - value * weights
    return Estimate(value, math.sqrt(float((deviations**2).sum()) * n / (n - 1)) / total, n)


def estimates(items: Sequence[Item]) -> dict[str, Estimate]:
    """The figure of each metric over items, in the order in which the first item has them."""
    found = {}
    for name in items[0].metrics if items else ():
        measured = np.array([item.metrics[name] for item in items], np.float64)
        found[name] = ratio(measured[:, 0], measured[:, 1])
    return found


def items_path(folder: Path, task: str) -> Path:
    """The file of a task's items."""
    return folder / ITEMS_DIR / f"{file_name(task)}.jsonl"


def file_name(task: str) -> str:
    """A task's name as a file's: `reasoning_gym:chain_sum` as `reasoning_gym.chain_sum`."""
    return task.replace(":", ".").replace("/", ".")


def read_items(path: Path) -> dict[int, Item]:
    """Reads a task's items by their index; a missing file has none, and a last line that a kill cut short is left out.

    Raises:
        ResumeError: a line other than the last is not an item.
    """
    if not path.exists():
        return {}
    lines = path.read_text("utf-8").split("\n")
    items = {}
    for number, line in enumerate(lines[:-1], start=1):  # a whole line ends in "\n": what follows the last is cut short
        try:
            row = json.loads(line)
            row["metrics"] = {name: Measured(*value) for name, value in row["metrics"].items()}
            row |= {name: tuple(row[name]) for name in ("choices", "responses")}
            item = Item(**row)
        except (ValueError, TypeError, KeyError) as error:
            raise ResumeError(f"{path}:{number} is not an item of an evaluation: {error!r}; delete the line") from error
        items[item.index] = item
    return items


class ItemWriter:
    """Appends items to a task's file, each call in one write, so that a kill loses at most a part of the last line."""

    def __init__(self, path: Path, kept: Iterable[Item]):
        """Opens the file, with the items of an earlier run that are whole."""
        write_text(path, "".join(map(_line, kept)))
        self._file = path.open("ab", buffering=0)

    def write(self, items: Iterable[Item]) -> None:
        """Appends items; they outlive this process."""
        self._file.write("".join(map(_line, items)).encode("ascii"))

    def close(self) -> None:
        """Waits until the items are on the disk, and closes the file."""
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> "ItemWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _line(item: Item) -> str:
    # ASCII: texts of a model may hold lone surrogates, and no reader should split a line at U+2028.
    return json.dumps(dataclasses.asdict(item)) + "\n"
