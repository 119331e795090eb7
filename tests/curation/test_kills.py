"""A job that is killed again and again, workers and all, ends with the bytes of one that never was."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.curation.held_jobs import notes
from tests.curation.test_pipeline import digest, prose

SHARDS = 8
SCRIPT = """
import json, sys
from cpm_jax.curation.gopher import GopherQuality, GopherRepetition
from cpm_jax.curation.pipeline import PipelineConfig, curate
from cpm_jax.curation.runners import Pool
from tests.curation.held_jobs import hold
if __name__ == "__main__":
    hold(Pool, int(sys.argv[4]))
    filters = (GopherRepetition(max_duplicate_ngram_characters=()), GopherQuality())
    curate(PipelineConfig(sources=sys.argv[1], filters=filters, num_workers=int(sys.argv[3])), sys.argv[2],
           progress=False)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    for shard in range(SHARDS):
        # Some documents of each shard are also in the next, so that shards decide about each other.
        rows = [{"text": prose(shard * 80 + number, 120), "id": f"{shard}/{number}"} for number in range(100)]
        (root / f"{shard:02d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def start(corpus, output, num_workers, hold_at=0):
    command = [sys.executable, "-c", SCRIPT, str(corpus), str(output), str(num_workers), str(hold_at)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)


def finish(process):
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error.decode()


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("expected") / "out"
    finish(start(corpus, output, 0))
    manifest = json.loads((output / "curation.json").read_text())
    assert len(manifest["files"]) == 2 * SHARDS
    assert manifest["drops"] == {"exact duplicate": 20 * (SHARDS - 1)}
    return digest(output)


def kill_at(process, output, mark, seconds=0.0):
    """Kills a job and all its workers some time after so many shards are finished; fails if it ended before."""
    end = time.monotonic() + 300
    try:
        while (reached := notes(output)) < mark and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        error = process.communicate()[1]
    assert reached >= mark, error.decode()
    assert process.returncode == -signal.SIGKILL, error.decode()


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_each_shard_has_its_output_once_however_often_all_is_killed(corpus, expected, tmp_path, kills):
    output = tmp_path / "out"
    draw = random.Random(kills)
    # So that the kills fall on all of the work, each comes when a little more than before is finished.
    marks = sorted(draw.sample(range(1, 2 * SHARDS), kills))
    for mark in marks:
        process = start(corpus, output, draw.choice([0, 2]), hold_at=mark)
        kill_at(process, output, mark - draw.choice([0, 1]), draw.random() * 0.05)
    finish(start(corpus, output, 2))
    assert digest(output) == expected
