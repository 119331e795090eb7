"""Small Hugging Face folders as their owners publish them: names and shapes written out, random weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

Shapes = dict[str, tuple[int, ...]]
V, D, H = 300, 64, 16

BASE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": D // H,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
    "pad_token_id": 2,
    "auto_map": {"AutoModelForCausalLM": "modeling_of_theirs.Model"},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False},
    "llama with biases": BASE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": True},
    "qwen2": BASE
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 32,
        "max_window_layers": 28,
    },
    "granite": BASE
    | {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.25,
        "logits_scaling": 8.0,
        "tie_word_embeddings": True,
    },
    "minicpm": BASE
    | {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 16,
        "mup_denominator": 32,
        "max_position_embeddings": 128,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1 + 0.1 * i for i in range(H // 2)],
            "long_factor": [1 + 1.5 * i for i in range(H // 2)],
            "original_max_position_embeddings": 64,
        },
        "sparse_config": {"kernel_size": 32, "topk": 64, "dense_len": 8192},
    },
    "internlm2": BASE
    | {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "attn_implementation": "eager",
    },
    "mimo": BASE
    | {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "mimo",
        "head_dim": H,
        "attention_bias": True,
        "num_nextn_predict_layers": 1,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "use_mrope": False,
    },
}
# Llama 3 ends a text with any of several tokens, and says so in this file too.
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
del CONFIGS["minicpm"]["tie_word_embeddings"]  # as published with tied embeddings: the class's default


def sizes(config: Mapping[str, Any]) -> tuple[int, int, int, int, int, int, int]:
    """V, D, F, LAYERS, N, K and H of a config.json."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    v, d, f, layers, n = (config[name] for name in names)
    return v, d, f, layers, n, config["num_key_value_heads"], config.get("head_dim", d // n)


def llama_layer(config: Mapping[str, Any], at: str, biases: str) -> Shapes:
    _, d, f, _, n, k, h = sizes(config)
    shapes: Shapes = {
        f"{at}.input_layernorm.weight": (d,),
        f"{at}.self_attn.q_proj.weight": (n * h, d),
        f"{at}.self_attn.k_proj.weight": (k * h, d),
        f"{at}.self_attn.v_proj.weight": (k * h, d),
        f"{at}.self_attn.o_proj.weight": (d, n * h),
        f"{at}.post_attention_layernorm.weight": (d,),
        f"{at}.mlp.gate_proj.weight": (f, d),
        f"{at}.mlp.up_proj.weight": (f, d),
        f"{at}.mlp.down_proj.weight": (d, f),
    }
    return shapes | {f"{at}.self_attn.{p}_proj.bias": shapes[f"{at}.self_attn.{p}_proj.weight"][:1] for p in biases}


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the published files."""
    v, d, f, layers, n, k, h = sizes(config)
    if config["model_type"] == "internlm2":
        shapes: Shapes = {"model.tok_embeddings.weight": (v, d), "model.norm.weight": (d,), "output.weight": (v, d)}
        for at in (f"model.layers.{layer}" for layer in range(layers)):
            shapes |= {
                f"{at}.attention_norm.weight": (d,),
                f"{at}.attention.wqkv.weight": ((n + 2 * k) * h, d),
                f"{at}.attention.wo.weight": (d, n * h),
                f"{at}.ffn_norm.weight": (d,),
                f"{at}.feed_forward.w1.weight": (f, d),
                f"{at}.feed_forward.w2.weight": (d, f),
                f"{at}.feed_forward.w3.weight": (f, d),
            }
            if config["bias"]:
                shapes |= {f"{at}.attention.wqkv.bias": ((n + 2 * k) * h,), f"{at}.attention.wo.bias": (d,)}
        return shapes
    biases = {"qwen2": "qkv", "mimo": "qkv"}.get(config["model_type"], "qkvo" if config.get("attention_bias") else "")
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config.get("tie_word_embeddings", config["model_type"] == "minicpm"):
        shapes["lm_head.weight"] = (v, d)
    for layer in range(layers):
        shapes |= llama_layer(config, f"model.layers.{layer}", biases)
    for layer in range(config.get("num_nextn_predict_layers", 0)):
        at = f"model.mtp_layers.{layer}"
        shapes |= llama_layer(config, at, biases) | {f"{at}.input_proj.weight": (d, 2 * d)}
        shapes |= {f"{at}.{name}_layernorm.weight": (d,) for name in ("token", "hidden", "final")}
    return shapes


def write(folder: Path, config: Mapping[str, Any], dtype: str = "float32", shards: int = 2) -> dict[str, np.ndarray]:
    """Writes a folder with random weights in some shards; returns the tensors. Biases on o are zero."""
    rng = np.random.default_rng(0)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors = {}
    for name, shape in shapes_of(config).items():
        mean = 1.0 if "norm" in name else 0.0
        values = (mean + 0.15 * rng.standard_normal(shape)).astype(kind)
        tensors[name] = np.zeros(shape, kind) if name.endswith(("o_proj.bias", "wo.bias")) else values
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config) | {"torch_dtype": dtype}))
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return tensors
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        safetensors.numpy.save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors
