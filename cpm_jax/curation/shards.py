"""What a worker does with one shard: filter it and make its keys; later write what deduplication left of it."""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cpm_jax.common.files import sha256, write_json
from cpm_jax.curation import dedup
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.document import Document, Filter, apply_filters
from cpm_jax.curation.readers import Damage, InputShard, Reading, read_shard
from cpm_jax.curation.statistics import Statistics
from cpm_jax.curation.writers import Columns, OutputFormat, ShardWriter, dump, load_dump, load_rows
from cpm_jax.data.prepare import PROGRESS_DIR
from cpm_jax.data.sources import Reject

DATA_DIR = "data"
DROPPED_DIR = "dropped"
FILTERED, WRITTEN = "filtered", "written"  # the stages that have notes

_KEPT, _DROPPED, _REJECTS = ".kept.jsonl.zst", ".dropped.jsonl.zst", ".rejects.jsonl.zst"
_KEYS, _PARAGRAPHS, _PARAGRAPH_COUNTS = ".keys.npy", ".paragraphs.npy", ".paragraph_counts.npy"


@dataclasses.dataclass(frozen=True)
class Places:
    """Where what belongs to a shard lies.

    Attributes:
        output_dir: of the data set.
    """

    output_dir: Path

    @property
    def work_dir(self) -> Path:
        """What is there only until all is done."""
        return self.output_dir / PROGRESS_DIR

    def file(self, stage: str, shard: int, suffix: str) -> Path:
        """A file of a stage; its note has the suffix .json."""
        return self.work_dir / stage / f"{shard:05d}{suffix}"

    def note(self, stage: str, shard: int) -> dict[str, Any] | None:
        """What a finished stage says of a shard; None if it is not finished."""
        path = self.file(stage, shard, ".json")
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def rejects(self, shard: int) -> Iterator[dict[str, Any]]:
        """What could not be read of a shard that was filtered."""
        path = self.file(FILTERED, shard, _REJECTS)
        return load_rows(path) if path.exists() else iter(())

    def keys(self, shard: int, bands: int) -> dedup.Keys:
        """The keys of the kept documents of a shard."""
        path = self.file(FILTERED, shard, _KEYS)
        return dedup.KeyFile(path) if path.exists() else np.empty((bands + 2, 0), np.uint64)

    def paragraph_keys(self, shard: int) -> dedup.Keys:
        """The keys of the paragraphs of these documents, as one row."""
        path = self.file(FILTERED, shard, _PARAGRAPHS)
        return dedup.KeyFile(path) if path.exists() else np.empty((1, 0), np.uint64)

    def paragraph_counts(self, shard: int) -> np.ndarray:
        """How many of them belong to each document."""
        path = self.file(FILTERED, shard, _PARAGRAPH_COUNTS)
        return np.load(path) if path.exists() else np.empty(0, np.int64)


class _Filtered:
    """What stage 1 collects of a shard."""

    def __init__(self) -> None:
        self.documents = 0
        self.statistics = Statistics()
        self.columns = Columns()
        self.keys: list[np.ndarray] = []
        self.paragraph_keys: list[np.ndarray] = []

    def keep(self, document: Document, config: DedupConfig | None) -> None:
        self.columns.add(document)
        if config is None:
            return
        self.keys.append(dedup.document_keys(document, config))
        if config.min_paragraph is not None:
            self.paragraph_keys.append(dedup.paragraph_keys(document.text, config.min_paragraph))


class FilterShard:
    """Stage 1: reads a shard, applies the filters, makes keys of what is kept."""

    def __init__(
        self, reading: Reading, filters: tuple[Filter, ...], dedup_config: DedupConfig | None, output_dir: Path
    ):
        """What is the same for all shards.

        Args:
            reading: how records become documents.
            filters: in their order.
            dedup_config: what counts as a duplicate; None makes no keys.
            output_dir: of the data set.
        """
        self._reading = reading
        self._filters = filters
        self._dedup = dedup_config
        self._places = Places(output_dir)

    def __call__(self, shard: InputShard) -> None:
        """Filters one shard and leaves a note; of a damaged one only the note."""
        place = functools.partial(self._places.file, FILTERED, shard.index)
        filtered, damage = _Filtered(), None
        try:
            with (
                ShardWriter(place(_KEPT)) as kept,
                ShardWriter(place(_DROPPED)) as dropped,
                ShardWriter(place(_REJECTS)) as rejects,
            ):
                for found in read_shard(shard, self._reading):
                    if isinstance(found, Reject):
                        filtered.statistics.rejects[found.reason] += 1
                        rejects.write(dataclasses.asdict(found))
                        continue
                    filtered.documents += 1
                    document = apply_filters(found, self._filters)
                    (dropped if document.dropped else kept).write(dump(document))
                    if document.dropped:
                        filtered.statistics.add(document)
                    else:
                        filtered.keep(document, self._dedup)
        except Damage as error:
            filtered, damage = _Filtered(), dataclasses.asdict(error.reject)
        if filtered.keys:
            _save(place(_KEYS), np.stack(filtered.keys, axis=1))
        if filtered.paragraph_keys:
            _save(place(_PARAGRAPHS), np.concatenate(filtered.paragraph_keys)[None])
            _save(place(_PARAGRAPH_COUNTS), np.array(list(map(len, filtered.paragraph_keys)), np.int64))
        note = {"damage": damage, "documents": filtered.documents, "statistics": filtered.statistics.to_json()}
        write_json(place(".json"), note | {"scores": filtered.columns.scores, "fields": filtered.columns.fields})


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What deduplication says of a shard.

    Attributes:
        shard: its index.
        fates: of each document that the filters kept, see `dedup.find_duplicates`; empty where nothing was looked for.
        paragraphs: which paragraphs go, of one document after another.
        paragraph_counts: how many belong to each.
    """

    shard: int
    fates: np.ndarray
    paragraphs: np.ndarray
    paragraph_counts: np.ndarray


class WriteShard:
    """Stage 3: writes the output of a shard."""

    def __init__(
        self, columns: Columns, output_format: OutputFormat, dedup_config: DedupConfig | None, output_dir: Path
    ):
        """What is the same for all shards.

        Args:
            columns: of the whole data set.
            output_format: of the shards.
            dedup_config: what counted as a duplicate.
            output_dir: of the data set.
        """
        self._columns = columns
        self._output_format = output_format
        self._dedup = dedup_config
        self._places = Places(output_dir)

    def __call__(self, decision: Decision) -> None:
        """Writes one shard and leaves a note."""
        statistics = Statistics()
        name = f"shard-{decision.shard:05d}"
        kept_path = self._places.output_dir / DATA_DIR / f"{name}.{self._output_format}"
        dropped_path = self._places.output_dir / DROPPED_DIR / f"{name}.jsonl.zst"
        place = functools.partial(self._places.file, FILTERED, decision.shard)
        with ShardWriter(kept_path, self._columns) as kept, ShardWriter(dropped_path) as dropped:
            for document in load_dump(place(_DROPPED)):
                dropped.write(dump(document))
            for document in self._decided(load_dump(place(_KEPT)), decision):
                statistics.add(document)
                if document.dropped:
                    dropped.write(dump(document))
                else:
                    kept.write(self._columns.row(document))
        files = {}
        for path, count in ((kept_path, statistics.documents), (dropped_path, None)):
            if count == 0:
                path.unlink()  # `datasets` cannot tell the columns of a file without rows
            else:
                files[path.relative_to(self._places.output_dir).as_posix()] = {
                    "sha256": sha256(path),
                    "documents": count,
                }
        documents = statistics.documents + sum(statistics.drops.values())
        note = {"documents": documents, "statistics": statistics.to_json(), "files": files}
        write_json(self._places.file(WRITTEN, decision.shard, ".json"), note)

    def _decided(self, documents: Iterator[Document], decision: Decision) -> Iterator[Document]:
        config = self._dedup
        if config is None:
            yield from documents
            return
        ends = np.cumsum(decision.paragraph_counts)
        for number, document in enumerate(documents):
            if decision.fates[number] != dedup.KEPT:
                yield document.drop(dedup.REASONS[int(decision.fates[number])])
                continue
            if config.min_paragraph is not None:
                goes = decision.paragraphs[ends[number] - decision.paragraph_counts[number] : ends[number]]
                if goes.any():
                    text = dedup.without_paragraphs(document.text, config.min_paragraph, goes)
                    if len(text) < config.min_rest:
                        yield document.drop(dedup.PARAGRAPHS)
                        continue
                    document = dataclasses.replace(document, text=text)
            yield document
