"""The benchmark of the PyTorch runtime in miniature, on a CPU."""

import dataclasses
import json

import jax
import pytest
import torch

from benchmarks import torch_runtime_speed
from benchmarks.results import load
from benchmarks.torch_runtime_speed import Arm, Measured, dense_copy, main, measure, random_folder
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import init_params
from export.hf import export_hf
from export.torch_runtime.model import load_model
from tests.export.small_models import SPARSE, small_tokenizer

MODEL = ModelConfig(
    vocab_size=1024,
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    d_ff=128,
    max_position_embeddings=256,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=32,
    dtype="float32",
    sparse_config=SPARSE,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("speed") / "hf"
    export_hf(init_params(MODEL, jax.random.key(0)), MODEL, small_tokenizer(), place)
    return place


def test_dense_and_sparse_beside_transformers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch_runtime_speed, "measure_alone", measure)  # a process for each takes half a minute
    main(["--folder", str(folder), "--lengths", "40", "--new_tokens", "5", "--device", "cpu"], tmp_path)
    (result,) = load(tmp_path)
    assert [row.metric.split(",")[1].strip() for row in result["rows"]] == ["dense"] * 3 + ["sparse"] * 3
    for row in result["rows"]:
        assert row.ours > 0
        assert row.baseline > 0
        assert row.baseline_name.startswith("transformers ")
        assert "40 + 5 tokens on CPU" in row.metric


def test_the_arms_differ_in_attention_alone(folder, tmp_path):
    dense = load_model(dense_copy(folder, tmp_path / "dense"))
    sparse = load_model(folder)
    assert dataclasses.replace(sparse.config, sparse=None) == dense.config
    assert sparse.config.sparse is not None
    torch.testing.assert_close(dense.embedding, sparse.embedding)


def test_random_weights_of_a_size_load_in_both(tmp_path):
    place = random_folder(MODEL, tmp_path / "random", "cpu")
    assert load_model(place).dtype == torch.bfloat16
    assert json.loads((place / "config.json").read_text())["sparse_config"]
    measured = measure(Arm(place, 20, 3, "cpu", "float32", None))
    assert isinstance(measured, Measured)
    assert min(measured) > 0


def test_what_does_not_fit_is_said(folder, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="--lengths 300: at most 192"):
        main(["--folder", str(folder), "--lengths", "40", "300", "--device", "cpu"], tmp_path)

    def too_large(arm):
        return "out of memory" if arm.kernels is None else Measured(10.0, 5.0, 1.0)

    monkeypatch.setattr(torch_runtime_speed, "measure_alone", too_large)
    main(["--folder", str(folder), "--lengths", "40", "--device", "cpu"], tmp_path)
    (result,) = load(tmp_path)
    assert all("sdpa: out of memory)" in row.metric and row.baseline is None for row in result["rows"])
