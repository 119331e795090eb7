"""Puzzles of any family of Reasoning Gym (Stojanovski et al. 2025): made from a seed, marked by the family's rule.

Some rules evaluate what the model wrote as an expression, which may be any Python: answers are marked in the sandbox.
"""

import dataclasses
import importlib
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from cpm_jax.common.extras import how_to_install
from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.harness_task import HarnessTask, OfflineTask
from cpm_jax.tools.sandbox import Limits, SandboxResult, run_python

PREFIX = "reasoning_gym:"
ITEMS = 100  # unless LIMIT asks for more
MAX_GEN_TOKENS = 512
# Of making the puzzles, and of marking the answers of a batch, for which they are made again.
LIMITS = Limits(cpu_seconds=120.0, wall_seconds=300.0, output_bytes=64 << 20)
_PROGRAM = """
import json, os, sys
if os.environ.get("PYTHONHASHSEED") != "0":  # some families iterate over sets of strings
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
given = json.loads(sys.stdin.read())
import reasoning_gym
puzzles = reasoning_gym.create_dataset(given["family"], size=given["size"], seed=given["seed"])
made = [(puzzle["question"], str(puzzle["answer"])) for puzzle in puzzles] if given["make"] else []
scores = []
for index, answer in given["answers"]:
    try:
        score = float(puzzles.score_answer(answer, puzzles[index]))
    except Exception:  # a rule that cannot read the answer
        score = 0.0
    scores.append(score if 0 <= score <= 1 else 0.0)
print()
print(given["word"] + json.dumps([made, scores]))
"""


@dataclasses.dataclass(frozen=True)
class Puzzles:
    """The puzzles of one family and seed, made and marked by programs in the sandbox, the same each time.

    Attributes:
        family: name of the family.
        size: how many there are.
        seed: that they are made with.
        allow_unsafe: as in `tools.sandbox.run_python`.
    """

    family: str
    size: int
    seed: int
    allow_unsafe: bool = False

    def make(self) -> list[tuple[str, str]]:
        """Question and answer of each.

        Raises:
            TaskError: the family's program fails.
            SandboxError: this host cannot build a sandbox.
        """
        made, ended = self._run(make=True)
        if made is None:
            raise TaskError(
                f"puzzles of {self.family} cannot be made in the sandbox ({ended.status}): {ended.stderr[-500:]}"
            )
        return [(question, answer) for question, answer in made[0]]

    def scores(self, answers: Sequence[tuple[int, str]]) -> list[float]:
        """The score of each answer, from 0 to 1.

        An answer that the rule cannot read, or not within `LIMITS`, scores 0; the others are then marked one by one.

        Args:
            answers: pairs of a puzzle's index and what the model answered.
        """
        marked, _ = self._run(answers)
        if marked is not None:
            return marked[1]
        return [0.0] if len(answers) == 1 else [score for answer in answers for score in self.scores([answer])]

    def _run(self, answers: Sequence[tuple[int, str]] = (), *, make: bool = False) -> tuple[Any, SandboxResult]:
        """Puzzles and scores, or None where the program did not get through; and how it ended."""
        word = secrets.token_hex(16)  # tells our line from what an answer may print
        asked = dataclasses.asdict(self) | {"answers": list(answers), "make": make, "word": word}
        result = run_python(_PROGRAM, stdin=json.dumps(asked), limits=LIMITS, allow_unsafe=self.allow_unsafe)
        last = result.stdout.rstrip("\n").rpartition("\n")[2]
        through = result.status == "ok" and last.startswith(word)
        return json.loads(last.removeprefix(word)) if through else None, result


def reasoning_gym_task(
    name: str, *, seed: int = 0, limit: int = 0, max_gen_tokens: int = 0, allow_unsafe: bool = False
) -> HarnessTask:
    """A family as a task; item i of a seed is always the same.

    Args:
        name: "reasoning_gym:<family>".
        seed: of the puzzles.
        limit: how many will be asked for; at least 100 are made.
        max_gen_tokens: most tokens of an answer; 0 is 512.
        allow_unsafe: whether answers may be marked where no sandbox can be built.

    Raises:
        TaskError: the package is not installed, there is no such family, or its program fails.
        SandboxError: this host cannot build a sandbox.
    """
    try:
        factory = importlib.import_module("reasoning_gym.factory")
        prompts = importlib.import_module("reasoning_gym.utils").SYSTEM_PROMPTS
    except ImportError as error:
        raise TaskError(f"task {name} needs the package reasoning-gym ({error}): {how_to_install('eval')}") from error
    family = name.removeprefix(PREFIX)
    families = sorted(set(factory.DATASETS) - {"composite"})  # composite is a mixture of the others
    if family not in families:
        raise TaskError(f"task {name}: no family {family!r} in Reasoning Gym: there are {', '.join(families)}")
    puzzles = Puzzles(family, max(ITEMS, limit), seed, allow_unsafe)

    def mark(responses: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[float]:
        return puzzles.scores([(doc["index"], answer_of(said[0])) for said, doc in zip(responses, docs, strict=True)])

    config = {
        "task": name,
        "output_type": "generate_until",
        "description": "{% raw %}" + prompts["default"] + "{% endraw %}",
        "doc_to_text": "{{question}}\n",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "generation_kwargs": {
            "until": ["</answer>"],
            "max_gen_toks": max_gen_tokens or MAX_GEN_TOKENS,
            "do_sample": False,
        },
        "filter_list": [{"name": "marked", "filter": [{"function": "custom", "filter_fn": mark}]}],
        "process_results": lambda doc, results: {"score": results[0]},
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
    }
    docs = [
        {"index": index, "question": question, "answer": answer}
        for index, (question, answer) in enumerate(puzzles.make())
    ]
    return HarnessTask(name, OfflineTask(config, docs), "score", f"Reasoning Gym, made with seed {seed}")


def answer_of(text: str) -> str:
    """What stands in the last <answer>; the whole text where there is none. Generation has ended before </answer>."""
    return text.rpartition("<answer>")[2].strip()
