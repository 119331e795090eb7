"""Tasks from files: .jsonl of multiple choice, of generation with one right answer, or texts of any kind."""

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cpm_jax.data.sources import Document, read_documents
from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.harness_task import HarnessTask, OfflineTask, Reject

Kind = Literal["choice", "generation", "text"]
_FIELDS: dict[Kind, tuple[str, ...]] = {
    "choice": ("question", "choices", "answer"),
    "generation": ("prompt", "answer"),
    "text": ("text",),
}
_ACCEPTED = (
    '{"question": "…", "choices": ["…", "…"], "answer": index, letter or choice}, {"prompt": "…", "answer": "…"} '
    'or {"text": "…"}'
)


def jsonl_task(path: Path, name: str, *, max_gen_tokens: int = 0) -> HarnessTask:
    """A task from a file of one kind of records; the first record that is of a kind decides which.

    Args:
        path: the file.
        name: of the task.
        max_gen_tokens: most tokens of an output; 0 is 256.

    Raises:
        TaskError: the file cannot be read or has no usable record.
    """
    kind, docs, rejects = read_records(path)
    config = {"task": name, **_CONFIGS[kind]}
    if kind == "generation":
        # An answer of one line ends with it; one of several lines with an empty one.
        until = "\n\n" if any("\n" in doc["answer"] for doc in docs) else "\n"
        config["generation_kwargs"] = {"until": [until], "max_gen_toks": max_gen_tokens or 256, "do_sample": False}
    main = {"choice": "acc_norm", "generation": "exact_match", "text": "bits_per_byte"}[kind]
    return HarnessTask(name, OfflineTask(config, docs), main, f"{path.name}, {len(docs)} records", rejects)


def text_task(source: str, name: str, *, limit: int = 0) -> HarnessTask:
    """Bits per byte of texts.

    Args:
        source: anything that `data.sources.read_documents` takes: a folder, a file, a glob pattern, ….
        name: of the task.
        limit: documents to read at most; 0 is all.

    Raises:
        TaskError: there is no document.
        DataError: the source cannot be read.
    """
    docs, rejects = list[dict[str, Any]](), list[Reject]()
    for item in read_documents(source):
        if isinstance(item, Document):
            try:
                docs.append({"text": _checked(item.text, "it")})
            except ValueError as error:
                rejects.append(Reject(item.id, str(error), item.text))
        else:
            rejects.append(Reject(item.id, item.reason, item.detail))
        if limit and len(docs) == limit:
            break
    if not docs:
        why = f": {rejects[0].place}: {rejects[0].reason}" if rejects else ""
        raise TaskError(f"{source} holds no text{why}")
    task = OfflineTask({"task": name, **_CONFIGS["text"]}, docs)
    return HarnessTask(name, task, "bits_per_byte", f"{source}, {len(docs):,} documents", rejects)


def numbered_lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines of a task file that are not blank, with their numbers from 1.

    Raises:
        TaskError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise TaskError(f"task file {path}: {error.strerror or error}") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def read_records(path: Path) -> tuple[Kind, list[dict[str, Any]], list[Reject]]:
    """Reads a file; what cannot be an item is set aside with its reason.

    Raises:
        TaskError: the file cannot be read or has no usable record.
    """
    kind: Kind | None = None
    docs, rejects = list[dict[str, Any]](), list[Reject]()
    for number, line in numbered_lines(path):
        try:
            record = json.loads(line.decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError(f"it is {type(record).__name__}, not an object")
            kind = kind or _kind(record)
            docs.append(_DOC[kind](record))
        except (ValueError, KeyError, RecursionError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            rejects.append(Reject(f"line {number}", reason, line.decode("utf-8", "replace")))
    if not docs or kind is None:
        why = f"; {rejects[0].place}: {rejects[0].reason}" if rejects else ""
        raise TaskError(f"task file {path} has no usable record{why}. A record is {_ACCEPTED}")
    return kind, docs, rejects


def _kind(record: Mapping[str, Any]) -> Kind:
    for kind, fields in _FIELDS.items():
        if all(field in record for field in fields):
            return kind
    raise ValueError(f"its fields are {', '.join(map(repr, record)) or 'none'}; a record is {_ACCEPTED}")


def _text(record: Mapping[str, Any], field: str) -> str:
    return _checked(record[field], f"{field!r}")


def _checked(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is not a text, or an empty one")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\\ud800" is JSON, but no text: half of a pair of surrogates
        raise ValueError(f"{what} is no text that UTF-8 could write: {error.reason}") from error
    return value


def _choice(record: Mapping[str, Any]) -> dict[str, Any]:
    choices, answer = record["choices"], record["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("'choices' is not a list of two or more texts")
    choices = [_checked(choice, "one of 'choices'") for choice in choices]
    if isinstance(answer, str):
        answer = choices.index(answer) if answer in choices else _letter(answer, len(choices))
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(
            f"'answer' is {record['answer']!r}: neither one of the choices, nor its letter, nor an index from 0 to "
            f"{len(choices) - 1}"
        )
    return {"question": _text(record, "question"), "choices": choices, "answer": answer}


def _letter(answer: str, number: int) -> int | None:
    """The index that a letter from A on stands for."""
    return ord(answer) - ord("A") if len(answer) == 1 and 0 <= ord(answer) - ord("A") < number else None


def _generation(record: Mapping[str, Any]) -> dict[str, Any]:
    answer = record["answer"]
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    return {"prompt": _text(record, "prompt"), "answer": _text({"answer": answer}, "answer")}


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": _text(record, "text")}


_DOC = {"choice": _choice, "generation": _generation, "text": _plain}


def _exact_match(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip() == doc["answer"].strip())}


_MEAN = {"aggregation": "mean", "higher_is_better": True}
_CONFIGS: dict[Kind, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc", **_MEAN}, {"metric": "acc_norm", **_MEAN}],
    },
    "generation": {
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "fewshot_split": "test",
        "process_results": _exact_match,
        "metric_list": [{"metric": "exact_match", **_MEAN}],
    },
    "text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "num_fewshot": 0,
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    },
}
