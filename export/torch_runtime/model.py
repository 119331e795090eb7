"""The decoder: one prompt, or several of equal length, read into a static cache and continued token by token."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.torch_runtime.cache import Cache, init_cache
from export.torch_runtime.config import FolderError, ModelConfig, read_config
from export.torch_runtime.layers import Attention, Block, MtpLayer, RMSNorm
from export.torch_runtime.linear import Kernels, Linear, QuantizedLinear
from export.torch_runtime.weights import Weights


class Decoder(nn.Module):
    """A decoder-only transformer with the weights of a folder; see `load_model`.

    Attributes:
        config: what it computes.
        mtp_layers: those that draft tokens, where they were asked for.
    """

    embedding: Tensor

    def __init__(self, config: ModelConfig, weights: Weights, mtp: bool = False):
        """Reads all weights, those of MTP layers only if `mtp`.

        Raises:
            FolderError: a tensor is missing, of another shape, or would be passed over.
        """
        super().__init__()
        self.config = config
        names, width = weights.names, config.hidden_size
        embedding = weights.tensor(f"{names.embedding}.weight", config.vocab_size, width)
        self.register_buffer("embedding", embedding)
        self.layers = nn.ModuleList(Block(config, weights, f"model.layers.{i}.") for i in range(config.num_layers))
        mtp_layers = config.num_nextn_predict_layers if mtp else 0
        self.mtp_layers = nn.ModuleList(MtpLayer(config, weights, index) for index in range(mtp_layers))
        self.norm = RMSNorm.load(config, weights, names.norm)
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
        """Chooses for quantised products, norms, rotary embedding and sparse attention: PyTorch, or Triton kernels.

        Those run on the current CUDA device. `generate` makes it the model's; for calls of the model itself
        `torch.cuda.set_device` does.
        """
        for module in self.modules():
            if isinstance(module, Attention | QuantizedLinear | RMSNorm):
                module.kernels = kernels

    def init_cache(self, length: int, batch_size: int = 1) -> Cache:
        """An empty cache for `length` tokens of each sequence; see `cache.init_cache`."""
        return init_cache(self.config, batch_size, length, self.dtype, self.device, len(self.mtp_layers))

    def embed(self, tokens: Tensor) -> Tensor:
        """What the layers begin with [B, T, D], of token ids [B, T]."""
        return functional.embedding(tokens, self.embedding) * self.config.embedding_multiplier

    def forward(self, tokens: Tensor, positions: Tensor, cache: Cache, num_slots: int | None) -> Tensor:
        """Hidden states of new tokens, which are written to the cache and attend to it.

        Args:
            tokens: ids [B, T].
            positions: of the tokens, consecutive, the same for every sequence [T]. They are data: one compiled step
                serves all of them.
            cache: with all earlier tokens.
            num_slots: how far the cache is read, which is up to the last of the tokens. None reads all of it by a mask:
                the same operations at every position, as compiling and capturing want them.

        Returns:
            After the final norm [B, T, D].
        """
        x = self.embed(tokens)
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


def load_model(
    folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, mtp: bool = False
) -> Decoder:
    """Loads a folder.

    Args:
        folder: with config.json and safetensors, as `export` writes it.
        device: where to.
        dtype: of activations and of all weights that are not packed; None takes the type that the folder is stored in.
        mtp: whether MTP layers are loaded too, to draft tokens with.

    Raises:
        FolderError: a file is missing, or the folder asks for what is not computed, or has no MTP layers to load.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FolderError(f"{folder} is no folder: give one that `export` wrote, with config.json in it")
    config = read_config(folder)
    if mtp and not config.num_nextn_predict_layers:
        raise FolderError(
            "config.json: num_nextn_predict_layers = 0: there are no MTP layers to draft tokens with; export a model "
            "that was trained with them to the layout 'mimo'"
        )
    weights = Weights(folder, config, device, dtype or getattr(torch, config.dtype))
    return Decoder(config, weights, mtp).eval().requires_grad_(False)
