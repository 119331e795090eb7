"""GPTQ folders against an unpacker that reads one code at a time, as the format is described."""

import json

import numpy as np
import pytest
import safetensors.numpy

from cpm_jax.common.config import ConfigError
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.layer import LINEARS, linear_of
from export.gptq import describe, export_gptq, pack_linear, unpack_linear
from tests.export.quantized_models import ROUNDED, rounded_model
from tests.export.small_models import small_tokenizer


def unpack(tensors, bits):
    """Every weight by itself: its code from its word, its zero (stored less one) and its scale by its group."""
    per_word, mask = 32 // bits, (1 << bits) - 1
    qweight, qzeros, scales, groups = (tensors[part] for part in ("qweight", "qzeros", "scales", "g_idx"))
    weights = np.zeros((qweight.shape[0] * per_word, qweight.shape[1]), np.float32)
    for k in range(weights.shape[0]):
        group = int(groups[k])
        for n in range(weights.shape[1]):
            code = (int(qweight[k // per_word, n]) >> (bits * (k % per_word))) & mask
            zero = ((int(qzeros[group, n // per_word]) >> (bits * (n % per_word))) & mask) + 1
            weights[k, n] = np.float32(code - zero) * np.float32(scales[group, n])
    return weights


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_packing_is_undone_by_the_slow_unpacker(bits, groups):
    rng = np.random.default_rng(bits)
    codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (48, 32)).astype(np.int8)
    scales = rng.random((groups, 32)).astype(np.float16).astype(np.float32)
    packed = pack_linear(codes, scales, bits)
    assert {name: (part.dtype.name, part.shape) for name, part in packed.items()} == {
        "qweight": ("int32", (48 * bits // 32, 32)),
        "qzeros": ("int32", (groups, bits)),
        "scales": ("float16", (groups, 32)),
        "g_idx": ("int32", (48,)),
    }
    np.testing.assert_array_equal(unpack(packed, bits), codes * np.repeat(scales, 48 // groups, axis=0))


def test_zeros_of_4_bits_are_sevens():
    packed = pack_linear(np.zeros((8, 8), np.int8), np.ones((1, 8), np.float32), 4)
    assert set(packed["qzeros"].view(np.uint32).ravel().tolist()) == {0x77777777}
    assert set(packed["qweight"].view(np.uint32).ravel().tolist()) == {0x88888888}


def test_a_zero_point_of_0_is_stored_as_all_ones():
    codes = np.arange(-8, 8, dtype=np.int8).repeat(8).reshape(16, 8)
    parts = pack_linear(codes, np.ones((2, 8), np.float16), 4)
    parts["qzeros"] = np.full_like(parts["qzeros"], -1)
    np.testing.assert_array_equal(unpack_linear(parts, 4), codes.T + 8)


@pytest.mark.parametrize(
    ("changes", "group_size"),
    [
        ({}, 128),
        ({"attention_bias": True, "tie_word_embeddings": True}, 64),
        ({"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 16}, -1),
    ],
    ids=["llama", "biases, tied", "granite, per channel"],
)
def test_a_folder_holds_the_fake_quantised_model(changes, group_size, tokenizer, tmp_path):
    model = rounded_model(QuantizationConfig(method="rtn", group_size=group_size), **changes)
    result = export_gptq(model, tokenizer, tmp_path / "gptq", max_shard_bytes=60_000, facts={"Loss": "2"})
    assert len(result.files) > 1
    index = json.loads((tmp_path / "gptq/model.safetensors.index.json").read_text())
    tensors = {}
    for name in result.files:
        tensors |= safetensors.numpy.load_file(tmp_path / "gptq" / name)
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    rest = set(tensors)
    for layer in range(2):
        for name in LINEARS:
            prefix = f"model.layers.{layer}.{name.replace('/', '.')}."
            parts = {part: tensors[prefix + part] for part in ("qweight", "qzeros", "scales", "g_idx")}
            rest -= {prefix + part for part in parts}
            assert prefix + "weight" not in tensors
            kernel = linear_of(model.params["layers"], name)["kernel"][layer]
            # Every eighth output, whose codes of zero are all alike: one by one it takes time.
            columns = {part: array[:, ::8] for part, array in parts.items() if part in ("qweight", "scales")}
            thinned = {**parts, **columns, "qzeros": parts["qzeros"][:, : -(-columns["scales"].shape[1] // 8)]}
            np.testing.assert_array_equal(unpack(thinned, 4), kernel[:, ::8])
    assert all(tensors[name].dtype == np.float16 for name in rest)
    assert ("model.layers.0.self_attn.q_proj.bias" in rest) == bool(changes.get("attention_bias"))
    embedding = np.asarray(model.params["embed_tokens"]["embedding"]).astype(np.float16)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], embedding)
    config = json.loads((tmp_path / "gptq/config.json").read_text())
    assert config["architectures"] == [result.architecture]
    asked = {"bits": 4, "group_size": group_size, "sym": True, "desc_act": False, "static_groups": True}
    asked |= {"lm_head": False, "checkpoint_format": "gptq", "quant_method": "gptq"}
    assert config["quantization_config"].items() >= asked.items()
    assert "| Loss | 2 |" in (tmp_path / "gptq/README.md").read_text()
    assert (tmp_path / "gptq/tokenizer.json").is_file()


def test_a_failed_export_leaves_what_was_there(tokenizer, tmp_path, monkeypatch):
    model = rounded_model()
    export_gptq(model, tokenizer, tmp_path / "gptq")
    before = (tmp_path / "gptq/config.json").read_bytes()
    monkeypatch.setattr("export.gptq.write_companions", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_gptq(model, tokenizer, tmp_path / "gptq", facts={"Other": "1"})
    assert (tmp_path / "gptq/config.json").read_bytes() == before
    assert "Other" not in (tmp_path / "gptq/README.md").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds files that are no export"):
        export_gptq(model, tokenizer, tmp_path / "mine")


def test_what_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="bits = 3: codes of 3 bits do not fill words of 32; quantise to one of 2, 4"):
        export_gptq(rounded_model(QuantizationConfig(method="rtn", bits=3)), tokenizer, tmp_path / "x")
    model = rounded_model(QuantizationConfig(method="rtn", group_size=-1), d_ff=260)
    with pytest.raises(ConfigError, match="mlp/gate_proj has 260 outputs: the GPTQ format packs 8 codes of 4 bits"):
        export_gptq(model, tokenizer, tmp_path / "x")
    with pytest.raises(ConfigError, match=r"'internlm2': .*wqkv.weight is several linear layers in one.*'llama'"):
        export_gptq(rounded_model(), tokenizer, tmp_path / "x", layout="internlm2")
    assert not (tmp_path / "x").exists()


def test_the_model_card_names_the_switches():
    assert describe(ROUNDED) == "RTN, 4 bits, symmetric, groups of 128"
    all_of_it = QuantizationConfig(group_size=-1, skip_initial_tokens=4, smoothing=True, rotation=True)
    assert describe(all_of_it) == (
        "GPTQ, 4 bits, symmetric, one scale for each output; calibrated without the first 4 tokens of each sequence; "
        "activation-aware smoothing; rotated residual stream"
    )
