"""Makes ScalingBench records of any dataset, and scores them behind an endpoint.

Solutions that a dataset has are taken as they are, without a model. Where the reasoning is missing, a model behind
OpenAI's API writes it, given the question and the right answer; replies are cached, so that a build can be repeated
without the model and gives the same file.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cpm_jax.common.config import InputError
from cpm_jax.common.files import write_text
from cpm_jax.evaluation.scaling_bench import as_solved
from cpm_jax.tools.openai_client import EndpointError, OpenAIClient, RefusedError, completion_text

PROMPT = (
    "Below are a question and its correct answer. Write the reasoning that leads from the question to the answer, step "
    "by step, in plain text, as a careful teacher would. Do not say that the answer was given, and do not repeat it at "
    "the end.\n\nQuestion:\n{question}\n\nCorrect answer: {answer}\n\nReasoning:"
)
_REASONING_FIELDS = ("reasoning", "solution", "rationale", "explanation")


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build made.

    Attributes:
        records: written.
        given: of them with the dataset's own reasoning.
        generated: of them with reasoning that a model wrote.
        rejects: place and reason of records that could not be used.
    """

    records: int
    given: int
    generated: int
    rejects: tuple[tuple[str, str], ...]


def build(
    records: Iterable[Mapping[str, Any]],
    path: Path,
    *,
    client: OpenAIClient | None = None,
    model: str = "",
    max_tokens: int = 1024,
    workers: int = 8,
) -> Built:
    """Writes a .jsonl file for the task `scaling_bench:<path>`.

    Args:
        records: with `question`, `answer` (with `choices`: index, letter or text) and, where the dataset has it, the
            reasoning as `reasoning`, `solution`, `rationale` or `explanation`.
        path: of the file.
        client: writes missing reasoning; None sets such records aside. Give it a `ReplyCache` to build again without.
        model: name at the endpoint.
        max_tokens: of the reasoning.
        workers: requests at once.

    Raises:
        InputError: no record could be used, or there is a client and no model's name.
        EndpointError: the endpoint cannot be reached, or refuses all requests.
    """
    if client is not None and not model:
        raise InputError("build.model = '': an endpoint needs the model's name there")
    rejects: list[tuple[str, str]] = []
    prepared: list[tuple[str, str, str]] = []
    for number, record in enumerate(records, start=1):
        try:
            prepared.append(_prepared(record))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            rejects.append((f"record {number}", f"it has no {error}" if isinstance(error, KeyError) else str(error)))
    missing = [index for index, (_, reasoning, _) in enumerate(prepared) if not reasoning]
    written: dict[int, str | RefusedError] = {}
    if client is not None and missing:
        asked = client

        def write(index: int) -> str | RefusedError:
            question, _, answer = prepared[index]
            content = PROMPT.format(question=question, answer=answer)
            body = {
                "model": model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": max_tokens,
                "temperature": 0,
                "seed": 0,
            }
            try:
                reply = asked.post("chat/completions", body, completion_text).strip()
            except RefusedError as error:  # this question may be too long
                return error
            return reply.encode("utf-8", "replace").decode("utf-8")  # JSON can hold lone surrogates, UTF-8 cannot

        with ThreadPoolExecutor(workers) as pool:
            written = dict(zip(missing, pool.map(write, missing), strict=True))
        refusals = [reply for reply in written.values() if isinstance(reply, RefusedError)]
        if len(refusals) == len(missing):
            raise refusals[0]
    lines, generated = [], 0
    for index, (question, reasoning, answer) in enumerate(prepared):
        by = "given"
        if not reasoning:
            reply, by = written.get(index, ""), model
            if isinstance(reply, RefusedError) or not reply:
                silent = "the model wrote no reasoning" if client else "it has no reasoning, and there is no endpoint"
                rejects.append((question[:60], str(reply) or silent))
                continue
            reasoning = reply
            generated += 1
        row = {"question": question, "reasoning": reasoning, "answer": answer, "reasoning_by": by}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    if not lines:
        why = f": {rejects[0][0]}: {rejects[0][1]}" if rejects else ""
        raise InputError(f"no record could be used{why}")
    write_text(path, "".join(lines))
    return Built(len(lines), len(lines) - generated, generated, tuple(rejects))


def _prepared(record: Mapping[str, Any]) -> tuple[str, str, str]:
    """Question with its choices, reasoning or "", and answer."""
    question, answer = record["question"], record["answer"]
    if (choices := record.get("choices")) is not None:
        if not isinstance(choices, list | tuple):
            raise ValueError(f"'choices' is {type(choices).__name__}, not a list")
        letters = [chr(ord("A") + place) for place in range(len(choices))]
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
            answer = letters[answer]
        elif answer in choices:
            answer = letters[choices.index(answer)]
        if answer not in letters:
            raise ValueError(f"'answer' is {record['answer']!r}, none of its {len(choices)} choices")
        lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
        question = "\n".join([question, *lines])
    reasoning = next((record[name] for name in _REASONING_FIELDS if record.get(name)), "")
    solved = as_solved({"question": question, "reasoning": reasoning, "answer": answer})
    return solved.question.strip(), solved.reasoning.strip(), solved.answer.strip()


class EndpointScores:
    """Scores texts by an endpoint that echoes log-probabilities: `completions` with `echo` and `logprobs`.

    vLLM, llama.cpp's server in part, and older models of OpenAI do; an endpoint that does not is refused by name.
    """

    def __init__(self, client: OpenAIClient, model: str, *, workers: int = 8):
        """Nothing is sent yet.

        Args:
            client: of the server.
            model: name there.
            workers: requests at once.
        """
        self._client, self._model, self._workers = client, model, workers

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """Log-likelihood and number of tokens of each continuation.

        A token counts where its text begins within the continuation. One that reaches over from the context does not:
        contexts end before a blank, where tokenizers split.

        Raises:
            EndpointError: the endpoint gives no log-probabilities of the prompt.
        """
        with ThreadPoolExecutor(self._workers) as pool:
            return list(pool.map(self._one, pairs))

    def _one(self, pair: tuple[str, str]) -> tuple[float, int]:
        context, continuation = pair
        body = {
            "model": self._model,
            "prompt": context + continuation,
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": 1,
        }
        found = self._client.post("completions", body, _echoed)
        if found is None:
            raise EndpointError(
                f"the endpoint gives no log-probabilities of the prompt for the model {self._model!r}: ScalingBench "
                "needs completions with echo and logprobs"
            )
        offsets, logprobs = found
        end = len(context) + len(continuation)
        chosen = [p for at, p in zip(offsets, logprobs, strict=True) if len(context) <= at < end]
        known = [p for p in chosen if p is not None]
        if not known or len(known) < len(chosen):
            raise EndpointError("the endpoint gives no log-probabilities of the text after the question")
        return float(sum(known)), len(known)


def _echoed(reply: Any) -> tuple[list[int], list[float | None]] | None:
    found = reply["choices"][0].get("logprobs")
    if not found or not found.get("token_logprobs"):
        return None
    offsets, logprobs = found["text_offset"], found["token_logprobs"]
    if len(offsets) != len(logprobs) or not all(p is None or math.isfinite(p) for p in logprobs):
        raise ValueError("logprobs must have a finite number, or null, for each text_offset")
    return offsets, logprobs
