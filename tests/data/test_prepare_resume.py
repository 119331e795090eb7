"""Kills, full disks and other interruptions: the same command goes on, to the same bytes."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest

from cpm_jax.data.errors import DataError
from cpm_jax.data.prepare import PROGRESS_DIR, PrepareConfig, prepare

SCRIPT = """
import json, sys
from cpm_jax.data.prepare import PrepareConfig, prepare
if __name__ == "__main__":
    prepare(PrepareConfig(**json.loads(sys.argv[1])), sys.argv[2], progress=False)
    print("done")
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A subset of the standard library, in a folder, a jsonl file and with rejects."""
    root = tmp_path_factory.mktemp("sources")
    stdlib = os.path.dirname(json.__file__)
    lines = []
    for name in sorted(os.listdir(os.path.dirname(stdlib)))[:30]:
        path = os.path.join(os.path.dirname(stdlib), name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                text = file.read()
            lines += [json.dumps({"text": text[i : i + 3000]}) for i in range(0, len(text), 3000)][:20]
    lines.insert(10, '{"text": "cut')
    (root / "a.jsonl").write_text("\n".join(lines))
    return {
        "sources": [str(root / "a.jsonl"), stdlib],
        "seq_len": 128,
        "vocab_size": 500,
        "validation_fraction": 0.1,
        "shard_bytes": 25_000,
        "num_workers": 0,
    }


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    manifest = prepare(PrepareConfig(**arguments), folder, progress=False)
    assert len(manifest.splits["train"].shards) > 10
    assert len(manifest.splits["validation"].shards) > 1
    assert manifest.rejects["malformed JSON"] == 1
    return contents(folder)


def start(arguments, folder, **options):
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", SCRIPT, json.dumps(arguments), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_three_workers_give_the_same_bytes(arguments, expected, tmp_path):
    prepare(PrepareConfig(**arguments | {"num_workers": 3}), tmp_path, progress=False)
    assert contents(tmp_path) == expected


def wait_for_shards(process, folder, count):
    """Until so many shards are finished."""
    while len(list((folder / PROGRESS_DIR).glob("*-[0-9]*.json"))) < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def kill(process):
    process.kill()
    process.communicate()


def test_a_killed_run_goes_on_to_the_same_bytes(arguments, expected, tmp_path):
    rng = random.Random(0)
    total = sum(name.endswith(".array_record") for name in expected)
    for share in (0.0, 0.2, 0.5, 0.8):
        process = start(arguments | {"num_workers": rng.choice([0, 2])}, tmp_path)
        wait_for_shards(process, tmp_path, int(share * total))
        time.sleep(rng.uniform(0, 0.05))
        kill(process)
    assert not (tmp_path / "manifest.json").exists()
    process = start(arguments, tmp_path)
    process.communicate()
    assert process.returncode == 0
    assert contents(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_at_every_kind_of_change(arguments, expected, tmp_path, moment):
    """Kills itself around the n-th rename, flush or removal, for growing n, until nothing is left to be killed at."""
    script = (
        """
import os, shutil, signal
calls = int(os.environ["SURVIVED"])
def around(real):
    def call(*args, **options):
        global calls
        calls -= 1
        if calls < 0 and os.environ["MOMENT"] == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args, **options)
        if calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return call
os.replace, os.fsync, shutil.rmtree = around(os.replace), around(os.fsync), around(shutil.rmtree)
"""
        + SCRIPT
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "MOMENT": moment}
    command = [sys.executable, "-c", script, json.dumps(arguments), str(tmp_path)]
    kills = survived = 0
    while (code := subprocess.run(command, env=environment | {"SURVIVED": str(survived)}, check=False).returncode) != 0:
        assert code == -signal.SIGKILL
        kills += 1
        survived += 1 + survived // 3
    assert kills > 5
    assert contents(tmp_path) == expected


def test_finished_shards_are_not_done_again(arguments, tmp_path, monkeypatch):
    from cpm_jax.data import encoding

    folder = tmp_path / "out"
    process = start(arguments, folder)
    wait_for_shards(process, folder, 6)
    kill(process)
    notes = sorted(folder.glob(f"{PROGRESS_DIR}/*-[0-9]*.json"))
    finished = sum(json.loads(note.read_text())["shard"]["documents"] for note in notes)
    encoded = []
    real = encoding.Encoder.__call__
    monkeypatch.setattr(encoding.Encoder, "__call__", lambda self, texts: encoded.extend(texts) or real(self, texts))
    manifest = prepare(PrepareConfig(**arguments), folder, progress=False)
    assert len(encoded) == sum(split.documents for split in manifest.splits.values()) - finished


def test_a_damaged_shard_is_done_again(arguments, expected, tmp_path):
    process = start(arguments, tmp_path)
    wait_for_shards(process, tmp_path, 6)
    kill(process)
    shard = tmp_path / PROGRESS_DIR / "train-00001.array_record"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (tmp_path / PROGRESS_DIR / "train-00002.array_record").unlink()
    prepare(PrepareConfig(**arguments), tmp_path, progress=False)
    assert contents(tmp_path) == expected


def test_changed_sources_are_noticed(arguments, tmp_path):
    source = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"line {i} " * 300}) for i in range(200)]
    source.write_text("\n".join(lines))
    config = PrepareConfig(**arguments | {"sources": str(source)})
    process = start(arguments | {"sources": str(source)}, tmp_path / "out")
    wait_for_shards(process, tmp_path / "out", 3)
    kill(process)
    source.write_text("\n".join(["{}", *lines[3:]]))
    with pytest.raises(DataError, match="the sources have changed since the call that began"):
        prepare(config, tmp_path / "out", progress=False)


def test_a_full_disk_ends_with_a_clear_message(arguments, expected, tmp_path):
    """A limit on the size of files stands for the disk: both come from the system as errors of write()."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(arguments, tmp_path, preexec_fn=limit)
    _, error = process.communicate()
    assert process.returncode != 0
    assert b"DataError: no room to write" in error
    assert b"free some, then run the same command" in error
    prepare(PrepareConfig(**arguments), tmp_path, progress=False)
    assert contents(tmp_path) == expected


def test_two_at_once_are_refused(arguments, tmp_path):
    process = start(arguments, tmp_path)
    while not (tmp_path / PROGRESS_DIR / "lock").exists():
        time.sleep(0.005)
    time.sleep(0.05)
    try:
        with pytest.raises(DataError, match="another process is preparing"):
            prepare(PrepareConfig(**arguments), tmp_path, progress=False)
    finally:
        kill(process)
