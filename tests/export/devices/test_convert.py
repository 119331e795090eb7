"""What a device's runtime is given: a model that its converter knows, and rotary tables that are right."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig, RopeConfig, SparseConfig
from export.devices import convert
from export.devices.convert import device_model, export_device, write_rotary_tables
from export.devices.runtimes import RUNTIMES, Job
from export.folders import ExportError
from tests.export.devices.needs import skip_without
from tests.export.small_models import random_params

LONGROPE = RopeConfig(
    short_factor=tuple(1.0 + 0.1 * i for i in range(8)),
    long_factor=tuple(1.0 + 1.5 * i for i in range(8)),
    original_max_position_embeddings=64,
)
PLAIN = ModelConfig(
    vocab_size=320, num_layers=2, d_model=64, num_heads=4, num_kv_heads=2, d_ff=96, max_position_embeddings=256
)


def test_one_set_of_frequencies():
    config = dataclasses.replace(
        PLAIN,
        rope=LONGROPE,
        num_nextn_predict_layers=1,
        sparse_config=SparseConfig(topk=4, dense_len=100),
        fp8=True,
    )
    device = device_model(config)
    assert (device.max_position_embeddings, device.num_nextn_predict_layers, device.fp8) == (64, 0, False)
    assert device.sparse_config is None
    # That of 256 tokens, which transformers would take for 1 as the context is the original one now.
    assert device.rope.attention_factor == pytest.approx((1 + np.log(4) / np.log(64)) ** 0.5)
    dynamic = RopeConfig(scaling="dynamic", factor=4.0, original_max_position_embeddings=64)
    device = device_model(dataclasses.replace(PLAIN, rope=dynamic))
    assert (device.max_position_embeddings, device.rope.rope_type) == (64, "default")
    yarn = RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=64)
    assert device_model(dataclasses.replace(PLAIN, rope=yarn)).max_position_embeddings == 256
    assert device_model(PLAIN) == PLAIN


@pytest.mark.parametrize("external", [False, True])
def test_rotary_tables(external: bool, tmp_path: Path):
    """Those of YaRN, against its definition, in a file with or without external data; other values stay."""
    skip_without("onnx")
    import onnx

    names = {"before": (3, 5), "cos_cache": (256, 8), "sin_cache": (256, 8), "after": (7,)}
    tensors = [onnx.numpy_helper.from_array(np.full(shape, 2, np.float32), name) for name, shape in names.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph([], "tables", [], [], initializer=tensors))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=external, location="model.onnx.data", size_threshold=0)
    assert (tmp_path / "model.onnx.data").exists() == external
    rope = RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=64, truncate=False)
    config = dataclasses.replace(PLAIN, rope=rope)
    write_rotary_tables(path, config)
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    # arXiv 2309.00071, with its ramp in the index of the pair.
    plain = 10000.0 ** (-np.arange(8) / 8)
    low, high = (8 * np.log(64 / (turns * 2 * np.pi)) / np.log(10000) for turns in (32, 1))
    ramp = np.clip((np.arange(8) - max(low, 0)) / (high - max(low, 0)), 0, 1)
    angles = np.arange(256)[:, None] * (plain / 4 * ramp + plain * (1 - ramp))
    for name, values in (("cos_cache", np.cos(angles)), ("sin_cache", np.sin(angles))):
        np.testing.assert_allclose(found[name], values * (0.1 * np.log(4) + 1), atol=2e-6)
    for name in ("before", "after"):
        assert (found[name] == 2).all()
    with pytest.raises(ExportError, match=r"cos_cache, float32 \[128, 8\]: it has \[256, 8\]"):
        write_rotary_tables(path, dataclasses.replace(config, max_position_embeddings=128))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["import os\nfor x in range(10): print(x)\n"] * 3, 300)


def test_refused(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="dtype = 'float16': ONNX Runtime takes float32, int8, int4"):
        export_device({}, PLAIN, tokenizer, tmp_path / "out", runtime="onnx", dtype="float16")
    absent = dataclasses.replace(RUNTIMES["openvino"], modules=("no_such_module",))
    monkeypatch.setitem(convert.RUNTIMES, "openvino", absent)
    with pytest.raises(ExportError, match=r"no_such_module not installed \(make openvino\)"):
        export_device({}, PLAIN, tokenizer, tmp_path / "out", runtime="openvino")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_rows_that_groups_do_not_divide(tokenizer: Tokenizer, tmp_path: Path):
    skip_without("executorch")
    config = dataclasses.replace(PLAIN, d_ff=80)
    with pytest.raises(ExportError, match="groups of 32 do not divide a layer's 80 inputs; choose int8"):
        export_device(random_params(config), config, tokenizer, tmp_path / "out", runtime="executorch", dtype="int4")
    assert not list(tmp_path.iterdir())


def test_the_context_ends_where_a_program_does():
    long = dataclasses.replace(PLAIN, max_position_embeddings=5000)
    assert device_model(long, RUNTIMES["executorch"].longest).max_position_embeddings == 2048
    (said,) = convert._notes(long, RUNTIMES["executorch"])
    assert said.startswith("the context ends at 2,048 of 5,000 tokens: so long is the cache of ExecuTorch's program")
    assert convert._notes(long, RUNTIMES["onnx"]) == convert._notes(PLAIN, RUNTIMES["executorch"]) == ()


def test_what_fails_in_a_process_of_its_own_is_said(tmp_path: Path):
    skip_without("onnx")
    with pytest.raises(ExportError, match=r"(?s)ONNX Runtime: .*onnx_worker\.py failed with exit code 1: .*nowhere"):
        RUNTIMES["onnx"].ask(Job(folder=str(tmp_path / "nowhere"), rows=[[1]]))
