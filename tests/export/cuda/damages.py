"""Folders whose configuration and tensors do not fit: what the runtime says, and what makes a good folder such."""

import numpy as np


def _config(**changes):
    return lambda config, tensors: (config | changes, tensors)


def _tensors(change):
    def damage(config, tensors):
        tensors = dict(tensors)
        change(tensors)
        return config, tensors

    return damage


NORM = "model.layers.1.input_layernorm.weight"
FUSED = "model.layers.0.self_attn.qkv_proj"
DAMAGES = {
    "config.json: hidden_size = 0: accepted is a whole number from 1": _config(hidden_size=0),
    'config.json: hidden_act = "gelu": accepted is silu': _config(hidden_act="gelu"),
    "config.json: num_key_value_heads = 3: accepted is a divisor of": _config(num_key_value_heads=3),
    'config.json: model_type = "mamba": accepted is llama': _config(model_type="mamba"),
    "config.json lacks vocab_size": _config(vocab_size=None),
    "num_hidden_layers = 2000000000: the weights have only": _config(num_hidden_layers=2_000_000_000),
    "model.embed_tokens.weight has the shape [320, 64]: config.json asks for [320, 128]": _config(hidden_size=128),
    "rope_scaling: short_factor has 3 values: accepted are head_dim/2 = 8": _config(
        rope_scaling={"rope_type": "longrope", "short_factor": [1, 1, 1], "long_factor": [1, 1, 1]}
    ),
    "sparse_config: block_size = 5: accepted is a multiple of kernel_stride = 2": _config(
        sparse_config={"kernel_stride": 2, "kernel_size": 4, "block_size": 5}
    ),
    "quantization_config: bits = 8: accepted is a whole number from 4 to 4": _config(
        quantization_config={"quant_method": "gptq", "bits": 8, "group_size": 128}
    ),
    f"group_size = -1: accepted is 128 with Marlin weights, which {FUSED} has": lambda config, tensors: (
        config | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": -1}},
        tensors | {f"{FUSED}.qweight": np.zeros((4, 256), np.int32)},
    ),
    "the weights lack lm_head.weight": _tensors(lambda tensors: tensors.pop("lm_head.weight")),
    f"{NORM} has the type I32: accepted are BF16, F16, F32": _tensors(
        lambda tensors: tensors.update({NORM: np.zeros(64, np.int32)})
    ),
    "the weights have model.norm.bias, for which the model of config.json has no place": _tensors(
        lambda tensors: tensors.update({"model.norm.bias": np.zeros(64, np.float32)})
    ),
}
