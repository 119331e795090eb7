"""The decoder: one prompt, or several of equal length, read into a static cache and continued token by token."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from export.torch_runtime import infllm
from export.torch_runtime.cache import Cache, LayerCache, init_cache
from export.torch_runtime.config import FolderError, ModelConfig, SparseConfig, read_config
from export.torch_runtime.linear import Kernels, Linear, QuantizedLinear
from export.torch_runtime.rope import apply_rotary
from export.torch_runtime.weights import Weights


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
        num_slots: int,
    ) -> Tensor:
        """Attends to the first `num_slots` of the cache, the new tokens among them; see `Decoder.forward`."""
        ops = _sparse_ops(self.kernels)
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)  # [B, T, heads, H]
        rotated, keys = apply_rotary(q, cos_sin), apply_rotary(k, cos_sin)
        cache.write(keys, v, k, positions, sparse, ops.write_kernels)
        if sparse is None:
            keys, values = cache.keys[:, :, :num_slots], cache.values[:, :, :num_slots]
            return self.o_proj(_attend(rotated, keys, values, positions, self.scale).flatten(2))
        # Of the kernels those that the slots have; at least one, which nobody sees where there are none.
        fine, coarse = (
            None if kernels is None else kernels[:, :, : max(infllm.num_kernels(num_slots, *sizes), 1)]
            for kernels, sizes in (
                (cache.kernels, (sparse.kernel_size, sparse.kernel_stride)),
                (cache.coarse_kernels, sparse.coarse),
            )
        )
        selecting = q if sparse.use_nope else rotated
        scores = ops.block_scores(selecting, fine, coarse, positions, num_slots, self.scale, sparse)
        ids = infllm.rank_blocks(scores, positions, sparse)
        whole = -(-num_slots // sparse.block_size) * sparse.block_size
        keys, values = cache.keys[:, :, :whole], cache.values[:, :, :whole]
        attend = ops.attend_one if x.shape[1] == 1 else ops.attend_many
        out = attend(rotated, keys, values, ids, positions, self.scale, sparse.block_size)
        return self.o_proj(out.flatten(2))


class SparseOps(NamedTuple):
    """The steps of sparse attention, as `infllm` has them or Triton's kernels."""

    write_kernels: Callable[..., None]
    block_scores: Callable[..., Tensor]
    attend_one: Callable[..., Tensor]
    attend_many: Callable[..., Tensor]


def _sparse_ops(kernels: Kernels) -> SparseOps:
    if kernels == "torch":
        return SparseOps(infllm.write_kernels, infllm.block_scores, infllm.gather_and_attend, infllm.attend_to_blocks)
    from export.torch_runtime.triton_kernels.block_scores import block_scores
    from export.torch_runtime.triton_kernels.compress_keys import write_kernels
    from export.torch_runtime.triton_kernels.sparse_attention import sparse_attention

    return SparseOps(write_kernels, block_scores, sparse_attention, sparse_attention)


def _attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Dense causal attention [B, T, N, H]; several queries are the last of the slots."""
    length, kv_heads = q.shape[1], keys.shape[1]
    if length == 1:
        # The heads that share keys are so many queries of one head, which needs no copy of the keys.
        mask = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]
        grouped = q.squeeze(1).unflatten(1, (kv_heads, -1))  # [B, K, G, H]
        out = functional.scaled_dot_product_attention(grouped, keys, values, mask, scale=scale)
        return out.flatten(1, 2).unsqueeze(1)
    mask = causal_lower_right(length, keys.shape[2])
    gqa = q.shape[2] != kv_heads
    out = functional.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2)


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

    def __init__(self, config: ModelConfig, weights: Weights, index: int):
        super().__init__()
        prefix, names = f"model.layers.{index}.", weights.names

        def norm(name: str) -> RMSNorm:
            return RMSNorm(weights.tensor(f"{prefix}{name}.weight", config.hidden_size), config.rms_norm_eps)

        self.input_norm = norm(names.input_norm)
        self.attention = Attention(config, weights, prefix)
        self.post_attention_norm = norm(names.post_attention_norm)
        self.mlp = FeedForward(config, weights, prefix)


class Decoder(nn.Module):
    """A decoder-only transformer with the weights of a folder; see `load_model`.

    Attributes:
        config: what it computes.
    """

    embedding: Tensor

    def __init__(self, config: ModelConfig, weights: Weights):
        """Reads all weights.

        Raises:
            FolderError: a tensor is missing, of another shape, or would be passed over.
        """
        super().__init__()
        self.config = config
        names, width = weights.names, config.hidden_size
        embedding = weights.tensor(f"{names.embedding}.weight", config.vocab_size, width)
        self.register_buffer("embedding", embedding)
        self.layers = nn.ModuleList(Block(config, weights, index) for index in range(config.num_layers))
        self.norm = RMSNorm(weights.tensor(f"{names.norm}.weight", width), config.rms_norm_eps)
        tied = config.tie_word_embeddings
        head = embedding if tied else weights.tensor(f"{names.head}.weight", config.vocab_size, width)
        self.lm_head = Linear(head)
        weights.check_all_read()

    @property
    def dtype(self) -> torch.dtype:
        """Type of activations, and of keys and values."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding.device

    def use_kernels(self, kernels: Kernels) -> None:
        """Chooses for quantised products, norms and sparse attention: PyTorch's operations, or Triton kernels."""
        for module in self.modules():
            if isinstance(module, Attention | QuantizedLinear | RMSNorm):
                module.kernels = kernels

    def init_cache(self, length: int, batch_size: int = 1) -> Cache:
        """An empty cache for `length` tokens of each sequence; see `cache.init_cache`."""
        return init_cache(self.config, batch_size, length, self.dtype, self.device)

    def forward(self, tokens: Tensor, positions: Tensor, cache: Cache, num_slots: int) -> Tensor:
        """Hidden states of new tokens, which are written to the cache and attend to it.

        Args:
            tokens: ids [B, T].
            positions: of the tokens, consecutive, the same for every sequence [T]. They are data: one compiled step
                serves all of them.
            cache: with all earlier tokens.
            num_slots: how far the cache is read: with several tokens up to the last of them, with one token at least up
                to it, the same number every time where the step is compiled or captured.

        Returns:
            After the final norm [B, T, D].
        """
        x = functional.embedding(tokens, self.embedding) * self.config.embedding_multiplier
        cos_sin = cache.rotary[positions]
        # Each branch is added together with the norm that comes after it, be it of the next layer.
        layers = cast(list[Block], list(self.layers))
        factor, normed = self.config.residual_multiplier, layers[0].input_norm(x)
        next_norms = [*(layer.input_norm for layer in layers[1:]), self.norm]
        for layer, layer_cache, next_norm in zip(layers, cache.layers, next_norms, strict=True):
            attended = layer.attention(normed, cos_sin, positions, layer_cache, cache.sparse, num_slots)
            x, normed = layer.post_attention_norm.add(x, attended, factor)
            x, normed = next_norm.add(x, layer.mlp(normed), factor)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits in float32 [..., V] of hidden states [..., D]."""
        return self.lm_head(hidden / self.config.logits_divisor).float()


def load_model(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Decoder:
    """Loads a folder.

    Args:
        folder: with config.json and safetensors, as `export` writes it.
        device: where to.
        dtype: of activations and of all weights that are not packed; None takes the type that the folder is stored in.

    Raises:
        FolderError: a file is missing, or the folder asks for what is not computed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder: give one that `export` wrote, with config.json in it")
    config = read_config(folder)
    weights = Weights(folder, config, device, dtype or getattr(torch, config.dtype))
    return Decoder(config, weights).eval().requires_grad_(False)
