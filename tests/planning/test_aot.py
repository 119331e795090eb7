"""The compiler's process: what is kept, and how its failures are told. The compiler itself is in tests/aot/."""

import gzip
import json
import subprocess
import sys

import pytest

from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.common.files import write_json
from cpm_jax.common.sharding import MeshConfig
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.planning import aot
from cpm_jax.planning.chips import parse_topology
from cpm_jax.planning.compile_process import used_bytes
from cpm_jax.planning.workload import Candidate, Workload

MODEL = ModelConfig(vocab_size=512, num_layers=2, d_model=128, num_heads=4, num_kv_heads=2, d_ff=256)
WORKLOAD, CANDIDATE = Workload("train", MODEL, 256), Candidate(MeshConfig(data=1, fsdp=4), 8)
TOPOLOGY = parse_topology("v5e:2x2")
MEMORY = dict.fromkeys(("argument", "output", "alias", "temp", "generated_code"), 1)


@pytest.fixture(autouse=True)
def libtpu_is_there(monkeypatch):
    monkeypatch.setattr(aot, "libtpu_path", lambda: "")


def fake_run(calls, result, program=""):
    def run(request, path, program_path, libtpu, timeout):
        calls.append(json.loads(request.read_text()))
        program_path.write_bytes(gzip.compress(program.encode()))
        write_json(path, result)

    return run


def compile_it(tmp_path, candidate=CANDIDATE, topology=TOPOLOGY):
    return aot.compile_candidate(WORKLOAD, candidate, topology, tmp_path, timeout=5.0)


def test_results_are_kept(tmp_path, monkeypatch):
    calls = []
    result = {"status": "compiled", "seconds": 3.0, "cpu_seconds": 3.0, "memory": MEMORY}
    monkeypatch.setattr(aot, "_run", fake_run(calls, result, "HloModule m"))
    first, second = compile_it(tmp_path), compile_it(tmp_path)
    assert (first.program, first.memory, first.cached, second.cached) == ("HloModule m", MEMORY, False, True)
    assert len(calls) == 1
    compile_it(tmp_path, Candidate(MeshConfig(data=2, fsdp=2), 8))
    compile_it(tmp_path, topology=parse_topology("v5p:2x2x1"))
    assert len(calls) == 3
    monkeypatch.setattr(aot, "_source_digest", lambda: "other code")
    compile_it(tmp_path)
    assert len(calls) == 4


def test_a_program_that_is_too_large_is_a_result(tmp_path, monkeypatch):
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm."
    result = {
        "status": "too_large",
        "message": said,
        "used_bytes": used_bytes(said),
        "seconds": 2.0,
        "cpu_seconds": 2.0,
    }
    monkeypatch.setattr(aot, "_run", fake_run([], result))
    found = compile_it(tmp_path)
    assert (found.refusal, found.used_bytes, found.program) == (said, round(20.5 * 2**30), "")


def test_used_bytes_of_messages():
    said = "Ran out of memory on HBM, the total memory required for HLO temporaries (74.04G) exceeds available HBM."
    assert used_bytes(said) == round(74.04 * 2**30)
    assert used_bytes("RESOURCE_EXHAUSTED: no figure") is None


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (
            {"status": "unknown_topology", "message": "no such slice"},
            "libtpu does not know it .no such slice.*v5e:16x16",
        ),
        ({"status": "bad_config", "message": "does not divide", "field": "MeshConfig"}, "does not divide"),
    ],
)
def test_errors_are_not_kept(tmp_path, monkeypatch, result, said):
    calls = []
    monkeypatch.setattr(aot, "_run", fake_run(calls, result))
    for _ in range(2):
        with pytest.raises(ConfigError, match=said):
            compile_it(tmp_path)
    assert len(calls) == 2


def child(monkeypatch, program):
    real = subprocess.run
    monkeypatch.setattr(
        aot.subprocess, "run", lambda command, **kwargs: real([sys.executable, "-c", program], **kwargs)
    )


def test_a_compiler_that_crashes_shows_what_it_said(tmp_path, monkeypatch):
    child(monkeypatch, "import sys; sys.exit('internal error 42')")
    with pytest.raises(aot.CompileError, match=r"exit code 1:\ninternal error 42"):
        compile_it(tmp_path)


def test_a_compiler_that_hangs_is_stopped(tmp_path, monkeypatch):
    child(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(aot.CompileError, match=r"within PlanConfig\.compile_timeout = 1 seconds"):
        aot.compile_candidate(WORKLOAD, CANDIDATE, TOPOLOGY, tmp_path, timeout=1.0)


def test_a_killed_compiler_leaves_nothing(tmp_path, monkeypatch):
    child(monkeypatch, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(aot.CompileError, match="exit code -9"):
        compile_it(tmp_path)
    assert [path.name.split(".", 1)[1] for path in tmp_path.iterdir()] == ["request.json"]


def test_missing_libtpu_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(aot.sys, "prefix", str(tmp_path))
    with pytest.raises(InputError, match=r"make aot.*pip install --no-deps --target .*'libtpu=="):
        aot.libtpu_path()
    (tmp_path / "aot" / "libtpu").mkdir(parents=True)
    assert aot.libtpu_path() == str(tmp_path / "aot")
