"""A checkpoint of ternary training in other runtimes: as rounded weights, and packed; what does not fit is refused."""

import dataclasses
import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from cpm_jax.checkpoints.gguf import GgufSource
from cpm_jax.checkpoints.hf_config import write_config
from cpm_jax.checkpoints.hf_layouts import flatten
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.manager import CheckpointConfig, Checkpointer
from cpm_jax.checkpoints.weights import load_weights
from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, config_to_dict
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.load import load_model
from cpm_jax.modeling.config import PER_CHANNEL, PER_TENSOR, ModelConfig, TernaryConfig
from cpm_jax.modeling.decoder import Params, init_params
from cpm_jax.modeling.ternary import materialize
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.pipeline import quantize_model
from experiments import run
from export.gguf import check_ternary, find_architecture
from export.hf import default_layout
from export.hf_check import logits_of
from export.stablehlo import exported_model

PACKED = ("TQ1_0", "TQ2_0")
TEXT = ["def add(a, b):\n    return a + b\n", "The harbour was still dark when the first boats came in.\n"]


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=300,
        num_layers=1,
        d_model=256,
        num_heads=4,
        num_kv_heads=2,
        d_ff=512,
        max_position_embeddings=128,
        initializer_range=0.1,
        rms_norm_eps=1e-5,
        dtype="float32",
        ternary=TernaryConfig(group_size=256),
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXT * 3, 290)


@pytest.fixture(scope="module")
def workdir(config: ModelConfig, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a ternary training leaves it: the checkpoint holds the weights that are trained, not the rounded ones."""
    folder = tmp_path_factory.mktemp("bitcpm")
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    with Checkpointer(folder / "checkpoints", CheckpointConfig(every=1)) as checkpointer:
        meta = {"model": config_to_dict(config), "fixed": {"tokenizer_sha256": tokenizer.sha256}}
        checkpointer.save(1, {"params": params}, meta)
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def model(workdir: Path) -> tuple[ModelConfig, Params]:
    loaded = load_model(workdir)
    return loaded.config, loaded.params


def export(workdir: Path, folder: Path, **macros: object) -> int:
    flags = [f"--gin.{name}={value}" for name, value in ({"SOURCE": workdir} | macros).items()]
    return run.main(["export", f"--workdir={folder}", *flags])


def test_what_is_loaded_is_an_ordinary_model(config, workdir, model, tokenizer):
    """Its kernels have three values for each group; what trained it is known to the export alone."""
    plain, params = model
    assert plain == dataclasses.replace(config, ternary=None)
    ids = tokenizer.encode(TEXT[0])
    latent = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    np.testing.assert_allclose(logits_of(plain, params, ids), logits_of(config, latent, ids), rtol=1e-5, atol=1e-5)
    weights = load_weights(workdir)
    assert (weights.model, weights.ternary) == (plain, config.ternary)
    assert weights.facts["Weights"] == "ternary, one scale for 256 inputs of each output"
    for path, leaf in flatten(weights.params).items():
        if path[0] == "layers" and path[-1] == "kernel":
            groups = np.asarray(leaf).reshape(-1, 256, leaf.shape[-1])
            magnitudes = np.abs(groups).max(axis=1, keepdims=True)
            assert set(np.unique(groups / magnitudes)) == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_say_what_rounded_weights_do(kind, workdir, model, tokenizer, tmp_path, capsys):
    """Kernels bit for bit, by our reader and by the gguf package; logits as those of the float16 folder, which rounds
    embedding and head alike."""
    plain, params = model
    checked = kind == "TQ2_0"
    assert export(workdir, tmp_path, FORMAT="gguf", TYPE=kind, NAME="tiny", CHECK=checked) == exit_codes.OK
    assert ("check read_back: " in capsys.readouterr().out) == checked
    path = tmp_path / f"gguf-{kind}" / f"tiny-{kind}.gguf"
    read, values = import_params(GgufSource(path))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    down = stored["blk.0.ffn_down.weight"]
    assert down.tensor_type.name == kind
    theirs = gguf.dequantize(down.data, down.tensor_type).T
    np.testing.assert_array_equal(theirs, params["layers"]["mlp"]["down_proj"]["kernel"][0])
    for name, leaf in flatten(values["layers"]).items():
        np.testing.assert_array_equal(leaf, flatten(params["layers"])[name])

    ids = tokenizer.encode(TEXT[1])
    packed, exact = logits_of(read, values, ids), logits_of(plain, params, ids)
    half = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16).astype(np.float32), params)
    np.testing.assert_allclose(packed, logits_of(plain, half, ids), rtol=1e-5, atol=1e-5 * np.abs(exact).max())
    assert np.abs(packed - exact).max() < 2e-3 * np.abs(exact).max()
    if checked:
        assert run.main(["export", f"--workdir={tmp_path / 'v'}", f"--gin.VERIFY={path.parent}"]) == exit_codes.OK


def test_rounded_weights_in_a_hugging_face_folder(workdir, model, tmp_path, capsys):
    """The folder is an ordinary Llama, which transformers runs with the same logits."""
    assert export(workdir, tmp_path, FORMAT="llama") == exit_codes.OK
    assert "check transformers: " in capsys.readouterr().out
    manifest = json.loads((tmp_path / "hf/manifest.json").read_text())
    figures = {check["name"]: check["figures"] for check in manifest["checks"]}
    assert figures["source"]["max_error"] <= 1e-5
    assert "ternary" not in json.loads((tmp_path / "hf/config.json").read_text())
    assert "ternary, one scale for 256 inputs" in (tmp_path / "hf/README.md").read_text()
    read, values = load_model(tmp_path / "hf")[:2]
    assert read.ternary is None
    for ours, theirs in zip(jax.tree.leaves(model[1]), jax.tree.leaves(values), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_packed_files_cannot_hold(config):
    plain = dataclasses.replace(config, ternary=None)
    for group_size in (256, 512, PER_CHANNEL, PER_TENSOR):
        check_ternary(plain, TernaryConfig(group_size), "TQ2_0")
    for group_size in (64, 128, 384):
        with pytest.raises(
            ConfigError, match=rf"group_size = {group_size}: TQ1_0 has one scale for 256 values; accept"
        ):
            check_ternary(plain, TernaryConfig(group_size), "TQ1_0")
        check_ternary(plain, TernaryConfig(group_size), "F16")
    odd = dataclasses.replace(plain, d_ff=384)
    with pytest.raises(
        ConfigError, match=r"blocks of 256 values, and blk.0.ffn_down.weight has rows of 384: choose F16"
    ):
        check_ternary(odd, TernaryConfig(128), "TQ2_0")


def test_weights_that_are_not_rounded_yet_are_refused(config):
    """Whoever calls an exporter with the model of a training is told, where it would write other weights."""
    refused = [
        lambda: find_architecture(config),
        lambda: write_config(config, default_layout(config)),
        lambda: exported_model(config, "float32"),
        lambda: quantize_model({}, config, QuantizationConfig(method="rtn")),
    ]
    for call in refused:
        with pytest.raises(
            ConfigError, match=r"ModelConfig\.ternary = TernaryConfig\(group_size=256\): .* must be None"
        ):
            call()
    assert materialize(config, {"layers": {}})[0].ternary is None
