"""The grid of compiled cells: that it is whole, resumes, and tells what does not compile."""

import json
import subprocess

import jax
import pytest

from benchmarks import sparse_compile

MEMORY = {"argument": 2**20, "output": 2**20, "alias": 2**20, "temp": 2**21, "generated_code": 0}


@pytest.mark.parametrize("op", sparse_compile.OPS)
def test_every_cell_has_a_program_of_its_length(op):
    for shape in sparse_compile.SHAPES:
        function, args = sparse_compile.program(op, shape)
        outputs = jax.tree.leaves(jax.eval_shape(function, *args))
        assert outputs[0].shape[0] == 1
        lengths = {size for x in (*args, *outputs) for size in x.shape}
        assert int(shape.removesuffix("k").rpartition("_")[2]) * 1024 in lengths
        assert len(outputs) == (4 if op == "attention, backward" else 1)


def test_cells_that_are_done_are_not_compiled_again(tmp_path, monkeypatch):
    asked = []

    def compile_apart(path, chip, shape, op, timeout):
        asked.append((chip, shape, op))
        if op == "selection":
            return  # it was cut off
        cell = {"seconds": 3.0, "cpu_seconds": 4.0, "memory": MEMORY, "missing": []}
        if op == "decoding":
            cell["missing"] = ["sparse_decode_attention"]
        path.write_text(json.dumps({"refusal": "too large"} if op == "attention, backward" else cell))

    monkeypatch.setattr(sparse_compile, "compile_apart", compile_apart)
    flags = ["--work", str(tmp_path / "work"), "--directory", str(tmp_path), "--chips", "v5e"]
    flags += ["--shapes", "minicpm4_8b_4k"]
    sparse_compile.main(flags)
    assert [op for _, _, op in asked] == list(sparse_compile.OPS)
    rows = json.loads((tmp_path / "sparse_compile.json").read_text())["rows"]
    by_metric = {row["metric"].removeprefix("v5e, minicpm4_8b_4k, "): row for row in rows}
    assert by_metric["attention: memory"]["ours"] == 3
    assert by_metric["attention: memory"]["met"]
    assert by_metric["attention: temporary memory"]["ours"] == 2
    assert by_metric["attention: compiling"]["ours"] == 3
    for op in ("attention, backward", "decoding"):
        assert by_metric[f"{op}: compiles with its kernels"]["met"] is False
    assert len(rows) == 5
    asked.clear()
    sparse_compile.main(flags)
    assert [op for _, _, op in asked] == ["selection"]


@pytest.mark.parametrize("crash", [True, False])
def test_a_compiler_that_dies_or_hangs_is_a_refusal(crash, tmp_path, monkeypatch):
    def run(command, **kwargs):
        if crash:
            return subprocess.CompletedProcess(command, -11, "", "a fault")
        raise subprocess.TimeoutExpired(command, kwargs["timeout"])

    monkeypatch.setattr(sparse_compile.subprocess, "run", run)
    monkeypatch.setattr(sparse_compile, "libtpu_path", lambda: "libtpu.so")
    flags = ["--work", str(tmp_path / "work"), "--directory", str(tmp_path), "--chips", "v5e"]
    sparse_compile.main([*flags, "--shapes", "minicpm4_8b_4k", "--ops", "decoding"])
    (row,) = json.loads((tmp_path / "sparse_compile.json").read_text())["rows"]
    assert (row["metric"], row["met"]) == ("v5e, minicpm4_8b_4k, decoding: compiles with its kernels", False)
    (cell,) = (json.loads(path.read_text()) for path in (tmp_path / "work").iterdir())
    assert ("-11" if crash else "1800 seconds") in cell["refusal"]
