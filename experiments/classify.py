"""The verb `classify`: trains a classifier of documents from two pools, or scores documents with one."""

import collections
import dataclasses
import functools
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from cpm_jax.common.config import ConfigError, config_dataclass, config_differences
from cpm_jax.common.files import sha256, write_json, write_text
from cpm_jax.common.progress import Progress
from cpm_jax.curation.classifier import (
    CLASSIFIER_FILE,
    ClassifierConfig,
    Scorer,
    load_classifier,
    read_classifier,
    train_classifier,
)
from cpm_jax.curation.document import Document
from cpm_jax.curation.pools import SetAside, SourceProgress, read_pools, read_usable
from cpm_jax.curation.quality import SCORE
from cpm_jax.data.errors import DataError
from cpm_jax.data.workers import ordered_map
from experiments.classify_report import write_scoring_report, write_training_report

CLASSIFIER_DIR = "classifier"
SCORED_DIR = "scored"
SUMMARY_FILE = "summary.json"
_BATCH = 256  # documents that are scored together


@config_dataclass
class ClassifyConfig:
    """What to train, or what to score.

    Attributes:
        mode: "train" makes a classifier of the pools; "score" applies one to documents.
        positive: sources of documents to keep.
        negative: sources of documents not to keep: as a rule a sample of what is to be filtered.
        max_documents: most documents of a pool; None takes all.
        classifier: how it is trained.
        trained: folder of a classifier to score with.
        input: sources of the documents to score.
        part_documents: documents in a file of scored ones, and what a kill costs at most.
        num_workers: processes that score; None for one per core, 0 for none but this one.
        text_field: field of the text in records.
    """

    mode: Literal["train", "score"] = "train"
    positive: str | tuple[str, ...] | list[str] = ()
    negative: str | tuple[str, ...] | list[str] = ()
    max_documents: PositiveInt | None = None
    classifier: ClassifierConfig = ClassifierConfig()
    trained: str = ""
    input: str | tuple[str, ...] | list[str] = ()
    part_documents: PositiveInt = 10_000
    num_workers: NonNegativeInt | None = None
    text_field: str = "text"

    def __post_init__(self) -> None:
        needed = ("positive", "negative") if self.mode == "train" else ("trained", "input")
        for name in needed:
            if not getattr(self, name):
                raise ConfigError(
                    f"ClassifyConfig.{name} = {getattr(self, name)!r}: mode {self.mode!r} needs {' and '.join(needed)}",
                    field=f"ClassifyConfig.{name}",
                )


def run(config: ClassifyConfig, workdir: Path) -> None:
    """Trains into `workdir/classifier`, or scores into `workdir/scored`; what is done is not done again.

    Raises:
        InputError: sources, pools or a classifier cannot be used; a server fails.
        ConfigError: the workdir holds documents that were scored in another way.
    """
    if config.mode == "train":
        train(config, workdir)
    else:
        score(config, workdir)


def train(config: ClassifyConfig, workdir: Path) -> dict[str, Any]:
    """Trains a classifier, writes `report.html`, and returns what `classifier.json` holds."""
    folder = workdir / CLASSIFIER_DIR
    if (folder / CLASSIFIER_FILE).exists():
        print(f"nothing to do: {folder} holds a classifier; take another --workdir to train again")
        result = read_classifier(folder)
        write_training_report(workdir, result)  # the page comes after the classifier, and a kill between them
        return result
    pools = read_pools(_tuple(config.positive), _tuple(config.negative), config.text_field, config.max_documents)
    result = train_classifier(config.classifier, *pools, folder)
    report = write_training_report(workdir, result)
    at = result["at_threshold"]
    precision = "nothing is kept" if at["precision"] is None else f"precision {at['precision']:.3f}"
    print(
        f"{sum(result['examples'].values()):,} examples, {sum(result['held_out'].values()):,} held out: average "
        f"precision {result['average_precision']:.4f}; at threshold {result['threshold']:.3f} {precision}, recall "
        f"{at['recall']:.3f}, {at['keep_rate_of_negatives']:.1%} of the negative pool is kept\nreport: {report}"
    )
    return result


def score(config: ClassifyConfig, workdir: Path) -> dict[str, Any]:
    """Scores documents into `scored/part-*.jsonl`, writes `report.html`, and returns the summary."""
    scorer_folder, folder = Path(config.trained), workdir / SCORED_DIR
    about = read_classifier(scorer_folder)
    threshold = load_classifier(scorer_folder)[1]
    _claim(
        workdir,
        {
            "classifier_sha256": sha256(scorer_folder / CLASSIFIER_FILE),
            "input": list(_tuple(config.input)),
            "text_field": config.text_field,
            "part_documents": config.part_documents,
        },
    )
    set_aside, position = SetAside(), SourceProgress()
    documents = read_usable(_tuple(config.input), config.text_field, set_aside, position)
    parts = _parts(folder)
    for part in parts:  # read again, as the sources have no index, but not scored
        for _ in itertools.islice(documents, _count_lines(part)):
            pass
    remote = about["kind"] != "fasttext"  # a server's replies are cached in one file, by one process
    num_workers = 0 if remote else (os.cpu_count() or 1) if config.num_workers is None else config.num_workers
    with Progress("classify", position.total, initial=position.done, unit=position.unit, first_compiles=False) as bar:
        scored = _shown(_score(documents, scorer_folder, threshold, num_workers), position, bar)
        for number in itertools.count(len(parts)):
            lines = [json.dumps(dataclasses.asdict(d)) + "\n" for d in itertools.islice(scored, config.part_documents)]
            if not lines:
                break
            write_text(folder / f"part-{number:05d}.jsonl", "".join(lines))
    summary = _summarise(folder, threshold) | set_aside.to_json()
    if not summary["documents"]:
        raise DataError(f"no document of {', '.join(_tuple(config.input))} can be used; set aside: {set_aside}")
    write_json(workdir / SUMMARY_FILE, summary)
    report = write_scoring_report(workdir, summary)
    print(
        f"{summary['kept']:,} of {summary['documents']:,} documents are kept at {threshold:.3f} or more "
        f"({summary['kept_bytes']:,} of {summary['bytes']:,} bytes), {sum(set_aside.rejects.values()):,} could not be "
        f"read, {len(set_aside.quarantined):,} files are damaged and not used\nreport: {report}"
    )
    return summary


def load_scorer(folder: Path) -> Scorer:
    """The scorer of a folder, in a worker process."""
    return load_classifier(folder)[0]


def _score(documents: Iterator[Document], folder: Path, threshold: float, num_workers: int) -> Iterator[Document]:
    batches = iter(lambda: list(itertools.islice(documents, _BATCH)), [])
    tasks = ((batch, [document.text for document in batch]) for batch in batches)
    for batch, scores in ordered_map(functools.partial(load_scorer, folder), tasks, num_workers):
        for document, value in zip(batch, scores.tolist(), strict=True):
            document = document.with_score(SCORE, value)
            yield document if value >= threshold else document.drop(SCORE)


def _shown(scored: Iterator[Document], position: SourceProgress, bar: Progress) -> Iterator[Document]:
    """The same documents, with a look at the progress now and then."""
    begin, number = time.monotonic(), 0

    def rate() -> float:
        return number / max(time.monotonic() - begin, 1e-9)

    for number, document in enumerate(scored, 1):
        if number % _BATCH == 0:
            bar.update(position.done, **{"documents/s": rate()})
        yield document
    bar.update(position.total, **{"documents/s": rate()})


def _tuple(sources: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return (sources,) if isinstance(sources, str) else tuple(sources)


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.jsonl"))


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _claim(workdir: Path, settings: dict[str, Any]) -> None:
    """Takes the workdir for these settings, or finds that it was taken for them.

    Raises:
        ConfigError: it was taken for others.
    """
    path = workdir / SCORED_DIR / "settings.json"
    if not path.exists():
        write_json(path, settings)
        return
    if changed := config_differences(json.loads(path.read_text("utf-8")), settings):
        said = "; ".join(f"{name}: {was!r} at the last start, now {now!r}" for name, (was, now) in changed.items())
        raise ConfigError(f"{workdir} holds documents that were scored in another way: {said}; take another --workdir")


def _summarise(folder: Path, threshold: float) -> dict[str, Any]:
    """Counts, histogram and examples of all parts, read one after the other."""
    histogram = np.zeros(20, np.int64)
    counts: collections.Counter[str] = collections.Counter()
    samples: dict[str, list[dict[str, Any]]] = {"kept": [], "dropped": []}
    for part in _parts(folder):
        with part.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                value, size = row["scores"][SCORE], len(row["text"].encode())
                histogram[min(int(value * 20), 19)] += 1
                name = "dropped" if row["dropped"] else "kept"
                counts.update({"documents": 1, name: 1, "bytes": size, f"{name}_bytes": size})
                if len(samples[name]) < 5:
                    samples[name].append({"id": row["id"], "score": value, "text": row["text"][:600]})
    names = ("documents", "kept", "dropped", "bytes", "kept_bytes")
    return {
        "threshold": threshold,
        **{name: counts[name] for name in names},
        "histogram": histogram.tolist(),
        "samples": samples,
    }
