"""What a quickstart does with CURATE and VERIFY: curates its text before it is prepared, and asks whether that helped.

For a fair question documents are divided by their ids, before anything is trained: those held out are in no training
text and in neither candidate; a document that is in both candidates is at the same place in both.
"""

import dataclasses
import heapq
import importlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from cpm_jax.checkpoints.manager import CHECKPOINTS_DIR, CheckpointConfig
from cpm_jax.common.files import write_text
from cpm_jax.curation.document import Document
from cpm_jax.curation.extra import import_extra
from cpm_jax.curation.pipeline import curate
from cpm_jax.curation.places import DATA_DIR
from cpm_jax.curation.pools import position
from cpm_jax.curation.readers import Damage, Reading, plan_shards, read_whole_shard
from cpm_jax.curation.writers import shard_writer
from cpm_jax.data.errors import DataError
from cpm_jax.data.prepare import PrepareConfig
from experiments.curate import evaluation_texts, summary

if TYPE_CHECKING:  # the stages import this module
    from experiments.pretrain import PretrainConfig
    from experiments.quickstart import QuickstartConfig

CURATED_DIR, DIVIDED_DIR, VERIFICATION_DIR = "curated", "divided", "verification"
TRAIN_FILE, HELD_OUT_FILE = "train.jsonl.zst", "held_out.jsonl"
CANDIDATES = ("curated", "raw")
_PASSAGE = 2000  # characters of a held-out document that are measured
_MAX_PASSAGES, _MIN_PASSAGES = 200, 5
_BYTES_PER_TOKEN = 8  # of a candidate's sample, for each token of an annealing: more than it reads


def run_curation(config: "QuickstartConfig", workdir: Path) -> dict[str, Any]:
    """Curates the text, divides it if it is to be verified, and returns the counts.

    Raises:
        DataError: the extra is not installed, or nothing is left, or nothing could be held out.
    """
    for module in ("ftfy", "regex", "xxhash"):  # what is missing is said before anything is read or trained
        import_extra(module)
    if config.verify:
        importlib.import_module("cpm_jax.evaluation.tasks")  # says itself which extra it needs
    assert config.curation is not None
    texts = evaluation_texts(config.curation.evaluation_sets)
    manifest = curate(config.curation.pipeline, workdir / CURATED_DIR, evaluation_sets=texts)
    print(summary(manifest, workdir / CURATED_DIR))
    found = {name: manifest[name] for name in ("documents", "text_bytes", "drops", "rejects")}
    found["quarantined"] = [item["id"] for item in manifest["quarantined"]]
    if config.verify:
        found |= divide(config, workdir)
    return found


def curated_text(config: "QuickstartConfig", workdir: Path) -> PrepareConfig:
    """How to prepare the text for training: what curation left of it, if it is curated."""
    if not config.curate:
        return config.prepare
    left = workdir / DIVIDED_DIR / TRAIN_FILE if config.verify else workdir / CURATED_DIR / DATA_DIR
    return dataclasses.replace(config.prepare, sources=str(left), text_field="text", extensions=None)


def read_usable(sources: Sequence[str], extensions: Sequence[str] | None, reading: Reading) -> Iterator[Document]:
    """The documents of sources; of a damaged file none, as in `curate`."""
    for shard in plan_shards(sources, extensions)[0]:
        try:
            yield from (found for found in read_whole_shard(shard, reading) if isinstance(found, Document))
        except Damage:
            continue


def place(document: Document) -> float:
    """Where a document lies in [0, 1), whatever became of its text, and wherever its source lies."""
    return position(f"{PurePath(document.source).name}\0{document.id}", seed=0)


def divide(config: "QuickstartConfig", workdir: Path) -> dict[str, Any]:
    """Writes what to train on, passages to measure on, and samples of the curated and the raw text, equally chosen.

    Returns:
        How many documents and passages there are.

    Raises:
        DataError: there are too few documents to hold some out.
    """
    assert config.curation is not None
    pipeline, folder = config.curation.pipeline, workdir / DIVIDED_DIR
    folder.mkdir(parents=True, exist_ok=True)

    def raw() -> Iterator[Document]:
        return read_usable(pipeline.source_list, pipeline.extensions, pipeline.reading)

    def curated() -> Iterator[Document]:
        return read_usable([str(workdir / CURATED_DIR / DATA_DIR)], None, Reading())

    share = config.prepare.validation_fraction
    chosen = heapq.nsmallest(
        _MAX_PASSAGES,
        ((place(document), document.id, document.text[:_PASSAGE]) for document in curated() if place(document) < share),
    )
    if len(chosen) < _MIN_PASSAGES:
        raise DataError(
            f"QuickstartConfig.verify = True: with PrepareConfig.validation_fraction = {share} {len(chosen)} of the "
            f"curated documents are held out, needed are at least {_MIN_PASSAGES}: raise it, or give more text"
        )
    lines = [json.dumps({"id": name, "text": text}, ensure_ascii=False) for _, name, text in chosen]
    write_text(folder / HELD_OUT_FILE, "\n".join(lines) + "\n")
    measured = {text for _, _, text in chosen}  # a duplicate under another id may not be trained on either

    def training(documents: Iterable[Document], end: float = 1.0) -> Iterator[Document]:
        return (d for d in documents if share <= place(d) < end and d.text[:_PASSAGE] not in measured)

    train = write(folder / TRAIN_FILE, map(_row, training(curated())))
    wanted = _BYTES_PER_TOKEN * config.verify_steps * config.train.batch_size * config.prepare.seq_len
    end = sample_end(training(raw()), wanted)
    sizes = {
        name: write(folder / f"{name}.jsonl.zst", map(_row, training(read(), end)))
        for name, read in zip(CANDIDATES, (curated, raw), strict=True)
    }
    return {"train": train, "held_out": len(chosen), "candidates": sizes}


def sample_end(documents: Iterable[Document], wanted: int) -> float:
    """The place before which documents have so many bytes; 1 where all have not."""
    total = 0
    for at, size in sorted((place(document), len(document.text.encode())) for document in documents):
        if total >= wanted:
            return at
        total += size
    return 1.0


def _row(document: Document) -> dict[str, Any]:
    return {"id": document.id, "text": document.text}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as jsonl and returns how many there are."""
    count = 0
    with shard_writer(path) as writer:
        for row in rows:
            writer.write(row)
            count += 1
    return count


def keep_stable_checkpoint(job: "PretrainConfig") -> tuple[CheckpointConfig, int]:
    """When to save so that a checkpoint before the decay is there at the end, and the step of that one."""
    warmup, end = job.schedule.phases[0].steps, sum(phase.steps for phase in job.schedule.phases[:-1])
    every = job.checkpoint.every
    step = end // every * every
    if step < max(1, warmup):
        every = step = max(1, end)
    return dataclasses.replace(job.checkpoint, every=every, keep_every=step), step


def run_verification(config: "QuickstartConfig", step: int, data: Path, workdir: Path) -> dict[str, Any]:
    """Anneals the model from before its decay on the curated and the raw text, and returns what was found."""
    from experiments import verify  # needs the extra `eval`

    folder = workdir / DIVIDED_DIR
    settings = verify.VerifyConfig(
        checkpoint=str(workdir / CHECKPOINTS_DIR / str(step)),
        default=str(data),
        candidates={name: str(folder / f"{name}.jsonl.zst") for name in CANDIDATES},
        tasks=(str(folder / HELD_OUT_FILE),),
        decay_steps=config.verify_steps,
        num_seeds=config.verify_seeds,
        num_workers=config.prepare.num_workers,
    )
    results = verify.run(settings, workdir / VERIFICATION_DIR)
    return {name: results[name] for name in ("verdict", "unit", "scores", "passes", "items", "pairs")}
