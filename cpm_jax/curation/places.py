"""Where what belongs to a shard lies while a data set is made; on any filesystem that all workers reach."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cpm_jax.common.files import as_path, whole_file
from cpm_jax.curation import dedup
from cpm_jax.curation.writers import load_rows
from cpm_jax.data.prepare import PROGRESS_DIR

DATA_DIR = "data"
DROPPED_DIR = "dropped"
FILTERED, DECIDED, WRITTEN = "filtered", "decided", "written"  # the stages

KEPT_ROWS, DROPPED_ROWS, REJECTED_ROWS = ".kept.jsonl.zst", ".dropped.jsonl.zst", ".rejects.jsonl.zst"
KEYS, PARAGRAPHS, PARAGRAPH_COUNTS = ".keys.npy", ".paragraphs.npy", ".paragraph_counts.npy"  # of stage 1
FATES, GONE_PARAGRAPHS = ".fates.npy", ".gone_paragraphs.npy"  # of stage 2


@dataclasses.dataclass(frozen=True)
class Places:
    """Where what belongs to a shard lies.

    All files appear whole or not at all, and whoever makes one makes the same bytes: it does no harm when several
    workers are at the same shard.

    Attributes:
        output: the folder of the data set, a path or a URL.
    """

    output: str

    @property
    def output_dir(self) -> Path:
        """The folder of the data set."""
        return as_path(self.output)

    @property
    def work_dir(self) -> Path:
        """What is there only until all is done."""
        return self.output_dir / PROGRESS_DIR

    @property
    def temporary_dir(self) -> Path:
        """What workers have begun to write, or will never finish; on the filesystem of the output."""
        return self.work_dir / "unfinished"

    def make_folders(self) -> None:
        """Makes all folders. Workers make none: one that outlives its job must not bring them back."""
        inside = [self.work_dir / stage for stage in (FILTERED, DECIDED, WRITTEN)]
        for folder in (*inside, self.temporary_dir, self.output_dir / DATA_DIR, self.output_dir / DROPPED_DIR):
            folder.mkdir(parents=True, exist_ok=True)

    def file(self, stage: str, shard: int, suffix: str) -> Path:
        """A file of a stage; its note has the suffix .json."""
        return self.work_dir / stage / f"{shard:05d}{suffix}"

    def note(self, stage: str, shard: int) -> dict[str, Any] | None:
        """What a finished stage says of a shard; None if it is not finished."""
        path = self.file(stage, shard, ".json")
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def leave_note(self, stage: str, shard: int, note: dict[str, Any]) -> None:
        """Says that a stage is finished with a shard: the last thing that a worker does for it."""
        with whole_file(self.file(stage, shard, ".json"), self.temporary_dir) as file:
            file.write(json.dumps(note, ensure_ascii=False).encode())

    def finished(self, stage: str) -> set[int]:
        """The shards that have a note."""
        folder = self.work_dir / stage
        if not isinstance(folder, Path):
            folder.fs.invalidate_cache()
        return {int(path.name.removesuffix(".json")) for path in folder.iterdir() if path.name.endswith(".json")}

    def save(self, stage: str, shard: int, suffix: str, array: np.ndarray) -> None:
        """Writes an array."""
        with whole_file(self.file(stage, shard, suffix), self.temporary_dir) as file:
            np.save(file, np.ascontiguousarray(array))

    def load(self, stage: str, shard: int, suffix: str, dtype: type = np.int64) -> np.ndarray:
        """Reads an array; an empty one if there is none."""
        path = self.file(stage, shard, suffix)
        if not path.exists():
            return np.empty(0, dtype)
        with path.open("rb") as file:
            return np.load(file)

    def rejects(self, shard: int) -> Iterator[dict[str, Any]]:
        """What could not be read of a shard that was filtered."""
        path = self.file(FILTERED, shard, REJECTED_ROWS)
        return load_rows(path) if path.exists() else iter(())

    def keys(self, shard: int, bands: int) -> dedup.Keys:
        """The keys of the kept documents of a shard."""
        path = self.file(FILTERED, shard, KEYS)
        return dedup.KeyFile(path) if path.exists() else np.empty((bands + 2, 0), np.uint64)

    def paragraph_keys(self, shard: int) -> dedup.Keys:
        """The keys of the paragraphs of these documents, as one row."""
        path = self.file(FILTERED, shard, PARAGRAPHS)
        return dedup.KeyFile(path) if path.exists() else np.empty((1, 0), np.uint64)

    def paragraph_counts(self, shard: int) -> np.ndarray:
        """How many of them belong to each document."""
        return self.load(FILTERED, shard, PARAGRAPH_COUNTS)
