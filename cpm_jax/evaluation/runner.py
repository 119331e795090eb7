"""Runs tasks over a model into a folder, so that a run that was killed goes on with the items that are left."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cpm_jax.common.files import write_text
from cpm_jax.common.progress import Progress
from cpm_jax.evaluation.errors import ResumeError
from cpm_jax.evaluation.results import (
    REJECTS_DIR,
    Item,
    ItemWriter,
    estimates,
    file_name,
    items_path,
    read_items,
)
from cpm_jax.evaluation.tasks import Task

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the prompts and outputs, besides the model and the tasks.

    Attributes:
        num_fewshot: examples in each prompt; None is what each task says.
        chat: whether prompts go through the chat template.
        max_gen_tokens: most tokens of an output; 0 is what each task says.
        seed: of examples, generated questions and draws.
    """

    num_fewshot: int | None = None
    chat: bool = False
    max_gen_tokens: int = 0
    seed: int = 0


class TaskResult(NamedTuple):
    """A task's items and what goes into results.json about them."""

    items: list[Item]
    summary: dict[str, Any]


def build_task(lm: "TemplateLM", task: Task, settings: Settings, *, limit: int = 0) -> None:
    """Makes the prompts of a task.

    Args:
        lm: the model.
        task: which task.
        settings: what decides the prompts.
        limit: items at most, from the first on; 0 is all. Another run may ask for more.

    Raises:
        TaskError: there are fewer examples than the settings ask for.
    """
    task.build(lm, limit=limit, num_fewshot=settings.num_fewshot, chat=settings.chat, seed=settings.seed)


def run_task(lm: "TemplateLM", task: Task, folder: Path, *, batch_size: int = 8) -> TaskResult:
    """Runs the items of a task that the folder does not have yet.

    Args:
        lm: the model; any of lm-eval's will do, except for dataset folders.
        task: what to run, after `build_task`.
        folder: of the evaluation; items are added to it as soon as they are known.
        batch_size: of the model.

    Raises:
        ResumeError: the folder has items of other questions or prompts under the task's name.
    """
    if task.rejects:
        lines = [json.dumps(dataclasses.asdict(reject), ensure_ascii=False) + "\n" for reject in task.rejects]
        write_text(folder / REJECTS_DIR / f"{file_name(task.name)}.jsonl", "".join(lines))
    wanted, path = task.hashes(), items_path(folder, task.name)
    items = read_items(path)
    for index in wanted.keys() & items.keys():
        if (items[index].doc_hash, items[index].prompt) != wanted[index]:
            raise ResumeError(
                f"{path} has item {index} of another question or prompt: the data of {task.name} has changed; give "
                "this evaluation a folder of its own"
            )
    pending = wanted.keys() - items.keys()
    done = [items[index].metrics[task.main_metric] for index in wanted.keys() - pending]
    with ItemWriter(path, items.values()) as writer, Progress(task.name, len(wanted), initial=len(done)) as bar:
        if task.rejects:
            bar.write(f"{task.name}: {len(task.rejects)} records set aside, see {REJECTS_DIR}/")
        count = len(done)
        total, weight = sum(measured.value for measured in done), sum(measured.weight for measured in done)
        for finished in task.run(lm, pending, batch_size=batch_size):
            writer.write(finished)
            items |= {item.index: item for item in finished}
            total += sum(item.metrics[task.main_metric].value for item in finished)
            weight += sum(item.metrics[task.main_metric].weight for item in finished)
            count += len(finished)
            bar.update(count, **{task.main_metric.replace(",", " "): total / weight})
        chosen = [items[index] for index in sorted(wanted)]
        if cut := sum(item.truncated for item in chosen):
            bar.write(f"{task.name}: {cut} of {len(chosen)} items did not fit; their prompts lost the beginning")
        if broken := sum(map(_is_broken, chosen)):
            bar.write(f"{task.name}: {broken} of {len(chosen)} items have likelihoods that are not finite")
    return TaskResult(chosen, _summary(task, chosen))


def _is_broken(item: Item) -> bool:
    """Whether the model gave a likelihood that is no number: its decision then says nothing."""
    numbers = [response[0] if isinstance(response, list) else response for response in item.responses]
    return any(isinstance(number, float) and not math.isfinite(number) for number in numbers)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None  # JSON has no other numbers


def _summary(task: Task, items: Sequence[Item]) -> dict[str, Any]:
    figures = estimates(items)
    chance = float(np.mean([1 / len(item.choices) for item in items])) if all(item.choices for item in items) else None
    return {
        "data": task.data,
        "items": len(items),
        "main_metric": task.main_metric,
        "metrics": {
            name: {"value": _finite(figure.value), "standard_error": _finite(figure.standard_error), "n": figure.n}
            for name, figure in figures.items()
        },
        "higher_is_better": {name: task.higher_is_better(name) for name in figures},
        "chance": chance,
        "num_fewshot": task.num_fewshot,
        "truncated": sum(item.truncated for item in items),
        "not_finite": sum(map(_is_broken, items)),
        "rejected": len(task.rejects),
    }
