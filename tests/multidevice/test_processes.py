"""Two processes of two devices train as one process of one device does, from the same dataset folder."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpm_jax.data.prepare import PrepareConfig, prepare

pytestmark = pytest.mark.multidevice
SCRIPT = Path(__file__).parent / "train_process.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    text = [f"{i} times {j} is {i * j}.\n" for i in range(30) for j in range(30)]
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": "".join(text[i::90]) * 3}) + "\n" for i in range(90))
    )
    prepare(
        PrepareConfig(
            sources=str(folder / "text.jsonl"), seq_len=32, vocab_size=300, validation_fraction=0.0, num_workers=0
        ),
        folder / "dataset",
        progress=False,
    )
    return folder / "dataset"


def start(dataset, mesh, devices, *options):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), f"--data={dataset}", f"--mesh={json.dumps(mesh)}", *options],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def result(process):
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(dataset):
    return result(start(dataset, [1, 1, 1, 1], 1))["losses"]


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ([1, 4, 1, 1], [[0, 2], [1, 2]]),  # each process reads its half of the rows
        ([1, 1, 4, 1], [[0, 1], [0, 1]]),  # a row lies on both: both read all
    ],
    ids=["fsdp", "tensor"],
)
def test_two_processes_train_as_one(dataset, alone, mesh, parts):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = [f"--port={port}", "--processes=2"]
    results = [result(p) for p in [start(dataset, mesh, 2, f"--process={i}", *options) for i in range(2)]]
    assert [r["part"] for r in results] == parts
    for r in results:
        np.testing.assert_allclose(r["losses"], alone, rtol=1e-5)
