"""Every format with every kind of model: it is written and read back, or refused with what to do instead.

What runtimes compute of each is compared in the tests of the formats; here only of the plain model.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from cpm_jax.checkpoints.sources import SourceError
from cpm_jax.checkpoints.weights import Weights
from cpm_jax.common.config import ConfigError, InputError
from experiments import export
from experiments.export import ExportConfig
from export import checks
from export.manifest import Check, check_files, read_manifest
from tests.checkpoints.published_folders import CONFIGS, write
from tests.export.formats import FORMATS
from tests.export.quantized_models import CONFIG
from tests.export.small_models import DYNAMIC, LONGROPE, MUP, SPARSE, random_params, small_tokenizer

KINDS = {
    "plain": {},
    "tied head": {"tie_word_embeddings": True},
    "biases and MTP": {"attention_bias": True, "num_nextn_predict_layers": 1},
    "multipliers": MUP,
    "LongRoPE": {"head_dim": 16, "num_heads": 8, "num_kv_heads": 4, "rope": LONGROPE},
    "dynamic NTK": {"rope": DYNAMIC},
    "sparse": {"sparse_config": SPARSE},
    "MTP": {"num_nextn_predict_layers": 1},
    "wide heads": {"head_dim": 128},
    "group that does not divide": {"d_ff": 192},
    "odd width": {"d_ff": 260},
}
NO_BIASES = r"attention_bias = False: the layout '\w+' always has biases on q, k and v; choose one of llama, granite"
NO_MULTIPLIERS = r"scale_emb = 12.0: the layout '\w+' has no such multiplier; granite, minicpm have"
NO_WIDE_HEADS = r"head_dim = 128: the layout '\w+' takes d_model / num_heads; llama, qwen2, granite, mimo take any"
NO_LONGROPE = r"RopeConfig.scaling = longrope: the layout 'internlm2' knows .*; llama, .*minicpm, mimo have it"
REFUSED = {
    **{(name, kind): NO_BIASES for name in ("qwen2", "mimo") for kind in KINDS if kind != "biases and MTP"},
    **{(name, "multipliers"): NO_MULTIPLIERS for name in ("llama", "qwen2", "internlm2", "mimo")},
    **{(name, "wide heads"): NO_WIDE_HEADS for name in ("minicpm", "internlm2")},
    ("internlm2", "LongRoPE"): NO_LONGROPE,
    **{
        (f"gguf {kind}", "dynamic NTK"): r"no dynamic NTK; the Hugging Face layouts llama, .* have"
        for kind in ("F16", "Q4_0")
    },
    (
        "gptq",
        "odd width",
    ): r"260 outputs: the GPTQ format packs .*; export the fake-quantised weights as a Hugging Face",
    ("marlin", "odd width"): r"gate_up_proj has 520 outputs: Marlin takes multiples of 64; write the GPTQ format",
    **{
        (name, "group that does not divide"): r"group_size = 128.* 192 inputs of .*choose 64"
        for name in ("gptq", "marlin")
    },
    ("marlin", "biases and MTP"): r"attention_bias = True: CPM.cu's fused 4-bit layers have no biases; write the GPTQ",
}
# What a format leaves out it says, and which one does not.
SAID = {
    "sparse": r"sparse attention .* is left out.*minicpm",
    "MTP": r"MTP layers .*left out",
    "biases and MTP": r"MTP",
}
HOLDS = {"sparse": ("minicpm", "internlm2", "marlin"), "biases and MTP": ("mimo",), "MTP": ()}


def read_back_only(path: Path, weights: Weights, read_back: Callable[[], int]) -> checks.Checked:
    return checks.Checked((Check("read_back", {"values": read_back()}),))


# Lowering takes seconds, and what it is of is the same decoder.
SLOW = {"stablehlo": ("plain", "sparse", "MTP")}
CELLS = [(name, kind) for name in FORMATS for kind in SLOW.get(name, KINDS)]


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_it_is_written_and_read_back_or_refused(name, kind, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(CONFIG, num_layers=1, scan_layers=False, **KINDS[kind])
    origin = {"name": "tiny/7", "kind": "checkpoint", "config_sha256": "ab"}
    weights = Weights(config, random_params(config), small_tokenizer(), {}, {}, origin)
    if kind != "plain":
        for place in ("experiments.export", "export.checks"):
            monkeypatch.setattr(f"{place}.check_export", read_back_only)
    if advice := REFUSED.get((name, kind)):
        with pytest.raises((ConfigError, InputError), match=advice):
            FORMATS[name](weights, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    folder = FORMATS[name](weights, tmp_path)
    said = capsys.readouterr().err
    assert bool(re.search(SAID.get(kind, "^(?!)"), said)) == (kind in SAID and name not in HOLDS[kind])
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert manifest.checks[0].figures["values"] == manifest.parameters
    assert manifest.source == origin
    if kind == "plain":
        assert "texts: tokens and greedy text as recorded" in " ".join(checks.verify_export(folder))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("format", ["hf", "minicpm", "gguf", "stablehlo"])
def test_a_missing_tokenizer(format, tmp_path):
    write(tmp_path / "source", CONFIGS["llama"], shards=1)
    with pytest.raises(SourceError, match=r"has no tokenizer.json: give one with TOKENIZER"):
        export.run(ExportConfig(source=str(tmp_path / "source"), format=format), tmp_path / "out")
    assert not (tmp_path / "out").exists()
