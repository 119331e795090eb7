"""Makes questions and has them answered, both kept on disk, so that a run that was killed goes on where it was."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cpm_jax.common.files import write_text
from cpm_jax.evaluation.errors import ResumeError
from cpm_jax.evaluation.results import Estimate, Item, ItemWriter, Measured, estimates, items_path, read_items
from cpm_jax.evaluation.ruler.question import PromptFormat, Question
from cpm_jax.evaluation.ruler.scoring import by_depth, score
from cpm_jax.evaluation.ruler.tasks import TASKS, Materials, make_question

QUESTIONS_DIR = "questions"
METRIC = "score"


class Answers(Protocol):
    """Who answers: `adapter.AdapterAnswers` or `endpoint.EndpointAnswers`."""

    prompt_format: PromptFormat

    def stream(self, questions: Sequence[Question]) -> Iterator[tuple[Question, str]]:
        """Answers questions, yielding each with its answer, in any order."""
        ...


def settings_of(materials: Materials, max_new_tokens: int) -> dict[str, Any]:
    """What decides the questions besides task, length and index, as JSON has it."""
    return {
        "haystack_sha256": materials.haystack.sha256,
        "tokenizer_sha256": materials.prompt_format.tokenizer.sha256,
        "turns": materials.prompt_format.turns,
        "depths": list(materials.depths),
        "seed": materials.seed,
        "qa_sha256": materials.qa.sha256 if materials.qa else "",
        "max_gen_tokens": max_new_tokens,
    }


def cell_name(task: str, length: int) -> str:
    """The name of a task's questions of one length, in files and tables: "niah_single_4096"."""
    return f"{task}_{length}"


def load_questions(
    materials: Materials,
    task: str,
    length: int,
    count: int,
    folder: Path,
    *,
    max_new_tokens: int = 0,
    on_question: Callable[[], None] = lambda: None,
) -> list[Question]:
    """Reads the questions of a task and length that the folder has, and makes and keeps those that are missing.

    Args:
        materials: what they are made of.
        task: a key of `TASKS`.
        length: tokens that prompt and answer may have together.
        count: how many questions; more that the folder may have are left alone.
        folder: of the evaluation.
        max_new_tokens: of an answer; 0 is what the task says.
        on_question: called after each.

    Raises:
        TaskError: they do not fit.
    """
    path = folder / QUESTIONS_DIR / f"{cell_name(task, length)}.jsonl"
    stamp = hashlib.sha256(json.dumps(settings_of(materials, max_new_tokens)).encode()).hexdigest()
    questions = _read_questions(path, stamp)
    write_text(path, "".join(_line(question, stamp) for question in questions.values()))
    with path.open("a", encoding="ascii", buffering=1) as file:
        for index in range(count):
            if index not in questions:
                questions[index] = make_question(materials, task, length, index, max_new_tokens)
                file.write(_line(questions[index], stamp))
            on_question()
    return [questions[index] for index in range(count)]


def _line(question: Question, stamp: str) -> str:
    return json.dumps({"made_with": stamp} | dataclasses.asdict(question)) + "\n"


def _read_questions(path: Path, stamp: str) -> dict[int, Question]:
    """Those that were made with the same settings; a last line that a kill cut short is none."""
    questions = {}
    for line in path.read_text("ascii").split("\n")[:-1] if path.exists() else ():
        row = json.loads(line)
        if row.pop("made_with") == stamp:
            row |= {name: tuple(row[name]) for name in ("answers", "depths")}
            questions[row["index"]] = Question(**row)
    return questions


def answer_questions(
    questions: Sequence[Question],
    answers: Answers,
    folder: Path,
    *,
    on_item: Callable[[Item], None] = lambda item: None,
) -> list[Item]:
    """Has the questions answered that the folder has no answer to.

    Args:
        questions: of one task and length.
        answers: who answers.
        folder: of the evaluation; an answer is kept as soon as it is known.
        on_item: called with each new item.

    Raises:
        ResumeError: the folder has answers to other questions.
    """
    path = items_path(folder, cell_name(questions[0].task, questions[0].length))
    items = read_items(path)
    for question in questions:
        if question.index in items and items[question.index].doc_hash != question.sha256:
            raise ResumeError(
                f"{path} has an answer to another question {question.index}: give this evaluation a folder of its own"
            )
    with ItemWriter(path, items.values()) as writer:
        pending = [question for question in questions if question.index not in items]
        for question, text in answers.stream(pending):
            item = Item(
                index=question.index,
                doc_hash=question.sha256,
                prompt="",  # it lies in questions/, and is long
                choices=(),
                target=", ".join(question.answers),
                responses=(text,),
                metrics={METRIC: Measured(score(question, text))},
            )
            writer.write([item])
            items[question.index] = item
            on_item(item)
    return [items[question.index] for question in questions]


def summarize(questions: Sequence[Question], items: Sequence[Item], depths: Sequence[float]) -> dict[str, Any]:
    """What results.json says of a task and length."""
    texts = {item.index: item.responses[0] for item in items}
    tokens = [question.num_tokens for question in questions]
    return {
        "score": _figure(estimates(items)[METRIC]),
        "by_depth": {str(depth): _figure(cell) for depth, cell in by_depth(questions, texts, depths).items()},
        "match": TASKS[questions[0].task].match,
        "prompt_tokens": [min(tokens), max(tokens)],
        "max_new_tokens": max(question.max_new_tokens for question in questions),
    }


def mean_over_tasks(figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of several tasks' scores; its standard error takes the tasks as fixed and their items as draws."""
    values, errors = [figure["value"] for figure in figures], [figure["standard_error"] for figure in figures]
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(values) if len(known) == len(values) else None
    return {"value": sum(values) / len(values), "standard_error": error, "n": sum(figure["n"] for figure in figures)}


def _figure(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "standard_error": estimate.standard_error, "n": estimate.n}
