"""The same command in two processes is one run: it trains as one process does, and one of them writes."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cpm_jax.common import exit_codes
from cpm_jax.data.prepare import PrepareConfig, prepare
from experiments import run

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = [
    *("pretrain", "--gin_file=arch/minicpm4.gin", "--gin_file=size/2m.gin", "--gin_file=data/folders.gin"),
    *("--gin_file=optim/wsd_mup.gin", "--gin_file=runs/pretrain.gin", "--gin.DATA=set", "--gin.DTYPE=float32"),
    *("--gin.NUM_LAYERS=1", "--gin.D_MODEL=96", "--gin.D_FF=64", "--gin.VOCAB_SIZE=512", "--gin.BATCH_SIZE=4"),
    *("--gin.TRAIN_STEPS=4", "--gin.WARMUP_STEPS=1", "--gin.DECAY_STEPS=1", "--gin.EVAL_EVERY=0", "--gin.LOG_EVERY=1"),
]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    (tmp_path / "text.txt").write_text("some words that come again and again, " * 500)
    settings = {"seq_len": 32, "vocab_size": 280, "validation_fraction": 0.0, "num_workers": 0}
    prepare(PrepareConfig(sources=str(tmp_path / "text.txt"), **settings), tmp_path / "set", progress=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def start(workdir, *flags):
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.run", *PRETRAIN, f"--workdir={workdir}", *flags],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    place = [f"--coordinator_address={address}", "--num_processes=2"]
    jobs = [start("two", *place, f"--process_id={i}") for i in range(2)] + [start("one")]
    for job in jobs:
        said, _ = job.communicate(timeout=400)
        assert job.returncode == exit_codes.OK, said
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(two) == 4
    assert two == pytest.approx(one, rel=1e-5)
    assert len((tmp_path / "two" / "command.txt").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator_address=127.0.0.1:1"], "give --coordinator_address, --num_processes and --process_id"),
        (["--distributed"], "give --coordinator_address, --num_processes and --process_id"),
        (["--coordinator_address=node0", "--num_processes=2", "--process_id=0"], "=node0: must be HOST:PORT"),
        (
            ["--coordinator_address=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2: must be from 0 to below",
        ),
    ],
)
def test_addresses_and_numbers_that_cannot_be_are_explained(tmp_path, capsys, flags, message):
    assert run.main([*PRETRAIN, f"--workdir={tmp_path}", *flags]) == exit_codes.BAD_CONFIG
    assert message in capsys.readouterr().err


def test_the_flags_of_the_documentation_exist():
    text = (ROOT / "docs" / "many_devices.md").read_text()
    commands = re.findall(r"experiments\.run (?:[^\n]*\\\n)*[^\n]*", text)
    flags = {flag for command in commands for flag in re.findall(r"--([a-z_]+)(?==| |\n|$)", command)}
    assert {"distributed", "coordinator_address", "num_processes", "process_id", "workdir", "dry_run"} <= flags
    known = {action.dest for action in run._parser()._actions}
    assert flags <= known, flags - known
