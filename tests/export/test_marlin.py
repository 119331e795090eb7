"""Marlin weights against an unpacker written from the description of the layout, one code at a time."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

from cpm_jax.common.config import ConfigError
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.layer import linear_of
from export.marlin import FUSED, export_marlin, pack_codes, pack_scales
from tests.export.quantized_models import ROUNDED, rounded_model
from tests.export.small_models import small_tokenizer

# Which of the eight codes that a thread holds stands at each place of its word, from the lowest bits up.
INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_codes(words):
    """Codes [K, N] from int32 [K/16, 2·N]."""
    bands, width = words.shape
    codes = np.full((16 * bands, width // 2), 99)
    for band in range(bands):
        for word in range(width):
            chunk, within = divmod(word, 128)
            thread, tile = divmod(within, 4)
            rows = (2 * (thread % 4), 2 * (thread % 4) + 1, 2 * (thread % 4 + 4), 2 * (thread % 4 + 4) + 1)
            for place, held in enumerate(INTERLEAVE):
                block, row = divmod(held, 4)
                k = 16 * band + rows[row]
                n = 64 * chunk + 16 * tile + thread // 4 + 8 * block
                assert codes[k, n] == 99, "written twice"
                codes[k, n] = ((int(words[band, word]) >> (4 * place)) & 15) - 8
    return codes


def unpack_scales(scales):
    """Scales [G, N] by the permutation of 64, or of 32 where there is one group, as CPM.cu's converter has them."""
    order = [i + 8 * j for i in range(8) for j in range(8)]
    if len(scales) == 1:
        order = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    unpacked = np.zeros_like(scales)
    for group in range(len(scales)):
        for start in range(0, scales.shape[1], len(order)):
            for place, output in enumerate(order):
                unpacked[group, start + output] = scales[group, start + place]
    return unpacked


@pytest.mark.parametrize("shape", [(16, 64), (48, 192), (128, 64)])
def test_codes_are_undone_by_the_slow_unpacker(shape):
    codes = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    packed = pack_codes(codes)
    assert packed.dtype == np.int32
    assert packed.shape == (shape[0] // 16, shape[1] * 2)
    np.testing.assert_array_equal(unpack_codes(packed), codes)


def test_scales_are_undone():
    scales = np.arange(2 * 128, dtype=np.float32).reshape(2, 128)
    packed = pack_scales(scales)
    assert packed.dtype == np.float16
    assert packed[0, :3].tolist() == [0, 8, 16]
    np.testing.assert_array_equal(unpack_scales(packed), scales)
    single = pack_scales(scales[:1])
    assert single[0, :5].tolist() == [0, 1, 8, 9, 16]
    np.testing.assert_array_equal(unpack_scales(single), scales[:1])


@pytest.mark.parametrize("mup", [False, True])
def test_a_folder_holds_the_fake_quantised_model(mup, tmp_path):
    changes = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 16} if mup else {}
    model = rounded_model(**changes)
    result = export_marlin(model, small_tokenizer(), tmp_path / "marlin")
    assert result.files == ("model_gptq.safetensors",)
    tensors = safetensors.numpy.load_file(tmp_path / "marlin/model_gptq.safetensors")
    for layer in range(2):
        for fused, names in FUSED.items():
            codes = unpack_codes(tensors.pop(f"model.layers.{layer}.{fused}.qweight"))
            scales = unpack_scales(tensors.pop(f"model.layers.{layer}.{fused}.scales")).astype(np.float32)
            kernels = [linear_of(model.params["layers"], name)["kernel"][layer] for name in names]
            np.testing.assert_array_equal(codes * np.repeat(scales, 128, axis=0), np.concatenate(kernels, axis=1))
    norms = [f"model.layers.{i}.{name}_layernorm.weight" for i in range(2) for name in ("input", "post_attention")]
    assert set(tensors) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *norms}
    assert {array.dtype.name for array in tensors.values()} == {"float16"}
    config = json.loads((tmp_path / "marlin/config.json").read_text())
    assert config["model_type"] == ("minicpm" if mup else "llama")
    # What CPM.cu's converter asserts of a config.
    asserted = {"bits": 4, "checkpoint_format": "gptq", "desc_act": False, "group_size": 128}
    asserted |= {"lm_head": False, "static_groups": True, "sym": True}
    assert config["quantization_config"].items() >= asserted.items()


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"group_size": 64}, {}, "QuantizationConfig.group_size = 64: CPM.cu loads Marlin weights of 4 bits with"),
        ({"bits": 8}, {}, "QuantizationConfig.bits = 8: CPM.cu loads Marlin weights of 4 bits"),
        ({}, {"attention_bias": True}, "attention_bias = True: CPM.cu's fused 4-bit layers have no biases; write the"),
        ({}, {"num_heads": 4, "head_dim": 64, "num_kv_heads": 1, "d_model": 160}, "does not divide the 160 inputs"),
        ({}, {"num_heads": 4, "head_dim": 32, "num_kv_heads": 1}, None),
        ({}, {"num_heads": 8, "head_dim": 16, "num_kv_heads": 1}, "qkv_proj has 160 outputs: Marlin takes multiples"),
    ],
)
def test_what_is_refused(settings, changes, message, tmp_path):
    quantization: QuantizationConfig = dataclasses.replace(ROUNDED, **settings)
    if message is None:  # 128 + 2 · 32 outputs: each part alone is no multiple of 64, together they are
        export_marlin(rounded_model(quantization, **changes), small_tokenizer(), tmp_path / "x")
        return
    with pytest.raises(ConfigError, match=message):
        export_marlin(rounded_model(quantization, **changes), small_tokenizer(), tmp_path / "x")
    assert not (tmp_path / "x").exists()
