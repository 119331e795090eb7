"""What a layer of the decoder is made of, over a static cache."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from export.torch_runtime import infllm
from export.torch_runtime.cache import LayerCache
from export.torch_runtime.config import ModelConfig, SparseConfig
from export.torch_runtime.linear import Kernels
from export.torch_runtime.rope import rotate
from export.torch_runtime.weights import Weights

GATHERING_QUERIES = 8  # so many at most fetch the blocks of sparse attention each for itself


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last dimension, in float32.

    Buffers: weight [D].
    """

    weight: Tensor

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.register_buffer("weight", weight)
        self.eps = eps
        self.kernels: Kernels = "torch"

    @classmethod
    def load(cls, config: ModelConfig, weights: Weights, name: str) -> "RMSNorm":
        """The norm that a folder has under a name."""
        return cls(weights.tensor(f"{name}.weight", config.hidden_size), config.rms_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x, keeping its type."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)

    def add(self, x: Tensor, branch: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        """x + branch · multiplier, and that normalised."""
        if self.kernels == "triton":
            from export.torch_runtime.triton_kernels.residual_norm import residual_norm

            return residual_norm(x, branch, multiplier, self.weight, self.eps)
        x = x + branch * multiplier
        return x, self(x)


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding over a cache."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str):
        super().__init__()
        self.scale = config.attention_scale
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.head_dim = config.head_dim
        self.kernels: Kernels = "torch"
        inputs = config.num_heads * config.head_dim
        self.qkv_proj = weights.qkv(prefix)
        self.o_proj = weights.linear(prefix, [weights.names.o], inputs, [config.hidden_size], config.o_bias)

    def forward(
        self,
        x: Tensor,
        cos_sin: Tensor,
        positions: Tensor,
        cache: LayerCache,
        sparse: SparseConfig | None,
        num_slots: int | None,
    ) -> Tensor:
        """Attends to the cache, the new tokens among it; see `Decoder.forward`.

        Args:
            x: normalised residual stream [B, T, D].
            cos_sin: rows of `rope.rotary_table` [T, 2, H/2].
            positions: of the tokens, consecutive [T].
            cache: of this layer.
            sparse: how blocks are chosen; None attends to all.
            num_slots: how far the cache is read; None reads all of it.
        """
        ops = _operations(self.kernels)
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)  # [B, T, heads, H]
        rotated, keys = ops.rotate(q, k, cos_sin)
        cache.write(keys, v, k, positions, sparse, ops.write_kernels)
        slots = cache.keys.shape[2] if num_slots is None else num_slots
        if sparse is None:
            keys, values = cache.keys[:, :, :slots], cache.values[:, :, :slots]
            attend = ops.attend_to_all if num_slots is None or x.shape[1] == 1 else _attend_to_prompt
            return self.o_proj(attend(rotated, keys, values, positions, self.scale).flatten(2))
        # Of the kernels those that the slots have; at least one, which nobody sees where there are none.
        fine, coarse = (
            None if kernels is None else kernels[:, :, : max(infllm.num_kernels(slots, *sizes), 1)]
            for kernels, sizes in (
                (cache.kernels, (sparse.kernel_size, sparse.kernel_stride)),
                (cache.coarse_kernels, sparse.coarse),
            )
        )
        selecting = q if sparse.use_nope else rotated
        scores = ops.block_scores(selecting, fine, coarse, positions, slots, self.scale, sparse)
        ids = infllm.rank_blocks(scores, positions, sparse)
        whole = -(-slots // sparse.block_size) * sparse.block_size
        keys, values = cache.keys[:, :, :whole], cache.values[:, :, :whole]
        attend = ops.attend_few if x.shape[1] <= GATHERING_QUERIES else ops.attend_many
        out = attend(rotated, keys, values, ids, positions, self.scale, sparse.block_size)
        return self.o_proj(out.flatten(2))


class Operations(NamedTuple):
    """The steps of attention for which there are Triton kernels: `rope` and `infllm` have them, or those do."""

    rotate: Callable[..., tuple[Tensor, Tensor]]
    attend_to_all: Callable[..., Tensor]
    write_kernels: Callable[..., None]
    block_scores: Callable[..., Tensor]
    attend_few: Callable[..., Tensor]
    attend_many: Callable[..., Tensor]


def _operations(kernels: Kernels) -> Operations:
    if kernels == "torch":
        return Operations(
            rotate,
            attend_to_all,
            infllm.write_kernels,
            infllm.block_scores,
            infllm.gather_and_attend,
            infllm.attend_to_blocks,
        )
    from export.torch_runtime.triton_kernels import rotary
    from export.torch_runtime.triton_kernels.block_scores import block_scores
    from export.torch_runtime.triton_kernels.compress_keys import write_kernels
    from export.torch_runtime.triton_kernels.sparse_attention import dense_attention, sparse_attention

    return Operations(rotary.rotate, dense_attention, write_kernels, block_scores, sparse_attention, sparse_attention)


def _attend_to_prompt(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Dense causal attention [B, T, N, H] of the queries of the last slots, which are those of `positions`."""
    causal, group = causal_lower_right(q.shape[1], keys.shape[2]), q.shape[2] // keys.shape[1]
    q = q.transpose(1, 2)
    if group == 1 or q.dtype != torch.float32:
        return functional.scaled_dot_product_attention(
            q, keys, values, causal, scale=scale, enable_gqa=group > 1
        ).transpose(1, 2)
    # Heads share keys in FlashAttention alone, which has no float32; what else does holds all scores in memory.
    parts = [
        functional.scaled_dot_product_attention(
            part, k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1), causal, scale=scale
        )
        for part, k, v in zip(q.split(group, dim=1), keys.split(1, dim=1), values.split(1, dim=1), strict=True)
    ]
    return torch.cat(parts, dim=1).transpose(1, 2)


def attend_to_all(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Dense causal attention of few queries, by a mask over all slots.

    Args:
        q: [B, T, N, H].
        keys: [B, K, S, H].
        values: [B, K, S, H].
        positions: of the queries [T].
        scale: factor on the scores.

    Returns:
        [B, T, N, H].
    """
    kv_heads = keys.shape[1]
    # The heads that share keys are so many queries of one head, which needs no copy of the keys.
    grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    mask = (torch.arange(keys.shape[2], device=q.device) <= positions[:, None]).repeat(grouped.shape[2], 1)
    out = functional.scaled_dot_product_attention(grouped.flatten(2, 3), keys, values, mask, scale=scale)
    return out.unflatten(2, (grouped.shape[2], q.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = weights.linear(prefix, weights.names.gate_up, width, [inner, inner], bias=False)
        self.down_proj = weights.linear(prefix, [weights.names.down], inner, [width], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to every position by itself."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class Block(nn.Module):
    """What a layer is made of; `Decoder.forward` adds its branches to the residual stream."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str):
        super().__init__()
        self.input_norm = RMSNorm.load(config, weights, prefix + weights.names.input_norm)
        self.attention = Attention(config, weights, prefix)
        self.post_attention_norm = RMSNorm.load(config, weights, prefix + weights.names.post_attention_norm)
        self.mlp = FeedForward(config, weights, prefix)


class MtpLayer(Block):
    """A layer that predicts one token further ahead than the hidden states it is given (MiMo report, section 2.3)."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int):
        prefix = f"model.mtp_layers.{index}."
        super().__init__(config, weights, prefix)
        self.residual_multiplier = config.residual_multiplier
        self.token_norm = RMSNorm.load(config, weights, f"{prefix}token_layernorm")
        self.hidden_norm = RMSNorm.load(config, weights, f"{prefix}hidden_layernorm")
        self.input_proj = weights.linear(
            prefix, ["input_proj"], 2 * config.hidden_size, [config.hidden_size], bias=False
        )
        self.final_norm = RMSNorm.load(config, weights, f"{prefix}final_layernorm")

    def forward(
        self,
        hidden: Tensor,
        embedded: Tensor,
        cos_sin: Tensor,
        positions: Tensor,
        cache: LayerCache,
        sparse: SparseConfig | None,
        num_slots: int | None,
    ) -> Tensor:
        """Hidden states for the head [B, T, D].

        Args:
            hidden: of the model, or of the MTP layer before [B, T, D].
            embedded: the tokens that follow the last ones which those have seen [B, T, D].
            cos_sin: as for `Attention`, which also says what the others are.
            positions: of the hidden states.
            cache: of this layer.
            sparse: how blocks are chosen.
            num_slots: how far the cache is read.
        """
        x = self.input_proj(torch.cat([self.hidden_norm(hidden), self.token_norm(embedded)], dim=-1))
        attended = self.attention(self.input_norm(x), cos_sin, positions, cache, sparse, num_slots)
        x, normed = self.post_attention_norm.add(x, attended, self.residual_multiplier)
        return self.final_norm.add(x, self.mlp(normed), self.residual_multiplier)[1]
