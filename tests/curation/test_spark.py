"""Spark as the engine of `curate`: the decisions of one pass, the bytes of the pool, and nothing lost with a worker."""

import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.curation import dedup, spark, spark_cluster
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.gopher import GopherQuality
from cpm_jax.curation.pipeline import PipelineConfig, curate
from cpm_jax.curation.places import (
    DECIDED,
    FATES,
    FILTERED,
    GONE_PARAGRAPHS,
    KEYS,
    PARAGRAPH_COUNTS,
    PARAGRAPHS,
    Places,
)
from cpm_jax.curation.readers import InputShard
from cpm_jax.data.errors import DataError
from tests.curation.held_jobs import notes
from tests.curation.test_kills import SHARDS, corpus, kill_at  # noqa: F401
from tests.curation.test_pipeline import digest, prose

DEFAULTS = """
spark.driver.memory 512m
spark.executor.memory 512m
spark.ui.enabled false
spark.driver.extraJavaOptions -XX:TieredStopAtLevel=1 -XX:+UseSerialGC
spark.executor.extraJavaOptions -XX:TieredStopAtLevel=1 -XX:+UseSerialGC
spark.sql.codegen.wholeStage false
"""
SCRIPT = """
import sys
from cpm_jax.curation.gopher import GopherQuality
from cpm_jax.curation.pipeline import PipelineConfig, curate
from cpm_jax.curation.spark import Spark
from tests.curation.held_jobs import hold
if __name__ == "__main__":
    hold(Spark, int(sys.argv[4]))
    config = PipelineConfig(sources=sys.argv[1], filters=(GopherQuality(),), spark_master=sys.argv[3])
    curate(config, sys.argv[2], progress=False)
"""


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory):
    """Little memory, and nothing made faster that runs but once: what a user would write into a file of Spark's."""
    folder = tmp_path_factory.mktemp("conf")
    (folder / "spark-defaults.conf").write_text(DEFAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_CONF_DIR", str(folder))
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        patch.setenv("SPARK_DAEMON_JAVA_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")
        yield


@pytest.fixture(scope="module")
def cluster(settings):
    with spark_cluster.cluster(workers=2, cores=1, memory="1g") as started:
        yield started


@pytest.fixture
def local(settings):
    with spark.session("local[2]") as session:
        yield session


def planted(places: Places, seed: int) -> tuple[list[InputShard], list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Shards, one of them empty, whose keys agree often: the smaller the range, the longer the chains of links."""
    draw = np.random.default_rng(seed)
    shards, keys, paragraphs, counts = [], [], [], []
    for index, size in ((0, 70), (2, 0), (3, 40), (7, 90)):
        ranges = np.array([[1000], [1200], [900], [900], [900]])
        keys.append(draw.integers(0, ranges, size=(5, size)).astype(np.uint64) << np.uint64(53))  # some above 2⁶³
        counts.append(draw.integers(0, 4, size=size))
        paragraphs.append(draw.integers(0, 300, size=(1, counts[-1].sum())).astype(np.uint64))
        if size:
            places.save(FILTERED, index, KEYS, keys[-1])
            places.save(FILTERED, index, PARAGRAPHS, paragraphs[-1])
            places.save(FILTERED, index, PARAGRAPH_COUNTS, counts[-1])
        places.leave_note(FILTERED, index, {"documents": size})
        shards.append(InputShard(index, "source", (), 0))
    return shards, keys, paragraphs, counts


def test_shuffles_find_what_one_pass_finds(local, tmp_path):
    places = Places(str(tmp_path))
    places.make_folders()
    shards, keys, paragraphs, counts = planted(places, seed=0)
    fates = dedup.find_duplicates(keys)
    gone = dedup.find_duplicate_paragraphs(paragraphs, counts, fates)
    assert (np.bincount(fates, minlength=4) > 5).all()  # there is something to get wrong
    assert 5 < sum(map(np.sum, gone)) < sum(map(len, gone)) / 2
    spark.Spark(local).find_duplicates(DedupConfig(bands=3), shards, places)
    found = [places.load(DECIDED, shard.index, FATES) for shard in shards]
    assert [own.tolist() for own in found] == [own.tolist() for own in np.split(fates, np.cumsum([70, 0, 40]))]
    found = [places.load(DECIDED, shard.index, GONE_PARAGRAPHS) for shard in shards]
    assert [own.tolist() for own in found] == [own.tolist() for own in gone]


def test_groups_hang_together_over_long_ways(local):
    draw = np.random.default_rng(1)
    ways = [draw.permutation(12) + start for start in (0, 100)]
    links = np.concatenate([np.stack([way[:-1], way[1:]], axis=1) for way in ways])
    links = np.sort(links, axis=1)
    frame = local.createDataFrame(pyarrow.table({"place": links[:, 1], "first": links[:, 0]}))
    found = {(row.place, row.first) for row in spark.first_of_groups(frame).collect()}
    assert found == {(start + number, start) for start in (0, 100) for number in range(1, 12)}


def damaged_corpus(root: Path) -> Path:
    """Duplicates within and across shards, rejects, a shard that is cut off, one without a document."""
    root.mkdir()
    for shard in range(4):
        rows = [{"text": prose(shard * 20 + number, 120), "id": f"{shard}/{number}"} for number in range(25)]
        rows[10] |= {"id": "10", "source": "one"}  # in every shard, with different texts
        rows[7]["text"] = rows[6]["text"] + " One more sentence."
        rows[8]["text"] = f"{prose(1, 120)}\n\n{prose(shard * 100, 120)}"
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{shard}.jsonl").write_text(lines + "{broken\n")
    (root / "4.parquet").write_bytes(b"PAR1 and no more")
    (root / "5.jsonl").write_text("")
    return root


def test_a_cluster_writes_the_bytes_of_the_pool_through_urls_too(cluster, tmp_path, monkeypatch):
    """Sources by a relative name: workers have other working folders than the driver."""
    damaged_corpus(tmp_path / "in")
    filters = (GopherQuality(),)
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    monkeypatch.chdir(tmp_path)
    expected = curate(PipelineConfig("in", filters, num_workers=0), "pool", progress=False)
    assert expected["drops"].keys() >= {"exact duplicate", "near duplicate"}
    assert expected["repeated_ids"] == 3
    assert [item["id"] for item in expected["quarantined"]] == ["4.parquet:1"]
    command = [sys.executable, "-m", "experiments.run", "curate", "--workdir=run"]
    command += ["--gin.DATA=in", f"--gin.SPARK_MASTER={cluster.url}", "--gin.EVALUATION_SETS=()"]
    command += ["--gin.FILTERS=(@gopher.GopherQuality(),)", f"--gin.OUTPUT_DIR=file://{tmp_path / 'spark'}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for stage in ("filtered", "written"):
        assert re.search(rf"^{stage}: \S+B/\S+B, ETA \d+:\d\d, documents/s ", done.stderr, re.MULTILINE)
    assert digest(tmp_path / "spark") == digest(tmp_path / "pool")


def slow_filter():
    """A filter that executors get by value; made here, it is in no module that they could import."""

    def slowly(document):
        time.sleep(0.02)
        return document

    return slowly


def process_tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = [root]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def test_a_worker_that_is_killed_costs_no_document(cluster, corpus, tmp_path):  # noqa: F811
    filters = (slow_filter(),)
    curate(PipelineConfig(str(corpus), filters, num_workers=0), tmp_path / "pool", progress=False)
    killed = []

    def kill():
        while notes(tmp_path / "spark") < 2:
            time.sleep(0.01)
        killed.extend(process_tree(cluster.workers[0].pid))
        for process in killed:
            os.kill(process, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    config = PipelineConfig(str(corpus), filters, spark_master=cluster.url)
    curate(config, tmp_path / "spark", progress=False)
    killer.join()
    assert len(killed) >= 3  # the worker, its executor, and Python
    assert digest(tmp_path / "spark") == digest(tmp_path / "pool")
    cluster.workers.pop(0).wait()
    cluster.add_worker(cores=1, memory="1g")


@pytest.mark.slow
def test_each_shard_has_its_output_once_however_often_the_driver_is_killed(cluster, corpus, tmp_path):  # noqa: F811
    filters = (GopherQuality(),)
    curate(PipelineConfig(str(corpus), filters, num_workers=0), tmp_path / "pool", progress=False)
    output = tmp_path / "spark"
    draw = random.Random(5)
    start = functools.partial(
        subprocess.Popen,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    # Each kill comes when a little more than before is finished; some while duplicates are looked for, the last while
    # the output is written. The driver stops one shard later, so that none of them comes too late.
    marks = [*sorted(draw.choices(range(1, SHARDS + 1), k=9)), SHARDS + 1]
    assert marks.count(SHARDS) > 1
    assert len(marks) == 10
    for mark in marks:
        master = draw.choice(["local[2]", cluster.url])
        process = start([sys.executable, "-c", SCRIPT, corpus, output, master, str(mark + 1)])
        kill_at(process, output, mark, 2 * draw.random() if mark == SHARDS else 0)
    process = start([sys.executable, "-c", SCRIPT, corpus, output, cluster.url, "0"])
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error.decode()
    assert digest(output) == digest(tmp_path / "pool")


def test_what_a_worker_cannot_do_is_said_as_by_the_pool(local, tmp_path):
    def fail(document):
        raise DataError(f"no room for {document.id}")

    (tmp_path / "in.jsonl").write_text('{"text": "a", "id": "one"}\n')
    config = PipelineConfig(str(tmp_path / "in.jsonl"), (fail,), spark_master="local[2]")
    with pytest.raises(DataError, match=r"^no room for one$"):
        curate(config, tmp_path / "out", progress=False)


def test_a_filter_that_fails_is_named_with_file_and_document_at_the_first_try(local, tmp_path):
    def fail(document):
        with (tmp_path / "tries").open("a") as file:
            file.write("x")
        raise ValueError("odd")

    (tmp_path / "in.jsonl").write_text('{"text": "a", "id": "one"}\n')
    config = PipelineConfig(str(tmp_path / "in.jsonl"), (fail,), spark_master="local[2]")
    with pytest.raises(DataError, match=r"^in\.jsonl: filter .*fail, document 'one' of .*: raised ValueError: odd$"):
        curate(config, tmp_path / "out", progress=False)
    assert (tmp_path / "tries").read_text() == "x"


@pytest.mark.parametrize("version", [None, "11.0.2"])
def test_java_that_is_missing_or_old_is_named(tmp_path, monkeypatch, version):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if version:
        java = tmp_path / "java"
        java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
        java.chmod(0o755)
    with pytest.raises(DataError, match=f"Java 17 or later: apt-get install.*{version or 'no java was found'}"):
        spark.check_java()


def test_spark_that_is_not_installed_is_named(tmp_path):
    code = (
        "import sys; sys.modules['pyspark'] = None\n"
        "from cpm_jax.curation.pipeline import *\n"
        f"curate(PipelineConfig({str(tmp_path / 'in.txt')!r}, spark_master='local[2]'), {str(tmp_path / 'out')!r})"
    )
    (tmp_path / "in.txt").write_text("text")
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "pip install -e '.[spark]'" in done.stderr.splitlines()[-1]


def test_one_process_has_one_master(local):
    with pytest.raises(DataError, match=r"works with 'local\[2\]' already"), spark.session("spark://elsewhere:7077"):
        pass


def test_workers_are_the_clusters_business(tmp_path):
    with pytest.raises(ConfigError, match="num_workers = 3: with spark_master = 'local' the cluster says"):
        PipelineConfig(str(tmp_path), num_workers=3, spark_master="local")
