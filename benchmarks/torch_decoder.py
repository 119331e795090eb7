"""The decoder of `cpm_jax.modeling` in plain, good PyTorch: what a training step of ours is held against.

Scaled-dot-product attention, `F.rms_norm`, fused AdamW with the µP groups of docs/optimizer.md. No packed documents: a
row is one document, which is what SDPA's fast causal path takes.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.rotary import inverse_frequencies
from cpm_jax.training.optimizer import OptimizerConfig, parameter_groups


class TorchBlock(nn.Module):
    """A pre-norm layer: grouped-query attention with rotary embedding, SwiGLU, scaled residual branches."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width, head = config.d_model, config.head_size
        self.input_layernorm = nn.Parameter(torch.empty(width))
        self.q_proj = nn.Linear(width, config.num_heads * head, bias=False)
        self.k_proj = nn.Linear(width, config.num_kv_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.num_kv_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_heads * head, width, bias=False)
        self.post_attention_layernorm = nn.Parameter(torch.empty(width))
        self.gate_proj = nn.Linear(width, config.d_ff, bias=False)
        self.up_proj = nn.Linear(width, config.d_ff, bias=False)
        self.down_proj = nn.Linear(config.d_ff, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Applies the layer to [B, T, D]."""
        config = self.config
        y = F.rms_norm(x, x.shape[-1:], self.input_layernorm, config.rms_norm_eps)
        q, k, v = (
            project(y).unflatten(-1, (-1, config.head_size)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            is_causal=True,
            enable_gqa=config.num_heads != config.num_kv_heads,
        )
        x = x + config.residual_multiplier * self.o_proj(attended.transpose(1, 2).flatten(2))
        y = F.rms_norm(x, x.shape[-1:], self.post_attention_layernorm, config.rms_norm_eps)
        return x + config.residual_multiplier * self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


class TorchDecoder(nn.Module):
    """The model with a tied embedding, and its loss."""

    def __init__(self, config: ModelConfig, length: int):
        """Declares the parameters; `load` fills them.

        Args:
            config: the model, in float32, with a tied embedding and without biases and MTP layers.
            length: T of the batches.
        """
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.layers = nn.ModuleList(TorchBlock(config) for _ in range(config.num_layers))
        self.norm = nn.Parameter(torch.empty(config.d_model))
        angles = np.arange(length)[:, None] * inverse_frequencies(config, length)
        self.register_buffer("cos", torch.tensor(np.cos(angles), dtype=torch.float32))
        self.register_buffer("sin", torch.tensor(np.sin(angles), dtype=torch.float32))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean next-token loss of [B, T] tokens."""
        x = F.embedding(tokens, self.embedding) * self.config.scale_emb
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        x = F.rms_norm(x, x.shape[-1:], self.norm, self.config.rms_norm_eps) / self.config.width_multiplier
        return F.cross_entropy(F.linear(x, self.embedding).flatten(0, 1), targets.flatten())

    def load(self, params: Mapping[str, np.ndarray]) -> None:
        """Copies a parameter tree of ours (docs/architecture.md), given by paths."""
        for name, leaf in params.items():
            for parameter, values in self._pairs(name, leaf):
                with torch.no_grad():
                    parameter.copy_(torch.tensor(values))

    def export(self, values: Mapping[nn.Parameter, torch.Tensor]) -> dict[str, np.ndarray]:
        """A value of each parameter (such as its gradient) by the paths of our tree."""
        out = {"embed_tokens/embedding": values[self.embedding], "norm/scale": values[self.norm]}
        for name in LAYER_PATHS:
            out[name] = torch.stack([values[_of(layer, name)] for layer in self.layers])
        return {
            name: np.asarray(x.detach().transpose(1, 2) if name.endswith("kernel") else x.detach())
            for name, x in out.items()
        }

    def _pairs(self, name: str, leaf: np.ndarray) -> list[tuple[nn.Parameter, np.ndarray]]:
        if not name.startswith("layers/"):
            return [({"embed_tokens/embedding": self.embedding, "norm/scale": self.norm}[name], leaf)]
        transposed = leaf.swapaxes(1, 2) if name.endswith("kernel") else leaf
        return [(_of(layer, name), x) for layer, x in zip(self.layers, transposed, strict=True)]


LAYER_PATHS = (
    *(f"layers/{norm}/scale" for norm in ("input_layernorm", "post_attention_layernorm")),
    *(f"layers/self_attn/{name}_proj/kernel" for name in "qkvo"),
    *(f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")),
)


def _of(layer: nn.Module, path: str) -> nn.Parameter:
    """The parameter of a layer at a path such as layers/mlp/up_proj/kernel."""
    name, kind = path.split("/")[-2:]
    found = getattr(layer, name)
    return found.weight if kind == "kernel" else found


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split layout; x is [B, N, T, H], the angles [T, H/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def make_adamw(model: TorchDecoder, config: OptimizerConfig, lr: float) -> torch.optim.AdamW:
    """Fused AdamW with the groups of `cpm_jax.training.optimizer.parameter_groups`, at a constant learning rate."""
    table = parameter_groups(config, model.config)
    members: dict[str, list[nn.Parameter]] = {"embedding": [], "matrix": [], "norm": []}
    for name, parameter in model.named_parameters():
        members["embedding" if name == "embedding" else "matrix" if parameter.ndim == 2 else "norm"].append(parameter)
    # PyTorch's decay is multiplied by the group's learning rate, as ours is.
    groups = [
        {"params": parameters, "lr": lr * table[group].lr, "weight_decay": table[group].decay}  # type: ignore[index]
        for group, parameters in members.items()
    ]
    return torch.optim.AdamW(groups, betas=(config.b1, config.b2), eps=config.eps, fused=True)
