"""The tasks by name, after RULER (Hsieh et al. 2024, arXiv:2404.06654), and the questions of each."""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence

from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.ruler import documents_qa, needles, word_counts
from cpm_jax.evaluation.ruler.documents_qa import QaFile
from cpm_jax.evaluation.ruler.haystack import Haystack
from cpm_jax.evaluation.ruler.question import Draft, Match, PromptFormat, Question, fit

_AFTER_THE_REFERENCE = 8  # tokens that are free after a right answer at least


@dataclasses.dataclass(frozen=True)
class Materials:
    """What questions are made of.

    Attributes:
        haystack: real text.
        prompt_format: what the model is given.
        depths: shares of the context, in [0, 1]; question i asks for something at the depth i mod their number.
        seed: of all draws.
        qa: questions about documents; None makes them about people who do not exist.
    """

    haystack: Haystack
    prompt_format: PromptFormat
    depths: Sequence[float]
    seed: int = 0
    qa: QaFile | None = None


# Of materials, draws, depth, length, size.
Writer = Callable[[Materials, random.Random, float, int, int], Draft]


@dataclasses.dataclass(frozen=True)
class RulerTask:
    """A task.

    Attributes:
        title: what it is, for a reader.
        max_new_tokens: of an answer, as in RULER.
        write: makes a draft of a size.
        match: whether an answer needs all that is asked for (the score is then the share that it has), or one of many.
    """

    title: str
    max_new_tokens: int
    write: Writer
    match: Match = "all"


def _needles(**numbers: int) -> Writer:
    def write(materials: Materials, rng: random.Random, depth: float, length: int, size: int) -> Draft:
        del length
        tokenizer = materials.prompt_format.tokenizer
        return needles.number_needles(materials.haystack, tokenizer, rng, depth, size, **numbers)

    return write


def _qa(materials: Materials, rng: random.Random, depth: float, length: int, size: int) -> Draft:
    del length
    source = documents_qa.people_qa if materials.qa is None else functools.partial(documents_qa.file_qa, materials.qa)
    return source(materials.haystack, materials.prompt_format.tokenizer, rng, depth, size)


TASKS: dict[str, RulerTask] = {
    "niah_single": RulerTask("one needle", 128, _needles()),
    "niah_multikey": RulerTask("one of four needles", 128, _needles(keys=needles.NUM_KEYS)),
    "niah_multivalue": RulerTask("four numbers of one name", 128, _needles(values=needles.NUM_VALUES)),
    "niah_multiquery": RulerTask(
        "the numbers of four names", 128, _needles(keys=needles.NUM_QUERIES, queries=needles.NUM_QUERIES)
    ),
    "recall": RulerTask(
        "one needle among needles only", 128, lambda m, rng, depth, length, size: needles.recall(rng, depth, size)
    ),
    "variable_tracking": RulerTask(
        "variables that are assigned one another",
        30,
        lambda m, rng, depth, length, size: needles.variable_tracking(
            m.haystack, m.prompt_format.tokenizer, rng, depth, size
        ),
    ),
    "common_words": RulerTask(
        "the ten most common words of a list",
        120,
        lambda m, rng, depth, length, size: word_counts.common_words(m.prompt_format.tokenizer, rng, length, size),
    ),
    "frequent_words": RulerTask(
        "the three most frequent words of a text in code",
        50,
        lambda m, rng, depth, length, size: word_counts.frequent_words(rng, length, size),
    ),
    "qa": RulerTask("a question about one of many documents", 32, _qa, "part"),
}


def check_names(names: Sequence[str]) -> None:
    """Refuses names that are no tasks.

    Raises:
        TaskError: names the task and those that there are.
    """
    for number, name in enumerate(names):
        if name not in TASKS:
            raise TaskError(f"no task {name!r}: there are {', '.join(TASKS)}")
        if name in names[:number]:
            raise TaskError(f"task {name!r} is asked for twice")


def make_question(materials: Materials, task: str, length: int, index: int, max_new_tokens: int = 0) -> Question:
    """Makes a question, the same for the same arguments.

    Args:
        materials: what it is made of.
        task: a key of `TASKS`.
        length: tokens that prompt and answer may have together.
        index: number of the question.
        max_new_tokens: of the answer; 0 is what RULER gives the task, or what a right answer takes where that is more.

    Raises:
        TaskError: it does not fit, or a right answer does not fit into `max_new_tokens`.
    """
    kind = TASKS[task]
    depth = materials.depths[index % len(materials.depths)]

    def write(size: int) -> Draft:
        rng = random.Random(f"{materials.seed}/{task}/{length}/{index}")
        return kind.write(materials, rng, depth, length, size)

    reference = len(materials.prompt_format.tokenizer.encode(write(0).reference)) + _AFTER_THE_REFERENCE
    if max_new_tokens and max_new_tokens < reference:
        raise TaskError(
            f"task {task}: a right answer takes up to {reference} tokens of this tokenizer, more than "
            f"max_gen_tokens = {max_new_tokens}"
        )
    reserved = max_new_tokens or max(kind.max_new_tokens, reference)
    draft, num_tokens = fit(write, materials.prompt_format, length, reserved, task)
    return Question(
        task=task,
        length=length,
        index=index,
        body=draft.body,
        answer_prefix=draft.answer_prefix,
        answers=draft.answers,
        depths=draft.depths,
        match=kind.match,
        num_tokens=num_tokens,
        max_new_tokens=reserved,
    )


def make_questions(
    materials: Materials, task: str, length: int, count: int, max_new_tokens: int = 0
) -> Iterator[Question]:
    """The first `count` questions of a task and length; arguments and errors as of `make_question`."""
    for index in range(count):
        yield make_question(materials, task, length, index, max_new_tokens)
