"""Batches of a mixture of packed datasets, addressed by global step; nothing here imports jax.

Row r of batch(step) is example step · batch_size + r of the run (`mixture.py` says which record that is), so a batch
depends on the mixture, the seed, the batch size and the step alone. Each process reads a contiguous slice of rows:
the slices of any number of processes, put together, are the same global batch. Opening at a step reads nothing before.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from absl import flags
from array_record.python import array_record_module

from cpm_jax.common.config import ConfigError
from cpm_jax.data.errors import DataError
from cpm_jax.data.manifest import Manifest
from cpm_jax.data.mixture import PERIOD, ExampleOrder, MixtureConfig, Stage
from cpm_jax.data.records import decode_record, to_rows

Batch = dict[str, np.ndarray]

# Elements are whole batches: a few being read at a time keep a training step fed.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
_MAX_STEPS = 1 << 40
_DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset folder that was checked.

    Attributes:
        name: of the mixture component.
        path: the folder.
        manifest: what it holds.
    """

    name: str
    path: str
    manifest: Manifest

    @property
    def tokenizer_path(self) -> Path:
        """The folder of its tokenizer."""
        return Path(self.path) / "tokenizer"


def open_datasets(config: MixtureConfig) -> tuple[Dataset, ...]:
    """Opens the components of a mixture and checks that they fit together; all have equal `manifest.seq_len`.

    Raises:
        DataError: naming a folder that is no dataset, a shard that is missing, cut off or holds another number of
            records than the manifest says, or two components with different tokenizers or sequence lengths.
    """
    datasets = tuple(Dataset(c.name, c.path, Manifest.load(c.path)) for c in config.components)
    first = datasets[0]
    for dataset in datasets:
        for field, what in (("seq_len", "seq_len"), ("tokenizer_sha256", "a tokenizer of sha256")):
            theirs, ours = getattr(first.manifest, field), getattr(dataset.manifest, field)
            if theirs != ours:
                raise DataError(
                    f"mixture: {first.path} has {what} {theirs} but {dataset.path} has {ours}: prepare all components "
                    "with the same tokenizer and seq_len"
                )
        for split in dataset.manifest.splits.values():
            for shard in split.shards:
                _check_shard(Path(dataset.path) / shard.path, shard.records)
    return datasets


def _check_shard(path: Path, records: int) -> None:
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError) as error:
        raise DataError(f"shard {path} cannot be read ({error}): prepare the dataset again") from error
    if found != records:
        raise DataError(f"shard {path} holds {found} records where the manifest says {records}: prepare it again")


def _open_split(dataset: Dataset, split: str) -> grain.sources.ArrayRecordDataSource:
    """The records of a split in their order, undecoded."""
    # With the numbers of records given, opening reads no file.
    shards = dataset.manifest.splits[split].shards
    paths = dataset.manifest.shard_paths(dataset.path, split)
    instructions = [f"{path}[0:{shard.records}]" for path, shard in zip(paths, shards, strict=True)]
    return grain.sources.ArrayRecordDataSource(instructions)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the rows of a batch. Travels to worker processes."""

    datasets: tuple[Dataset, ...]
    sources: tuple[grain.sources.ArrayRecordDataSource | None, ...]

    def __call__(self, records: Sequence[tuple[int, int] | None]) -> Batch:
        """Rows of the given records, each a component and an index in it; None is a row of padding."""
        shape = (len(records), self.datasets[0].manifest.seq_len)
        batch: Batch = {key: np.zeros(shape, dtype) for key, dtype in _DTYPES.items()}
        batch["source_ids"] = np.zeros(len(records), np.int32)
        for component, (dataset, source) in enumerate(zip(self.datasets, self.sources, strict=True)):
            rows = [row for row, record in enumerate(records) if record is not None and record[0] == component]
            if not rows:
                continue
            assert source is not None
            try:
                # One call for all rows: the C++ reader fetches and decompresses them in parallel.
                found = source.__getitems__([record[1] for record in records if record and record[0] == component])
                read = to_rows([decode_record(data) for data in found], dataset.manifest.seq_len)
            except (DataError, RuntimeError, ValueError) as error:
                raise DataError(
                    f"{dataset.path}: a record cannot be read ({error}); a shard is damaged, prepare the dataset again"
                ) from error
            for key, values in read.items():
                batch[key][rows] = values
            batch["source_ids"][rows] = component
        return batch


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    """The rows that a process reads of batch(step)."""

    order: ExampleOrder
    shuffled: tuple[grain.MapDataset, ...]  # of each component, the record at each position of its endless order
    read: _Reader
    batch_size: int
    first_row: int
    num_rows: int

    def __call__(self, step: int) -> Batch:
        first = step * self.batch_size + self.first_row
        places = [self.order.place(first + row) for row in range(self.num_rows)]
        return self.read([(component, self.shuffled[component][position]) for component, position in places])


@dataclasses.dataclass(frozen=True)
class _ValidationBatch:
    """The same for one pass over all records in order; past the last one, rows of padding."""

    sizes: tuple[int, ...]
    read: _Reader
    batch_size: int
    first_row: int
    num_rows: int

    def __call__(self, step: int) -> Batch:
        first = step * self.batch_size + self.first_row
        return self.read([self._place(first + row) for row in range(self.num_rows)])

    def _place(self, position: int) -> tuple[int, int] | None:
        for component, size in enumerate(self.sizes):
            if position < size:
                return component, position
            position -= size
        return None


class Loader(Iterator[Batch]):
    """Iterates over batches, one per step; `close` ends its worker processes."""

    def __init__(self, batch: Callable[[int], Batch], steps: range, num_workers: int):
        batches = grain.MapDataset.range(steps.start, steps.stop).map(batch).to_iter_dataset(_READ_OPTIONS)
        if num_workers:
            # Grain's workers read absl flags, which a program that is not an absl app never parses.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
        self._iterator: grain.DatasetIterator | None = iter(batches)

    def __next__(self) -> Batch:
        if self._iterator is None:
            raise StopIteration
        return next(self._iterator)

    def close(self) -> None:
        """Ends reading; a loader that was closed gives no more batches."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            # Given up here and not when the interpreter ends, which is too late for Grain's clean-up.
            iterator.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows(batch_size: int, process_index: int, process_count: int) -> dict[str, int]:
    """The slice of rows that a process reads."""
    if batch_size % process_count:
        raise ConfigError(
            f"batch_size = {batch_size}: must be a multiple of the number of processes, {process_count}",
            field="batch_size",
        )
    num_rows = batch_size // process_count
    return {"batch_size": batch_size, "first_row": process_index * num_rows, "num_rows": num_rows}


def _by_size(datasets: Sequence[Dataset]) -> Stage:
    """One stage with weights by number of records; even the smallest component gets the least weight there is."""
    sizes = [dataset.manifest.splits["train"].records for dataset in datasets]
    return Stage(start_step=0, weights=tuple(max(size, sum(sizes) / PERIOD) for size in sizes))


def make_loader(
    config: MixtureConfig,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
) -> Loader:
    """Opens the training split of a mixture at a step.

    Each component is shuffled as a whole, differently in each epoch, and repeated without end.

    Args:
        config: the mixture.
        batch_size: rows of the global batch.
        seed: of the order of records.
        start_step: global step of the first batch.
        process_index: which part of the rows to read; where several processes hold the same rows, they read the
            same part (`common.sharding.data_shard`).
        process_count: of how many; each has batch_size / process_count rows.
        num_workers: processes that read and decode; 0 reads in threads of this one. Batches do not depend on it.

    Returns:
        An endless iterator of this process's rows of batch(start_step), batch(start_step + 1), …, as in
        docs/architecture.md.

    Raises:
        DataError: as `open_datasets`.
        ConfigError: if the processes cannot share the batch equally.
    """
    rows = _rows(batch_size, process_index, process_count)
    datasets = open_datasets(config)
    shuffled = tuple(
        # A component's order depends on its own name: adding another one leaves it as it is.
        grain.MapDataset.range(dataset.manifest.splits["train"].records)
        .shuffle(seed=zlib.crc32(f"{seed} {dataset.name}".encode()))
        .repeat()
        for dataset in datasets
    )
    order = ExampleOrder(config.stages or (_by_size(datasets),), batch_size)
    reader = _Reader(datasets, tuple(_open_split(dataset, "train") for dataset in datasets))
    return Loader(_TrainBatch(order, shuffled, reader, **rows), range(start_step, _MAX_STEPS), num_workers)


def make_validation_loader(
    config: MixtureConfig, batch_size: int, *, process_index: int = 0, process_count: int = 1, num_workers: int = 0
) -> Loader:
    """Opens the validation splits of a mixture for one pass in order, one component after the other.

    The last batch is filled up with rows of padding, whose loss weights are 0; all processes get the same number of
    batches and nothing is left out.

    Args:
        config: the mixture; its stages do not matter.
        batch_size: rows of the global batch.
        process_index: which process this is.
        process_count: of how many.
        num_workers: as in `make_loader`.

    Raises:
        DataError: as `open_datasets`, or if no component has a validation split.
        ConfigError: if the processes cannot share the batch equally.
    """
    rows = _rows(batch_size, process_index, process_count)
    datasets = open_datasets(config)
    if not any("validation" in dataset.manifest.splits for dataset in datasets):
        raise DataError(
            f"no validation split in {', '.join(dataset.path for dataset in datasets)}: prepare with a "
            "validation_fraction above 0, or train without evaluation"
        )
    held_out = tuple("validation" in dataset.manifest.splits for dataset in datasets)
    sizes = tuple(
        d.manifest.splits["validation"].records if has else 0 for d, has in zip(datasets, held_out, strict=True)
    )
    sources = tuple(
        _open_split(dataset, "validation") if has else None for dataset, has in zip(datasets, held_out, strict=True)
    )
    batch = _ValidationBatch(sizes, _Reader(datasets, sources), **rows)
    return Loader(batch, range(-(-sum(sizes) // batch_size)), num_workers)
