"""The verb `quantize`: from a checkpoint to quantised weights that other verbs take, and packed ones."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from cpm_jax.checkpoints.manager import CheckpointConfig, Checkpointer
from cpm_jax.checkpoints.weights import load_weights
from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, config_to_dict
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.load import load_model
from cpm_jax.modeling.config import ModelConfig, RopeConfig
from cpm_jax.modeling.decoder import init_params
from experiments import run
from experiments.quantize import QuantizeConfig, check_packing
from export.gptq import pack_linear
from tests.checkpoints.published_folders import CONFIGS, write

TEXTS = [f"Number {i}: after {i} comes {i + 1}, and before it {i - 1}." for i in range(300)]
SIZES = {"vocab_size": 320, "num_layers": 2, "d_model": 64, "num_heads": 2, "num_kv_heads": 1, "d_ff": 128}
YARN = RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=64)
CONFIG = ModelConfig(**SIZES, tie_word_embeddings=True, initializer_range=0.2, dtype="float32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tokenizer = Tokenizer.train(TEXTS, 300)
    tokenizer.save(folder / "tokenizer")
    meta = {"model": config_to_dict(CONFIG), "fixed": {"tokenizer_sha256": tokenizer.sha256}, "step": 0}
    with Checkpointer(folder / "checkpoints", CheckpointConfig(every=1, asynchronous=False)) as checkpointer:
        checkpointer.save(0, {"params": init_params(CONFIG, jax.random.key(0))}, meta)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def quantize(source: Path, workdir: Path, **macros: object) -> int:
    settings = {"SOURCE": source, "DATA": source / "texts.jsonl", "SEQUENCES": 8, "SEQ_LEN": 24, "GROUP_SIZE": 32}
    flags = [f"--gin.{name}={value}" for name, value in (settings | macros).items()]
    return run.main(["quantize", "--gin_file=runs/quantize.gin", f"--workdir={workdir}", *flags])


def test_the_checkpoint_is_a_model_and_the_folder_its_codes(source, tmp_path, capsys):
    assert quantize(source, tmp_path, PACK="gptq", ROTATION=True, SKIP_INITIAL_TOKENS=4) == exit_codes.OK
    said = capsys.readouterr().out
    assert "GPTQ, 4 bits, symmetric, groups of 32; calibrated without the first 4 tokens" in said
    assert "mlp/down_proj: at most" in said
    made = load_model(tmp_path)
    assert not made.config.tie_word_embeddings
    kernel = np.asarray(made.params["layers"]["mlp"]["up_proj"]["kernel"][1])
    tensors = safetensors.numpy.load_file(tmp_path / "gptq/model.safetensors")
    scales = tensors["model.layers.1.mlp.up_proj.scales"].astype(np.float32)
    codes = np.round(kernel / np.repeat(scales, 32, axis=0)).astype(np.int8)
    np.testing.assert_array_equal(codes * np.repeat(scales, 32, axis=0), kernel)
    expected = pack_linear(codes, scales, 4)["qweight"]
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.up_proj.qweight"], expected)
    summary = json.loads((tmp_path / "quantization.json").read_text())
    assert summary["quantization"]["skip_initial_tokens"] == 4
    assert len(summary["errors"]["self_attn/q_proj"]) == 2
    assert "check read_back: values" in said
    assert "check torch_runtime: max error" in said
    manifest = json.loads((tmp_path / "gptq/manifest.json").read_text())
    figures = {check["name"]: check["figures"] for check in manifest["checks"]}
    assert figures["source"]["kl_divergence"] > 0  # against the model before it was quantised
    assert run.main(["export", f"--workdir={tmp_path}", f"--gin.VERIFY={tmp_path / 'gptq'}"]) == exit_codes.OK
    assert "torch_runtime: max error" in capsys.readouterr().out
    # The same command again replaces what it made.
    assert quantize(source, tmp_path, PACK="gptq", METHOD="rtn", ROTATION=True) == exit_codes.OK
    # But not what it is made of.
    for part in (tmp_path, tmp_path / "checkpoints/0"):
        assert quantize(part, tmp_path, DATA=source / "texts.jsonl") == exit_codes.BAD_CONFIG
        assert "what is written would replace it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("macros", "code", "message"),
    [
        ({"GROUP_SIZE": 128}, exit_codes.BAD_CONFIG, "does not divide the 64 inputs of self_attn/q_proj; choose 64"),
        ({"SEQUENCES": 100_000}, exit_codes.BAD_INPUT, "and 100000 are wanted"),
        ({"PACK": "marlin"}, exit_codes.BAD_CONFIG, "QuantizationConfig.group_size = 32: CPM.cu loads Marlin"),
        ({"SOURCE": "nowhere"}, exit_codes.BAD_INPUT, "'nowhere' cannot be read"),
    ],
)
def test_what_is_refused(macros, code, message, source, tmp_path, capsys):
    assert quantize(source, tmp_path / "new", **macros) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new/checkpoints").exists()


def test_what_cannot_be_packed_is_said_before_it_is_quantised(source):
    """Multipliers and YaRN: Marlin folders have either, but not both."""
    model = dataclasses.replace(CONFIG, d_model=128, scale_emb=12.0, rope=YARN)
    config = QuantizeConfig(source=str(source), data="stdlib", pack="marlin")
    with pytest.raises(ConfigError, match="the layout 'minicpm'"):
        check_packing(config, dataclasses.replace(load_weights(source), model=model))


def test_the_export_holds_every_value_of_weights_that_came_in_16_bits(source, tmp_path):
    write(tmp_path / "published", CONFIGS["qwen2"], "bfloat16")
    Tokenizer.load(source / "tokenizer").save(tmp_path / "published")
    flags = {"SOURCE": tmp_path / "published", "METHOD": "rtn"}
    assert quantize(source, tmp_path / "int4", **flags) == exit_codes.OK
    arguments = [f"--workdir={tmp_path / 'out'}", f"--gin.SOURCE={tmp_path / 'int4'}", "--gin.CHECK=False"]
    assert run.main(["export", *arguments]) == exit_codes.OK
    kept, exported = (load_model(tmp_path / place).params for place in ("int4", "out/hf"))
    jax.tree.map(np.testing.assert_array_equal, kept, exported)


def test_files_of_others_in_the_packed_folder_are_said_at_once(source, tmp_path, capsys):
    (tmp_path / "gptq").mkdir()
    (tmp_path / "gptq/config.json").write_text("{}")
    assert quantize(source, tmp_path, PACK="gptq") == exit_codes.BAD_CONFIG
    assert "holds files that are no export of ours (config.json)" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
