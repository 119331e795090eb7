"""What a worker does with one shard: filter it and make its keys; later write what deduplication left of it."""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from cpm_jax.common.files import sha256
from cpm_jax.curation import dedup
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.document import Document, Filter, apply_filters
from cpm_jax.curation.places import (
    DATA_DIR,
    DECIDED,
    DROPPED_DIR,
    DROPPED_ROWS,
    FATES,
    FILTERED,
    GONE_PARAGRAPHS,
    KEPT_ROWS,
    KEYS,
    PARAGRAPH_COUNTS,
    PARAGRAPHS,
    REJECTED_ROWS,
    WRITTEN,
    Places,
)
from cpm_jax.curation.readers import Damage, InputShard, Reading, read_shard
from cpm_jax.curation.statistics import Statistics
from cpm_jax.curation.writers import MAX_ROW_BYTES, Columns, OutputFormat, dump, line_of, load_dump, shard_writer
from cpm_jax.data.sources import Reject

_MAX_ID = 1000  # characters that a reject shows


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

    def __init__(self, reading: Reading, filters: tuple[Filter, ...], dedup_config: DedupConfig | None, places: Places):
        """What is the same for all shards.

        Args:
            reading: how records become documents.
            filters: in their order.
            dedup_config: what counts as a duplicate; None makes no keys.
            places: of the data set.
        """
        self._reading = reading
        self._filters = filters
        self._dedup = dedup_config
        self._places = places

    def __call__(self, shard: InputShard) -> None:
        """Filters one shard and leaves a note; of a damaged one only the note."""
        open_rows = functools.partial(self._rows, shard.index)
        filtered, damage = _Filtered(), None
        try:
            with (
                open_rows(KEPT_ROWS) as kept,
                open_rows(DROPPED_ROWS) as dropped,
                open_rows(REJECTED_ROWS) as rejects,
            ):
                for found in read_shard(shard, self._reading):
                    if isinstance(found, Document):
                        document = apply_filters(found, self._filters)
                        row = _row(document)
                    else:
                        row = found
                    if isinstance(row, Reject):
                        filtered.statistics.rejects[row.reason] += 1
                        rejects.write(dataclasses.asdict(row))
                        continue
                    filtered.documents += 1
                    (dropped if document.dropped else kept).write_line(row)
                    if document.dropped:
                        filtered.statistics.add(document)
                    else:
                        filtered.keep(document, self._dedup)
        except Damage as error:
            filtered, damage = _Filtered(), dataclasses.asdict(error.reject)
        save = functools.partial(self._places.save, FILTERED, shard.index)
        if filtered.keys:
            save(KEYS, np.stack(filtered.keys, axis=1))
        if filtered.paragraph_keys:
            save(PARAGRAPHS, np.concatenate(filtered.paragraph_keys)[None])
            save(PARAGRAPH_COUNTS, np.array(list(map(len, filtered.paragraph_keys)), np.int64))
        note = {"damage": damage, "documents": filtered.documents, "statistics": filtered.statistics.to_json()}
        columns = {"scores": filtered.columns.scores, "fields": filtered.columns.fields}
        self._places.leave_note(FILTERED, shard.index, note | columns)

    def _rows(self, shard: int, suffix: str) -> AbstractContextManager[Any]:
        return shard_writer(self._places.file(FILTERED, shard, suffix), temporary_dir=self._places.temporary_dir)


def _row(document: Document) -> bytes | Reject:
    """The line of a document between the stages."""
    line = line_of(dump(document))
    if len(line) <= MAX_ROW_BYTES:
        return line
    detail = f"{len(line)} bytes with its metadata, as JSON, more than {MAX_ROW_BYTES}"
    return Reject("record too long", document.id[:_MAX_ID], document.source[:_MAX_ID], detail)


class WriteShard:
    """Stage 3: writes the output of a shard."""

    def __init__(self, columns: Columns, output_format: OutputFormat, dedup_config: DedupConfig | None, places: Places):
        """What is the same for all shards.

        Args:
            columns: of the whole data set.
            output_format: of the shards.
            dedup_config: what counted as a duplicate.
            places: of the data set.
        """
        self._columns = columns
        self._output_format = output_format
        self._dedup = dedup_config
        self._places = places

    def __call__(self, shard: InputShard) -> None:
        """Writes one shard and leaves a note."""
        statistics = Statistics()
        name = f"shard-{shard.index:05d}"
        kept_path = self._places.output_dir / DATA_DIR / f"{name}.{self._output_format}"
        dropped_path = self._places.output_dir / DROPPED_DIR / f"{name}.jsonl.zst"
        place = functools.partial(self._places.file, FILTERED, shard.index)
        temporary_dir = self._places.temporary_dir
        with (
            # `datasets` cannot tell the columns of a file without rows.
            shard_writer(kept_path, self._columns, temporary_dir, allow_empty=False) as kept,
            shard_writer(dropped_path, temporary_dir=temporary_dir) as dropped,
        ):
            for document in load_dump(place(DROPPED_ROWS)):
                dropped.write(dump(document))
            for document in self._decided(load_dump(place(KEPT_ROWS)), shard.index):
                statistics.add(document)
                if document.dropped:
                    dropped.write(dump(document))
                else:
                    kept.write(self._columns.row(document))
        files = {}
        for path, count in ((kept_path, statistics.documents), (dropped_path, None)):
            if count != 0:
                files[path.relative_to(self._places.output_dir).as_posix()] = {
                    "sha256": sha256(path),
                    "documents": count,
                }
        documents = statistics.documents + sum(statistics.drops.values())
        note = {"documents": documents, "statistics": statistics.to_json(), "files": files}
        self._places.leave_note(WRITTEN, shard.index, note)

    def _decided(self, documents: Iterator[Document], shard: int) -> Iterator[Document]:
        config = self._dedup
        if config is None:
            yield from documents
            return
        fates = self._places.load(DECIDED, shard, FATES)
        gone_paragraphs = self._places.load(DECIDED, shard, GONE_PARAGRAPHS)
        counts = self._places.paragraph_counts(shard)
        ends = np.cumsum(counts)
        for number, document in enumerate(documents):
            if fates[number] != dedup.KEPT:
                yield document.drop(dedup.REASONS[int(fates[number])])
                continue
            if config.min_paragraph is not None:
                goes = gone_paragraphs[ends[number] - counts[number] : ends[number]]
                if goes.any():
                    text = dedup.without_paragraphs(document.text, config.min_paragraph, goes)
                    if len(text) < config.min_rest:
                        yield document.drop(dedup.PARAGRAPHS)
                        continue
                    document = dataclasses.replace(document, text=text)
            yield document
