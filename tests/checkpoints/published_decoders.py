"""MiniCPM, InternLM2 and MiMo in plain PyTorch, from their reports and published code, on tensors as they are named.

They know nothing of our tables: weights are taken from the folder by Hugging Face's names, one row of tokens at a time.
"""

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

Weights = dict[str, torch.Tensor]


def read(folder: Path) -> tuple[dict[str, Any], Weights]:
    """config.json, and all tensors in float32."""
    weights: Weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= safetensors.torch.load_file(file)
    return json.loads((folder / "config.json").read_text()), {name: w.float() for name, w in weights.items()}


def rotate(x: torch.Tensor, inverse_frequencies: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """x [heads, T, H] by angles position · frequency, as `x * cos + rotate_half(x) * sin` says it."""
    angles = torch.arange(x.shape[1])[:, None].double() * inverse_frequencies
    cos, sin = (torch.cat([f(angles), f(angles)], -1).float() * scale for f in (torch.cos, torch.sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def plain(theta: float, width: int) -> torch.Tensor:
    return 1 / theta ** (torch.arange(0, width, 2).double() / width)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[heads, T, H] each, to [T, N·H]; scores are divided by sqrt(H)."""
    out = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    return out.transpose(0, 1).reshape(q.shape[1], -1)


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.reshape(len(x), heads, -1).transpose(0, 1)


def llama_block(x: torch.Tensor, w: Weights, at: str, c: dict[str, Any], turn: Any, residual: float) -> torch.Tensor:
    """A layer under the names of Llama and Qwen2, with biases where there are any."""
    y = rms_norm(x, x.shape[-1:], w[f"{at}.input_layernorm.weight"], c["rms_norm_eps"])
    q, k, v = (linear(y, w[f"{at}.self_attn.{p}_proj.weight"], w.get(f"{at}.self_attn.{p}_proj.bias")) for p in "qkv")
    q, k, v = split(q, c["num_attention_heads"]), split(k, c["num_key_value_heads"]), split(v, c["num_key_value_heads"])
    x = x + residual * linear(attend(turn(q), turn(k), v), w[f"{at}.self_attn.o_proj.weight"])
    y = rms_norm(x, x.shape[-1:], w[f"{at}.post_attention_layernorm.weight"], c["rms_norm_eps"])
    gate, up, down = (w[f"{at}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
    return x + residual * linear(silu(linear(y, gate)) * linear(y, up), down)


def minicpm(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V]: scale_emb, scale_depth / sqrt(L), dim_model_base / hidden_size, LongRoPE."""
    c, w = read(folder)
    head = c["hidden_size"] // c["num_attention_heads"]
    frequencies, scale = plain(c["rope_theta"], head), 1.0
    if rope := c.get("rope_scaling"):
        original = rope["original_max_position_embeddings"]
        factors = rope["long_factor" if len(tokens) > original else "short_factor"]
        frequencies = frequencies / torch.tensor(factors).double()
        extension = c["max_position_embeddings"] / original
        scale = math.sqrt(1 + math.log(extension) / math.log(original))
    x = w["model.embed_tokens.weight"][tokens] * c["scale_emb"]
    for layer in range(c["num_hidden_layers"]):
        residual = c["scale_depth"] / math.sqrt(c["num_hidden_layers"])
        x = llama_block(x, w, f"model.layers.{layer}", c, lambda y: rotate(y, frequencies, scale), residual)
    x = rms_norm(x, x.shape[-1:], w["model.norm.weight"], c["rms_norm_eps"])
    table = w["model.embed_tokens.weight"] if c.get("tie_word_embeddings", True) else w["lm_head.weight"]
    return linear(x / (c["hidden_size"] / c["dim_model_base"]), table)


def internlm2(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [T, V]: what wqkv gives is, for each kv head, [its query heads, key, value]; dynamic NTK."""
    c, w = read(folder)
    kv, groups = c["num_key_value_heads"], c["num_attention_heads"] // c["num_key_value_heads"]
    head = c["hidden_size"] // c["num_attention_heads"]
    theta = c["rope_theta"]
    if (rope := c.get("rope_scaling")) and len(tokens) > c["max_position_embeddings"]:
        assert rope["type"] == "dynamic"
        stretch = rope["factor"] * len(tokens) / c["max_position_embeddings"] - (rope["factor"] - 1)
        theta = theta * stretch ** (head / (head - 2))
    frequencies = plain(theta, head)
    x = w["model.tok_embeddings.weight"][tokens]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        y = rms_norm(x, x.shape[-1:], w[f"{at}.attention_norm.weight"], c["rms_norm_eps"])
        fused = linear(y, w[f"{at}.attention.wqkv.weight"], w.get(f"{at}.attention.wqkv.bias"))
        fused = fused.reshape(len(tokens), kv, groups + 2, head)
        q = fused[:, :, :groups].reshape(len(tokens), -1, head).transpose(0, 1)
        k, v = fused[:, :, -2].transpose(0, 1), fused[:, :, -1].transpose(0, 1)
        attended = attend(rotate(q, frequencies), rotate(k, frequencies), v)
        x = x + linear(attended, w[f"{at}.attention.wo.weight"])
        y = rms_norm(x, x.shape[-1:], w[f"{at}.ffn_norm.weight"], c["rms_norm_eps"])
        w1, w2, w3 = (w[f"{at}.feed_forward.w{i}.weight"] for i in (1, 2, 3))
        x = x + linear(silu(linear(y, w1)) * linear(y, w3), w2)
    x = rms_norm(x, x.shape[-1:], w["model.norm.weight"], c["rms_norm_eps"])
    return linear(x, w["output.weight"])


def mimo(folder: Path, tokens: torch.Tensor, next_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the model and of its first MTP layer, which is given the token after each."""
    c, w = read(folder)
    frequencies = plain(c["rope_theta"], c["head_dim"])

    def turn(y: torch.Tensor) -> torch.Tensor:
        return rotate(y, frequencies)

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(y, y.shape[-1:], w[f"model.{name}.weight"], c["rms_norm_eps"])

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(c["num_hidden_layers"]):
        x = llama_block(x, w, f"model.layers.{layer}", c, turn, 1.0)
    x = norm(x, "norm")
    embedded = norm(w["model.embed_tokens.weight"][next_tokens], "mtp_layers.0.token_layernorm")
    both = torch.cat([norm(x, "mtp_layers.0.hidden_layernorm"), embedded], -1)
    y = llama_block(linear(both, w["model.mtp_layers.0.input_proj.weight"]), w, "model.mtp_layers.0", c, turn, 1.0)
    y = norm(y, "mtp_layers.0.final_layernorm")
    return linear(x, w["lm_head.weight"]), linear(y, w["lm_head.weight"])
