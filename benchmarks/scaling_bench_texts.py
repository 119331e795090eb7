"""Problems with worked solutions for `scaling_bench`: drawn by Reasoning Gym, worked step by step, mixed into batches.

    Question: 3 tiger, 2 spider
    Answer: 3*4=12;2*8=16;12+16=28
    The answer is 28

Question and answer are Reasoning Gym's (Stojanovski et al. 2025), without its sentences around them, which would be
most of the tokens; the steps are worked out here and must come to its answer.
"""

import re
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from cpm_jax.common.extras import import_extra
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.scaling_bench import Solved
from cpm_jax.training.losses import Batch

VOCAB_SIZE = 384
TEST_SEED = 10**8  # a family's puzzle i is drawn by its seed + i
TEXT_BYTES = 1_000_000
PIECE = 400  # characters of a document of source code
# Components of a mixture, beside the tasks: Python's own source files; solutions of other problems; answers alone.
TEXT, WRONG, BARE = "text", "wrong", "bare"


def solve_sum(metadata: Mapping[str, Any]) -> tuple[str, str, int]:
    """Question, steps and result of a `chain_sum`: from the left, term by term."""
    terms = metadata["expression"].split()
    total, steps = int(terms[0]), []
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total}{sign}{term}={after}")
        total = after
    return "".join(terms), ";".join(steps), total


def solve_legs(metadata: Mapping[str, Any]) -> tuple[str, str, int]:
    """Question, steps and result of a `leg_counting`: the legs of each kind, then their sum."""
    legs = import_extra("reasoning_gym.arithmetic.leg_counting", "eval").ANIMALS
    kinds = list(metadata["animals"].items())
    parts = [count * legs[kind] for kind, count in kinds]
    steps = [f"{count}*{legs[kind]}={part}" for (kind, count), part in zip(kinds, parts, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        steps.append(f"{total}+{part}={total + part}")
        total += part
    return ", ".join(f"{count} {kind}" for kind, count in kinds), ";".join(steps), total


class Family(NamedTuple):
    """Puzzles of one difficulty.

    Attributes:
        dataset: name in Reasoning Gym.
        settings: of it.
        solve: question, steps and result, from what it says of a puzzle.
    """

    dataset: str
    settings: dict[str, int]
    solve: Callable[[Mapping[str, Any]], tuple[str, str, int]]


TASKS = ("one digit", "two digits", "legs")
# Of one to three steps, and of as many as a right answer needs all of: its chance is then the product of theirs.
FAMILIES = {
    "short": {
        "one digit": Family("chain_sum", {"max_terms": 4, "max_digits": 1}, solve_sum),
        "two digits": Family("chain_sum", {"max_terms": 2, "min_digits": 2, "max_digits": 2}, solve_sum),
        "legs": Family("leg_counting", {"min_animals": 1, "max_animals": 2, "max_instances": 6}, solve_legs),
    },
    "long": {
        "one digit": Family("chain_sum", {"min_terms": 5, "max_terms": 8, "max_digits": 1}, solve_sum),
        "two digits": Family(
            "chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 2, "max_digits": 2}, solve_sum
        ),
        "legs": Family("leg_counting", {"min_animals": 3, "max_animals": 4, "max_instances": 6}, solve_legs),
    },
}


def draw(solutions: str, task: str, number: int, seed: int) -> list[Solved]:
    """Draws problems, each of another question.

    Args:
        solutions: "short" or "long".
        task: one of `TASKS`.
        number: at most so many.
        seed: what is drawn by.

    Raises:
        ValueError: the steps do not come to Reasoning Gym's answer.
    """
    family = FAMILIES[solutions][task]
    puzzles = import_extra("reasoning_gym", "eval").create_dataset(
        family.dataset, size=number, seed=seed, **family.settings
    )
    found: dict[str, Solved] = {}
    for puzzle in puzzles:
        question, steps, result = family.solve(puzzle["metadata"])
        if str(result) != puzzle["answer"]:
            raise ValueError(f"{task}: {question!r} is worked out as {result}, and is {puzzle['answer']}")
        found[question] = Solved(question, steps, puzzle["answer"])
    return list(found.values())


def held_out_problems(solutions: str, number: int) -> dict[str, list[Solved]]:
    """The problems of each task that none is trained on."""
    return {task: draw(solutions, task, number, TEST_SEED) for task in TASKS}


def answer_of(output: str) -> str:
    """The answer in what a model wrote: after "The answer is", or all of it where it says nothing of the kind."""
    found = re.search(r"The answer is(.*)", output)
    return (found[1] if found else output).strip()


class Stream(NamedTuple):
    """Documents one after another.

    Attributes:
        tokens: of all of them.
        starts: for each token where its document begins.
        learned: whether a token counts as a target: a solution, and all of a text; a question's numbers are chance.
    """

    tokens: Int[np.ndarray, " n"]
    starts: Int[np.ndarray, " n"]
    learned: Bool[np.ndarray, " n"]


class Texts(NamedTuple):
    """What models are trained on.

    Attributes:
        tokenizer: trained on some of the problems and of the text.
        streams: by component.
    """

    tokenizer: Tokenizer
    streams: dict[str, Stream]


def training_texts(solutions: str, number: int, test: Mapping[str, Sequence[Solved]]) -> Texts:
    """Streams of all components: each task's problems, its own text, and problems of all tasks that were spoilt.

    Args:
        solutions: "short" or "long".
        number: of problems of each task, before those of `test` are left out.
        test: problems that must not be trained on, by task.
    """
    problems = {}
    for task in TASKS:
        asked = {solved.question for solved in test[task]}
        problems[task] = [solved for solved in draw(solutions, task, number, 0) if solved.question not in asked]
    documents = {task: [(one.context, one.continuation) for one in found] for task, found in problems.items()}
    every = [solved for found in problems.values() for solved in found]
    rng = np.random.default_rng(0)
    rng.shuffle(every)
    documents[WRONG] = [(a.context, b.continuation) for a, b in zip(every, every[1:] + every[:1], strict=True)]
    documents[BARE] = [(one.context, Solved(one.question, "", one.answer).continuation) for one in every]
    documents[TEXT] = [("", text[at : at + PIECE]) for text in _modules() for at in range(0, len(text), PIECE)]
    tokenizer = Tokenizer.train((a + b for found in documents.values() for a, b in found[:2000]), VOCAB_SIZE)
    return Texts(tokenizer, {name: _stream(tokenizer, found) for name, found in documents.items()})


def _modules() -> Iterable[str]:
    size = 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text("utf-8", "replace")
        size += len(text)
        if size > TEXT_BYTES:
            return
        yield text


def _stream(tokenizer: Tokenizer, documents: Sequence[tuple[str, str]]) -> Stream:
    given, learned = (tokenizer.encode_batch(list(parts)) for parts in zip(*documents, strict=True))
    encoded = [[tokenizer.bos_id, *a, *b, tokenizer.eos_id] for a, b in zip(given, learned, strict=True)]
    lengths, before = np.array([len(ids) for ids in encoded]), np.array([1 + len(ids) for ids in given])
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    tokens = np.concatenate([np.array(ids, np.int32) for ids in encoded])
    return Stream(tokens, starts, np.arange(len(tokens)) - starts >= np.repeat(before, lengths))


def make_batch(
    streams: Mapping[str, Stream], mixture: Mapping[str, float], rows: int, seq_len: int, rng: np.random.Generator
) -> Batch:
    """Rows of a mixture's components, each from the beginning of a document; tokens see their own document only.

    Args:
        streams: of all components.
        mixture: shares by component; others have none.
        rows: B.
        seq_len: T.
        rng: what is drawn by.
    """
    names, shares = list(mixture), np.array(list(mixture.values()), float)
    chosen = rng.choice(len(names), rows, p=shares / shares.sum())
    place = rng.random(rows)
    tokens = np.empty((rows, seq_len + 1), np.int32)
    starts, indices, weights = np.empty_like(tokens), np.empty_like(tokens), np.empty(tokens.shape, np.float32)
    for row, (component, share) in enumerate(zip(chosen, place, strict=True)):
        stream = streams[names[component]]
        first = int(stream.starts[int(share * (len(stream.tokens) - seq_len - 1))])
        cut = slice(first, first + seq_len + 1)
        tokens[row], weights[row], indices[row] = stream.tokens[cut], stream.learned[cut], np.arange(first, cut.stop)
        starts[row] = stream.starts[cut]
    new = starts[:, 1:] != starts[:, :-1]
    segments = np.concatenate([np.zeros((rows, 1), bool), new], axis=1).cumsum(axis=1) + 1
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights[:, 1:] * ~new,
        "segment_ids": segments[:, :-1].astype(np.int32),
        "positions": (indices - starts)[:, :-1],
        "source_ids": np.zeros(rows, np.int32),
    }
