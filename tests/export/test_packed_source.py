"""Packed folders read as the model that they stand for; the unpackers' judges are in the tests of both formats."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import safetensors.numpy
import transformers

from cpm_jax.checkpoints.sources import SourceError
from export.checks import TEXTS, NotMade, compare_runtime, read_export
from export.folders import ExportError
from export.gptq import export_gptq
from export.marlin import export_marlin
from export.packed_source import PackedSource, check_read_back, is_marlin, is_packed, tensor_types
from tests.export.quantized_models import ROUNDED, rounded_model
from tests.export.small_models import LONGROPE, MUP, SPARSE, small_tokenizer


@pytest.mark.parametrize(
    ("write", "settings", "changes"),
    [
        (export_gptq, {"bits": 2, "group_size": 64}, {"attention_bias": True, "tie_word_embeddings": True}),
        (export_gptq, {"bits": 8, "group_size": -1}, MUP | {"num_nextn_predict_layers": 1}),
        (export_marlin, {}, MUP),
        (export_marlin, {}, {"param_dtype": "bfloat16"}),
    ],
)
def test_every_value_is_read_back(write, settings, changes, tmp_path):
    quantized = rounded_model(dataclasses.replace(ROUNDED, **settings), **changes)
    folder = tmp_path / "packed"
    result = write(quantized, small_tokenizer(), folder)
    assert is_packed(folder)
    assert is_marlin(folder) == (write is export_marlin)
    assert check_read_back(folder, quantized) == result.parameters
    assert sum(tensor_types(folder).values()) == result.tensors
    source = PackedSource(folder)
    name = "model.layers.1.self_attn.v_proj.weight"
    kernel = np.asarray(quantized.params["layers"]["self_attn"]["v_proj"]["kernel"])[1]
    assert source.shape(name) == kernel.T.shape
    part = source.read(name, (slice(3, 9), slice(0, 50)))
    np.testing.assert_array_equal(part.astype(kernel.dtype), kernel.T[3:9, :50])


@pytest.mark.parametrize("write", [export_gptq, export_marlin])
def test_one_changed_code_is_found(write, tmp_path):
    quantized = rounded_model()
    (file,) = write(quantized, small_tokenizer(), tmp_path / "packed").files
    path = tmp_path / "packed" / file
    tensors = safetensors.numpy.load_file(path)
    name = next(name for name in tensors if "layers.1.mlp.down_proj.qweight" in name)
    tensors[name][5, 7] ^= 1 << 9
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ExportError, match="layers/mlp/down_proj/kernel reads back with other values"):
        check_read_back(tmp_path / "packed", quantized)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SourceError, match="cannot be read as quantised weights"):
        PackedSource(tmp_path / "packed")
    assert not is_packed(tmp_path)


@pytest.mark.parametrize("write", [functools.partial(export_gptq, layout="minicpm"), export_marlin])
def test_transformers_reads_the_config_of_a_layout_that_it_does_not_know(write, tmp_path):
    """CPM.cu and vLLM begin with `AutoConfig`; these are the fields that CPM.cu reads. We read the folder as before."""
    heads = {"num_heads": 8, "num_kv_heads": 4}
    quantized = rounded_model(**MUP, **heads, rope=LONGROPE, sparse_config=SPARSE)
    folder = tmp_path / "packed"
    write(quantized, small_tokenizer(), folder)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "MiniCPMConfig"
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 2, 8)
    assert (config.scale_emb, config.scale_depth, config.dim_model_base) == (12.0, 1.4, 16)
    assert config.sparse_config["topk"] == SPARSE.topk
    assert config.rope_scaling["rope_type"] == "longrope"
    assert tuple(config.rope_scaling["long_factor"]) == LONGROPE.long_factor
    assert tuple(config.rope_scaling["short_factor"]) == LONGROPE.short_factor
    assert config.quantization_config["bits"] == 4
    assert not list(folder.glob("modeling_*.py"))
    found = compare_runtime(read_export(folder), list(TEXTS.values()))
    assert isinstance(found, NotMade) == is_marlin(folder)


def test_files_that_do_not_fit_together(tmp_path):
    (file,) = export_gptq(rounded_model(), small_tokenizer(), tmp_path / "packed").files
    path, config = tmp_path / "packed" / file, tmp_path / "packed/config.json"
    tensors, content = safetensors.numpy.load_file(path), json.loads(config.read_text())
    name = "model.layers.1.mlp.down_proj"
    for part, values in (("g_idx", tensors[f"{name}.g_idx"] + 7), ("scales", tensors[f"{name}.scales"][:, :5])):
        safetensors.numpy.save_file(tensors | {f"{name}.{part}": np.ascontiguousarray(values)}, path)
        with pytest.raises(SourceError, match=f"the tensors of {name} do not fit together"):
            PackedSource(tmp_path / "packed").read(f"{name}.weight")
    for bits in (0, "4", None):
        changed = content["quantization_config"] | {"bits": bits}
        config.write_text(json.dumps(content | {"quantization_config": changed}))
        with pytest.raises(SourceError, match=r"bits = .*: accepted are \(2, 4, 8\)"):
            PackedSource(tmp_path / "packed")
