"""The configuration that an export reads back with: that of the source, or refused by the names of the fields."""

import dataclasses
import json

import pytest

from cpm_jax.checkpoints.gguf import GgufSource
from cpm_jax.checkpoints.hf_config import LAYOUTS, read_config, write_config
from cpm_jax.checkpoints.weights import Weights
from cpm_jax.modeling.config import ModelConfig, RopeConfig
from export.checks import check_export
from export.config_check import check_config
from export.folders import ExportError
from export.gguf import export_gguf
from export.hf import export_hf
from tests.export.small_models import (
    DYNAMIC,
    LLAMA3,
    LONGROPE,
    MUP,
    PLAIN,
    SPARSE,
    YARN,
    random_params,
    small_tokenizer,
)

LINEAR = RopeConfig(scaling="linear", factor=2.5)
FULL = dataclasses.replace(PLAIN, **MUP, rope=LONGROPE, sparse_config=SPARSE)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        (name, kind)
        for name in ("llama", "granite", "minicpm", "internlm2", "mimo")
        for kind in LAYOUTS[name].rope_types
    ],
)
def test_what_a_layout_holds_reads_back_alike(layout, kind, tmp_path):
    rope = next(rope for rope in (RopeConfig(), LINEAR, DYNAMIC, YARN, LLAMA3, LONGROPE) if rope.rope_type == kind)
    changes = MUP if LAYOUTS[layout].multipliers else {}
    config = dataclasses.replace(PLAIN, **changes, rope=rope, sparse_config=SPARSE, attention_bias=layout == "mimo")
    check_config(tmp_path, read_config(write_config(config, LAYOUTS[layout])), config, sparse=True)


@pytest.mark.parametrize("changes", [{"rope": LINEAR}, {"rope": YARN}, {"rope": LLAMA3}, MUP | {"rope": LONGROPE}])
def test_what_gguf_holds_reads_back_alike(changes, tmp_path):
    """Llama 3's rule too, which it holds as a list of factors; sparse attention it has no place for."""
    config = dataclasses.replace(PLAIN, **changes, sparse_config=SPARSE, num_nextn_predict_layers=1, fp8=True)
    result = export_gguf(random_params(config), config, small_tokenizer(), tmp_path / "out", kind="F32")
    check_config(tmp_path, read_config(GgufSource(tmp_path / "out" / result.file).config), config, sparse=False)
    other = dataclasses.replace(config, rope=dataclasses.replace(config.rope, rope_theta=9e3))
    with pytest.raises(ExportError, match=r"RopeConfig\.rope_theta = \S+ where the source has 9000\.0"):
        check_config(tmp_path, read_config(GgufSource(tmp_path / "out" / result.file).config), other, sparse=False)


def changed(config: ModelConfig, **changes: object) -> ModelConfig:
    """A configuration with changed fields, or fields of its parts: rope__factor."""
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        value = dataclasses.replace(getattr(config, part), **{field: value}) if part else value
        config = dataclasses.replace(config, **{part or field: value})
    return config


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (FULL, {"sparse_config__topk": 5}, r"SparseConfig\.topk = 5 where the source has 3$"),
        (FULL, {"sparse_config__dense_len": -1}, r"SparseConfig\.dense_len = -1 where the source has 64$"),
        (FULL, {"sparse_config": None}, r"SparseConfig\.kernel_size = None where the source has 8, .*other fields$"),
        (
            FULL,
            {"rope__long_factor": (*LONGROPE.long_factor[:-1], 99.0)},
            r"RopeConfig\.long_factor\[7\] = 99.0 where the source has 11.5$",
        ),
        (
            FULL,
            {"rope__original_max_position_embeddings": 65, "rope__attention_factor": 1.1547005},
            r"RopeConfig\.original_max_position_embeddings = 65 where the source has 64$",
        ),
        (
            PLAIN,
            {"max_position_embeddings": 512},
            r"ModelConfig\.max_position_embeddings = 512 where the source has 256$",
        ),
        (PLAIN, {"rms_norm_eps": 1e-5}, r"ModelConfig\.rms_norm_eps = 1e-05 where the source has 1e-06$"),
        (dataclasses.replace(PLAIN, rope=YARN), {"rope__beta_slow": 2.0}, r"RopeConfig\.beta_slow = 2.0 where .* 1.0$"),
        (dataclasses.replace(PLAIN, rope=DYNAMIC), {"rope__factor": 3.0}, r"RopeConfig\.factor = 3.0 where .* 2.0$"),
    ],
)
def test_a_field_that_differs_is_named(config, changes, words, tmp_path):
    with pytest.raises(ExportError, match=words):
        check_config(tmp_path, changed(config, **changes), config, sparse=True)


@pytest.mark.parametrize("field", ["topk", "long_factor"])
def test_a_folder_whose_config_was_changed_is_refused(field, tmp_path):
    """Its weights are as they should be, and so is what it says of short texts."""
    params = random_params(FULL)
    export_hf(params, FULL, small_tokenizer(), tmp_path / "out", layout="minicpm")
    content = json.loads((tmp_path / "out/config.json").read_text())
    if field == "topk":
        content["sparse_config"]["topk"] += 1
    else:
        content["rope_scaling"]["long_factor"][2] *= 2
    (tmp_path / "out/config.json").write_text(json.dumps(content))
    weights = Weights(FULL, params, small_tokenizer(), {}, {}, {})
    with pytest.raises(ExportError, match=rf"{field}.* where the source has"):
        check_export(tmp_path / "out", weights, lambda: 0)
