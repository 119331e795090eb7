"""What carries out the stages of a curation: a pool of processes here; Apache Spark is in `cpm_jax.curation.spark`."""

import abc
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cpm_jax.curation import dedup
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.places import DECIDED, FATES, GONE_PARAGRAPHS, Places
from cpm_jax.curation.readers import InputShard
from cpm_jax.data.workers import ordered_map


class Runner(abc.ABC):
    """Runs functions of shards somewhere, and decides about duplicates.

    What comes out does not depend on the runner, nor on how many workers it has.
    """

    @abc.abstractmethod
    def map(
        self,
        make_function: Callable[[], Callable[[InputShard], None]],
        shards: Sequence[InputShard],
        stage: str,
        places: Places,
    ) -> Iterator[InputShard]:
        """Applies a function to shards.

        Args:
            make_function: makes the function in each worker; can be pickled.
            shards: to be done, by any worker in any order.
            stage: whose note the function leaves.
            places: where it leaves it.

        Yields:
            Each shard that is finished.

        Raises:
            DataError: what a worker raised, or workers were lost again and again.
        """

    @abc.abstractmethod
    def find_duplicates(self, config: DedupConfig, shards: Sequence[InputShard], places: Places) -> None:
        """Decides about all documents and paragraphs that stage 1 kept, and writes of each shard what goes.

        The decision is that of `dedup.find_duplicates` and `dedup.find_duplicate_paragraphs`.
        """


class ProcessPool(Runner):
    """A pool of processes on this machine; duplicates are found in this process."""

    def __init__(self, num_workers: int | None = None):
        """Starts nothing yet.

        Args:
            num_workers: processes; None for one per core, 0 for none but this one.
        """
        self._num_workers = (os.cpu_count() or 1) if num_workers is None else num_workers

    def map(
        self,
        make_function: Callable[[], Callable[[InputShard], None]],
        shards: Sequence[InputShard],
        stage: str,
        places: Places,
    ) -> Iterator[InputShard]:
        """In the order of the shards."""
        del stage, places
        for shard, _ in ordered_map(make_function, ((shard, shard) for shard in shards), self._num_workers):
            yield shard

    def find_duplicates(self, config: DedupConfig, shards: Sequence[InputShard], places: Places) -> None:
        """One pass over all keys."""
        keys = [places.keys(shard.index, config.bands) for shard in shards]
        fates = dedup.find_duplicates(keys)
        counts = [places.paragraph_counts(shard.index) for shard in shards]
        paragraph_keys = [places.paragraph_keys(shard.index) for shard in shards]
        goes = dedup.find_duplicate_paragraphs(paragraph_keys, counts, fates)
        ends = np.cumsum([shard.shape[1] for shard in keys])
        for shard, own, gone in zip(shards, np.split(fates, ends)[:-1], goes, strict=True):
            places.save(DECIDED, shard.index, FATES, own)
            places.save(DECIDED, shard.index, GONE_PARAGRAPHS, gone)
