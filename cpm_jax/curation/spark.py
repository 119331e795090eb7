"""Curation on a cluster: the same functions in the executors of Apache Spark, duplicates found by its shuffles.

Spark moves numbers only. Documents, keys and decisions are files of each shard, which executors read and write by
themselves, on a filesystem that all of them and this process reach; so a task that Spark repeats, or runs twice at
once, writes the same bytes again.

Needs the extra `spark` and Java.
"""

import contextlib
import functools
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from cpm_jax.common.config import InputError
from cpm_jax.common.extras import how_to_install
from cpm_jax.curation.dedup import EXACT, FIXED_KEYS, NEAR, SAME_ID, DedupConfig, stays
from cpm_jax.curation.places import DECIDED, FATES, FILTERED, GONE_PARAGRAPHS, Places
from cpm_jax.curation.readers import InputShard
from cpm_jax.curation.runners import Runner
from cpm_jax.data.errors import DataError

try:
    import pyarrow
    import pyspark
    from pyspark.errors import PySparkException
    from pyspark.sql import DataFrame, SparkSession, Window
    from pyspark.sql import functions as F
    from pyspark.storagelevel import StorageLevel
except ImportError as error:
    raise DataError(f"Apache Spark is needed for spark_master: {how_to_install('spark')} ({error})") from error

Batches: TypeAlias = Iterator[pyarrow.RecordBatch]

JAVA = 17  # the least that Spark 4 runs on
_PARTITION_BYTES = 1 << 27  # of a shuffle, about
_ROW_BYTES = 24  # of a key in a shuffle, about
_POLL_SECONDS = 1.0
_OF_SHARD = 32  # the bits of a place that say which document, or paragraph, of the shard it is
_WITHIN = (1 << _OF_SHARD) - 1


def check_java() -> None:
    """Finds the Java that Spark would start.

    Raises:
        DataError: there is none, or it is too old; says how to get one.
    """
    home = os.environ.get("JAVA_HOME")
    java = f"{home}/bin/java" if home else "java"
    advice = f"Spark needs Java {JAVA} or later: apt-get install openjdk-{JAVA}-jre-headless, or set JAVA_HOME"
    if shutil.which(java) is None:
        raise DataError(f"{advice} (no {java} was found)")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(\d+)', said)
    if version is None or int(version[1]) < JAVA:
        raise DataError(f"{advice} ({java} says: {said.strip().splitlines()[0] if said.strip() else 'nothing'})")


@contextlib.contextmanager
def session(master: str) -> Iterator[SparkSession]:
    """A connection to a cluster, or the one that this process has already.

    Args:
        master: as Spark names it: "spark://host:7077", "yarn", "k8s://…", "local[4]". All other settings are those of
            Spark's own `spark-defaults.conf` in the folder `SPARK_CONF_DIR`.

    Raises:
        DataError: there is no Java, or no such cluster.
    """
    if active := SparkSession.getActiveSession():
        if (its_master := active.sparkContext.master) != master:
            raise DataError(f"spark_master = {master!r}: this process works with {its_master!r} already")
        yield active
        return
    check_java()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # of executors, too
    builder = SparkSession.builder.master(master).appName("curate")
    builder = builder.config("spark.ui.showConsoleProgress", "false")  # there is a bar already
    # Executors that see the files of this process, as on a shared mount, run the same code; others what is installed.
    code = str(Path(__file__).resolve().parents[2])
    code = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
    builder = builder.config("spark.executorEnv.PYTHONPATH", code)
    with _errors_of_spark():
        started = builder.getOrCreate()
    started.sparkContext.setLogLevel("ERROR")
    try:
        yield started
    finally:
        started.stop()


@contextlib.contextmanager
def _errors_of_spark() -> Iterator[None]:
    """Turns errors of Spark itself into one that says what to do."""
    from py4j.protocol import Py4JError

    try:
        yield
    except (PySparkException, Py4JError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        what = lines[0] if lines[0] == lines[-1] else f"{lines[0]} … {lines[-1]}"
        raise DataError(f"Spark gave up: {what}; run the same command again, finished shards are kept") from error


class Spark(Runner):
    """Apache Spark. What is known of single documents never comes to this process."""

    def __init__(self, session: SparkSession):
        """Uses a session."""
        self._spark = session

    def map(
        self,
        make_function: Callable[[], Callable[[InputShard], None]],
        shards: Sequence[InputShard],
        stage: str,
        places: Places,
    ) -> Iterator[InputShard]:
        """One task per shard; a shard is finished as soon as its note is there."""
        if not shards:
            return
        waiting = {shard.index: shard for shard in shards}
        job = _Job(lambda: self._of_shards(shards, functools.partial(_apply, make_function), "error string").collect())
        while waiting:
            is_last = job.wait(_POLL_SECONDS)
            for index in sorted(waiting.keys() & places.finished(stage)):
                yield waiting.pop(index)
            if is_last:
                break
        for row in job.result():
            if row.error:
                raise DataError(row.error)
        assert not waiting, f"no note of the shards {sorted(waiting)}"

    def find_duplicates(self, config: DedupConfig, shards: Sequence[InputShard], places: Places) -> None:
        """Which documents go, then which paragraphs of those that stay: a shuffle by key each, one of what goes."""
        if not shards:
            return
        shards = [InputShard(shard.index, "", (), shard.num_bytes) for shard in shards]  # the names are not needed
        with _errors_of_spark():
            self._decide_documents(config, shards, places)
            self._decide_paragraphs(shards, places)

    def _of_shards(
        self, shards: Sequence[InputShard], function: Callable[[Batches], Batches], schema: str
    ) -> DataFrame:
        """What a function makes of shards, each in a task of its own."""
        number = pyarrow.array(range(len(shards)), pyarrow.int32())
        rows = pyarrow.table({"task": number, "shard": [pickle.dumps(shard) for shard in shards]})
        frame = self._spark.createDataFrame(rows).repartitionById(len(shards), "task")
        return frame.select("shard").mapInArrow(function, schema)

    def _set_partitions(self, rows: int) -> None:
        """As many partitions of a shuffle as its rows need; Spark joins small ones."""
        least = 2 * self._spark.sparkContext.defaultParallelism
        self._spark.conf.set("spark.sql.shuffle.partitions", max(least, rows * _ROW_BYTES // _PARTITION_BYTES))

    def _decide_documents(self, config: DedupConfig, shards: Sequence[InputShard], places: Places) -> None:
        bands = config.bands
        documents = sum((places.note(FILTERED, shard.index) or {"documents": 0})["documents"] for shard in shards)
        self._set_partitions(documents * (FIXED_KEYS + bands))
        keys = self._of_shards(shards, functools.partial(_keys, bands, places), "row int, key long, place long")
        # As in `dedup.find_duplicates`: of each key all documents but the first, whether they stay or not.
        later = _all_but_first(keys, "row", "key")
        first_if_near = F.when(F.col("row") >= FIXED_KEYS, F.col("first"))
        later = later.groupBy("place").agg(F.min("row").alias("row"), F.collect_set(first_if_near).alias("firsts"))
        later = later.persist(StorageLevel.DISK_ONLY)
        fate = F.when(F.col("row") == 0, EXACT).otherwise(SAME_ID).cast("int").alias("fate")
        copies = later.where(F.col("row") < FIXED_KEYS).select("place", fate)
        links = later.where(F.col("row") > 0).select("place", F.explode("firsts").alias("first"))
        groups = first_of_groups(links)
        near = groups.select("place", F.lit(NEAR).cast("int").alias("fate"))
        # Of several reasons the smallest number counts.
        gone = copies.union(near).groupBy("place").agg(F.min("fate").alias("fate"))
        self._write(gone, shards, lambda rows: _write_fates(bands, places, rows))
        groups.unpersist()
        later.unpersist()

    def _decide_paragraphs(self, shards: Sequence[InputShard], places: Places) -> None:
        keys = self._of_shards(shards, functools.partial(_paragraph_keys, places), "key long, place long")
        gone = _all_but_first(keys, "key").select("place", F.lit(1).alias("fate"))
        self._write(gone, shards, lambda rows: _write_paragraphs(places, rows))

    def _write(
        self, gone: DataFrame, shards: Sequence[InputShard], write: Callable[[pyarrow.Table], pyarrow.Table]
    ) -> None:
        """Brings what goes to where the file of its shard is written; also of shards of which nothing goes.

        `write` is no `functools.partial`: Spark looks for type hints, and does not find those of one.
        """
        shard = F.shiftright("place", _OF_SHARD).cast("int").alias("shard")
        within = F.col("place").bitwiseAND(F.lit(_WITHIN)).alias("number")
        all_shards = self._spark.createDataFrame(
            pyarrow.table(
                {
                    "shard": pyarrow.array([shard.index for shard in shards], pyarrow.int32()),
                    "number": pyarrow.array([-1] * len(shards), pyarrow.int64()),
                    "fate": pyarrow.array([0] * len(shards), pyarrow.int32()),
                }
            )
        )
        rows = gone.select(shard, within, "fate").union(all_shards)
        rows.groupBy("shard").applyInArrow(write, "shard int").count()


class _Job:
    """An action of Spark in a thread, so that this one can look at what is done."""

    def __init__(self, action: Callable[[], Any]):
        self._outcome: list[Any] = []
        self._error: list[BaseException] = []
        self._thread = pyspark.InheritableThread(target=self._run, args=(action,), daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[], Any]) -> None:
        try:
            self._outcome.append(action())
        except BaseException as error:
            self._error.append(error)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within these seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> Any:
        """What it gave, or the error that it ended with."""
        self._thread.join()
        if self._error:
            with _errors_of_spark():
                raise self._error[0]
        return self._outcome[0]


def _all_but_first(keys: DataFrame, *by: str) -> DataFrame:
    """Of keys that occur more than once: all places but the first, and beside them the first."""
    first = F.min("place").over(Window.partitionBy(*by)).alias("first")
    return keys.select("*", first).where(F.col("place") > F.col("first"))


def first_of_groups(links: DataFrame) -> DataFrame:
    """The first member of each group of places that are linked, directly or through others.

    Alternating "large-star" and "small-star" steps, each a shuffle (Kiveris et al., Connected Components in MapReduce
    and Beyond, 2014), until no link changes: about the logarithm of the longest way through a group.

    Args:
        links: columns `place` and `first`, `first < place`.

    Returns:
        Columns `place` and `first`: every member but the first, and the first; persisted.
    """
    before, rounds = None, list[DataFrame]()
    while True:
        # Large star: all larger neighbours of a place are linked to its smallest neighbour, or to itself.
        both = links.select(F.explode(_both_ways()).alias("link")).select("link.*")
        smallest = F.least("place", F.min("first").over(Window.partitionBy("place"))).alias("smallest")
        large = both.select("*", smallest).where(F.col("first") > F.col("place"))
        large = large.select(F.col("first").alias("place"), F.col("smallest").alias("first")).distinct()
        # Small star: a place and all its smaller neighbours are linked to the smallest of these.
        smallest = F.min("first").over(Window.partitionBy("place")).alias("smallest")
        ends = F.explode(F.array("place", "first")).alias("place")
        small = large.select("*", smallest).select(ends, F.col("smallest").alias("first"))
        links = small.where(F.col("place") > F.col("first")).distinct().persist(StorageLevel.DISK_ONLY)
        now = links.agg(F.count("*"), F.bit_xor(F.xxhash64("place", "first"))).first()
        rounds.append(links)
        if now == before:
            for earlier in rounds[:-1]:  # not before: what is lost with an executor is made again from these
                earlier.unpersist()
            return links
        before = now


def _both_ways() -> Any:
    there = F.struct("place", "first")
    back = F.struct(F.col("first").alias("place"), F.col("place").alias("first"))
    return F.array(there, back)


# What runs in executors.


def _shards(batches: Batches) -> Iterator[InputShard]:
    for batch in batches:
        for shard in batch.column("shard"):
            yield pickle.loads(shard.as_py())


def _apply(make_function: Callable[[], Callable[[InputShard], None]], batches: Batches) -> Batches:
    """Calls the function; an error that would come again is no reason for Spark to try again."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as cores already
    function = make_function()
    for shard in _shards(batches):
        error = ""
        try:
            function(shard)
        except InputError as raised:
            error = str(raised)
        yield pyarrow.RecordBatch.from_pydict({"error": [error]})


def _batch(columns: dict[str, np.ndarray]) -> pyarrow.RecordBatch:
    return pyarrow.RecordBatch.from_pydict({name: pyarrow.array(values) for name, values in columns.items()})


def _places_of(shard: InputShard, numbers: np.ndarray) -> np.ndarray:
    """Numbers that are ordered as the documents, or paragraphs, of all shards."""
    return (np.int64(shard.index) << np.int64(_OF_SHARD)) | numbers.astype(np.int64)


def _keys(bands: int, places: Places, batches: Batches) -> Batches:
    """The keys of the documents of shards; 0 is none."""
    for shard in _shards(batches):
        keys = places.keys(shard.index, bands)
        for row in range(keys.shape[0]):
            column = keys[row]
            (chosen,) = np.nonzero(column)
            rows = np.full(len(chosen), row, np.int32)
            yield _batch({"row": rows, "key": column[chosen].view(np.int64), "place": _places_of(shard, chosen)})


def _paragraph_keys(places: Places, batches: Batches) -> Batches:
    """The keys of the paragraphs of those documents that stay."""
    for shard in _shards(batches):
        counts = places.paragraph_counts(shard.index)
        if not len(counts):
            continue
        of_kept = np.repeat(stays(places.load(DECIDED, shard.index, FATES)), counts)
        column = places.paragraph_keys(shard.index)[0]
        (chosen,) = np.nonzero(of_kept & (column != 0))
        yield _batch({"key": column[chosen].view(np.int64), "place": _places_of(shard, chosen)})


def _decided(rows: pyarrow.Table, size: int) -> np.ndarray:
    """Of each document or paragraph of a shard what was decided."""
    number, fate = rows.column("number").to_numpy(), rows.column("fate").to_numpy()
    fates = np.zeros(size, np.uint8)
    fates[number[number >= 0]] = fate[number >= 0]
    return fates


def _shard_of(rows: pyarrow.Table) -> int:
    return rows.column("shard")[0].as_py()


def _write_fates(bands: int, places: Places, rows: pyarrow.Table) -> pyarrow.Table:
    shard = _shard_of(rows)
    places.save(DECIDED, shard, FATES, _decided(rows, places.keys(shard, bands).shape[1]))
    return rows.select(["shard"]).slice(0, 1)


def _write_paragraphs(places: Places, rows: pyarrow.Table) -> pyarrow.Table:
    shard = _shard_of(rows)
    gone = _decided(rows, int(places.paragraph_counts(shard).sum())).astype(bool)
    places.save(DECIDED, shard, GONE_PARAGRAPHS, gone)
    return rows.select(["shard"]).slice(0, 1)
