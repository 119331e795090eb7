"""A question about one of many documents: about people who do not exist, or from a file in the format of SQuAD."""

import codecs
import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.ruler.haystack import Haystack, insert
from cpm_jax.evaluation.ruler.question import Draft
from cpm_jax.evaluation.ruler.words import TOWNS, TRADES, person_names

ACCEPTED = 'SQuAD\'s JSON, or a line of JSON for each {"question": "…", "answers": ["…"], "document": "…"}'
_PASSAGE = (40, 80)  # tokens of real text around each invented person
_PEOPLE = 4096  # different ones in a context at most; then the first come again as distractors
_QUESTIONS = (
    ("In which town was {} born?", 0),
    ("In which year was {} born?", 1),
    ("What was the trade of {}?", 2),
    ("To which town did {} move later?", 3),
)


@dataclasses.dataclass(frozen=True)
class QaRecord:
    """A question with its document.

    Attributes:
        question: the question.
        answers: any of which is right.
        document: the text that holds the answer.
    """

    question: str
    answers: tuple[str, ...]
    document: str


@dataclasses.dataclass(frozen=True)
class QaFile:
    """Records of a file.

    Attributes:
        records: at least one.
        documents: all different documents, those without questions too.
        sha256: of the file.
    """

    records: Sequence[QaRecord]
    documents: Sequence[str]
    sha256: str


def read_qa(path: str | Path) -> QaFile:
    """Reads questions.

    Args:
        path: SQuAD's JSON (1.1 or 2.0; questions without an answer serve as documents only), or .jsonl.

    Raises:
        TaskError: the file cannot be read, or does not hold what is accepted; names the record.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"questions {path}: {getattr(error, 'strerror', None) or error}") from error
    records, documents = list[QaRecord](), dict[str, None]()
    for place, row in _rows(path, text):
        try:
            document, answers = _text(row["document"]), row["answers"]
            answers = tuple(dict.fromkeys(map(_text, [answers] if isinstance(answers, str) else answers)))
            documents[document] = None
            if answers:
                records.append(QaRecord(_text(row["question"]), answers, document))
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise TaskError(f"questions {path}: {place}: {reason}; accepted is {ACCEPTED}") from error
    if not records:
        raise TaskError(f"questions {path}: it holds no question with an answer; accepted is {ACCEPTED}")
    return QaFile(records, list(documents), hashlib.sha256(data).hexdigest())


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is not a text, or an empty one")
    return value.strip()


def _rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file, each with its place in it."""
    try:
        if path.suffix == ".jsonl":
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    yield f"line {number}", json.loads(line)
            return
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for number, qa in enumerate(paragraph["qas"]):
                    yield (
                        f"question {qa.get('id', number)}",
                        {
                            "question": qa["question"],
                            "answers": [answer["text"] for answer in qa["answers"]],
                            "document": paragraph["context"],
                        },
                    )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TaskError(f"questions {path}: {error!r}; accepted is {ACCEPTED}") from error


def people_qa(haystack: Haystack, tokenizer: Tokenizer, rng: random.Random, depth: float, size: int) -> Draft:
    """A question about a person in one of many documents, each of which is real text about another invented person.

    Args:
        haystack: real text.
        tokenizer: of the model.
        rng: of all draws.
        depth: where the document lies that holds the answer.
        size: tokens of the other documents.
    """
    names = person_names(rng, _PEOPLE)
    facts = [rng.choice(TOWNS), str(rng.randrange(1700, 1950)), rng.choice(TRADES)]
    facts.append(rng.choice([town for town in TOWNS if town != facts[0]]))
    question, asked = rng.choice(_QUESTIONS)

    def document(name: str, facts: Sequence[str]) -> str:
        passage = haystack.passage(haystack.sentence_start(rng.random()), rng.randint(*_PASSAGE))
        return insert(passage, [(0.5, _biography(name, facts))], tokenizer)

    def others() -> Iterator[str]:
        while True:
            for name in names[1:]:
                yield document(
                    name, [rng.choice(TOWNS), str(rng.randrange(1700, 1950)), rng.choice(TRADES), rng.choice(TOWNS)]
                )

    gold = document(names[0], facts)
    return _documents_question(gold, others(), tokenizer, depth, size, question.format(names[0]), (facts[asked],))


def _biography(name: str, facts: Sequence[str]) -> str:
    born, year, trade, moved = facts
    return f"{name} was born in {born} in {year}, worked as a {trade}, and later moved to {moved}."


def file_qa(qa: QaFile, haystack: Haystack, tokenizer: Tokenizer, rng: random.Random, depth: float, size: int) -> Draft:
    """A question of a file; the file's other documents are distractors, and real text once they are used up.

    Args:
        qa: the file.
        haystack: real text.
        tokenizer: of the model.
        rng: of all draws.
        depth: where the document lies that holds the answer.
        size: tokens of the other documents.
    """
    record = rng.choice(qa.records)

    def others() -> Iterator[str]:
        yield from rng.sample([text for text in qa.documents if text != record.document], k=len(qa.documents) - 1)
        while True:
            yield haystack.passage(haystack.sentence_start(rng.random()), 2 * _PASSAGE[1])

    return _documents_question(record.document, others(), tokenizer, depth, size, record.question, record.answers)


def _documents_question(
    gold: str,
    others: Iterator[str],
    tokenizer: Tokenizer,
    depth: float,
    size: int,
    question: str,
    answers: tuple[str, ...],
) -> Draft:
    before = _take(others, tokenizer, round(depth * size))
    after = _take(others, tokenizer, size - round(depth * size))
    documents = "\n\n".join(
        f"Document {number}:\n{text}" for number, text in enumerate([*before, gold, *after], start=1)
    )
    body = (
        "Answer the question by the documents. Give the answer only.\n\n"
        f"{documents}\n\nAnswer the question by the documents. Give the answer only.\n\nQuestion: {question}"
    )
    return Draft(body, "\nAnswer:", answers, (depth,))


def _take(documents: Iterator[str], tokenizer: Tokenizer, num_tokens: int) -> list[str]:
    """Documents of a number of tokens, of which the last is cut."""
    taken = []
    while num_tokens > 0:
        text = next(documents)
        _, offsets = tokenizer.encode_with_offsets(text)
        if len(offsets) > num_tokens:
            text = text[: offsets[num_tokens - 1][1]].rstrip()
        if text:
            taken.append(text)
        num_tokens -= len(offsets)
    return taken
