"""What `<verb> --help` says is what the verb needs."""

import subprocess
import sys

import pytest

from cpm_jax.common import exit_codes
from cpm_jax.common.gin_files import LAYERS, list_gin_files
from experiments import run
from experiments.verb_help import verb_help


@pytest.mark.parametrize("verb", run.VERBS)
def test_every_verb_has_help_without_starting_jax(verb):
    program = (
        f"import sys; from experiments import run; code = run.main(['{verb}', '--help']);"
        "heavy = {'jax', 'flax', 'orbax', 'grain'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == exit_codes.OK, done.stderr
    assert f"runs/{verb}.gin" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 125


def test_pretrain_names_its_layers_and_what_they_ask_for():
    said = verb_help("pretrain", "summary")
    for layer in LAYERS:
        for path in list_gin_files(layer):
            assert f"  {layer}/{path.name} " in said
    assert "BATCH_SIZE            REQUIRED" in said
    assert "asks for PEAK_LR: learning rate" in said
    assert "asks for DATA: dataset folder" in said
    assert "asks for D_MODEL" not in said  # a size sets it
    assert "papers/mimo/stage2.gin" in said
    assert "papers/mimo/sft.gin" not in said


def test_required_macros_come_first():
    lines = verb_help("sft", "summary").splitlines()
    rows = [line for line in lines if line.startswith("  ") and line.split()[0].isupper()]
    required = ["REQUIRED" in row for row in rows]
    assert any(required)
    assert required == sorted(required, reverse=True)


def test_a_reader_may_leave_early():
    command = [sys.executable, "-m", "experiments.run", "pretrain", "--help"]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    job.stdout.close()
    _, errors = job.communicate(timeout=60)
    assert errors == b""
    assert job.returncode == exit_codes.OK
