"""A job of `curate` that cannot end before it is killed, so that no kill comes too late."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cpm_jax.curation.places import Places
from cpm_jax.curation.readers import InputShard
from cpm_jax.curation.runners import Runner
from cpm_jax.data.prepare import PROGRESS_DIR


def notes(output: Path | str) -> int:
    """How many shards are finished, in both stages together."""
    return len(list((Path(output) / PROGRESS_DIR).glob("*/[0-9]*.json")))


def hold(runner: type[Runner], mark: int) -> None:
    """Lets a kind of runner stop for good after any shard, or stage, once `mark` shards are finished; 0 for never.

    Workers go on with what they have been given; the job, of which this process is the head, does not.
    """
    run = runner.map

    def held(
        self: Runner,
        make_function: Callable[[], Callable[[InputShard], None]],
        shards: Sequence[InputShard],
        stage: str,
        places: Places,
    ) -> Iterator[InputShard]:
        def wait() -> None:
            while mark and notes(str(places.output_dir)) >= mark:
                time.sleep(1)

        for shard in run(self, make_function, shards, stage, places):
            wait()
            yield shard
        wait()

    runner.map = held
