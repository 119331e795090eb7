"""The static cache: keys and values of all past tokens, and for sparse attention the means that stand for them.

Slot and position are the same. Everything is made once for the longest sequence, so that a step of decoding reads and
writes the same memory every time, as CUDA graphs need it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from export.torch_runtime.config import ModelConfig, SparseConfig
from export.torch_runtime.infllm import num_kernels
from export.torch_runtime.rope import rotary_table


class LengthError(ValueError):
    """More tokens than the cache, or the model, has room for."""


@dataclass
class LayerCache:
    """What one layer keeps.

    Attributes:
        keys: rotated keys [B, K, S, H].
        values: [B, K, S, H].
        selecting: keys before rotation, of which kernels are made under `use_nope` [B, K, S, H]; else None.
        kernels: means of keys by which blocks are chosen [B, K, J + 1, H]; None where attention is dense.
        coarse_kernels: means by which scores are normalised [B, K, J2 + 1, H]; None where that is exact.
    """

    keys: Tensor
    values: Tensor
    selecting: Tensor | None = None
    kernels: Tensor | None = None
    coarse_kernels: Tensor | None = None

    def write(
        self,
        k: Tensor,
        v: Tensor,
        selecting: Tensor,
        positions: Tensor,
        sparse: SparseConfig | None,
        write_kernels: Callable[[Tensor, Tensor, Tensor, int, int], None],
    ) -> None:
        """Writes new tokens to the slots of their positions, and the kernels that they complete.

        Args:
            k: rotated keys [B, T, K, H].
            v: values [B, T, K, H].
            selecting: keys of which kernels are made [B, T, K, H].
            positions: consecutive [T].
            sparse: sizes of kernels; None where attention is dense.
            write_kernels: `infllm.write_kernels`, or what does the same.
        """
        self.keys.index_copy_(2, positions, k.transpose(1, 2))
        self.values.index_copy_(2, positions, v.transpose(1, 2))
        if sparse is None:
            return
        if self.selecting is not None:
            self.selecting.index_copy_(2, positions, selecting.transpose(1, 2))
        source = self.keys if self.selecting is None else self.selecting
        if self.kernels is not None:
            write_kernels(self.kernels, source, positions, sparse.kernel_size, sparse.kernel_stride)
        if self.coarse_kernels is not None:
            write_kernels(self.coarse_kernels, source, positions, *sparse.coarse)


@dataclass
class DraftCache:
    """What drafting by MTP layers keeps; see `speculative`.

    Attributes:
        layers: of each MTP layer.
        hidden: the model's hidden states at the last positions, that of position p in place p modulo R [B, R, D].
        tokens: ids of all tokens by their positions, and behind them the drafts [B, S].
    """

    layers: list[LayerCache]
    hidden: Tensor
    tokens: Tensor


@dataclass
class Cache:
    """What a model keeps of past tokens.

    Attributes:
        length: tokens that fit.
        num_slots: S, at least `length`: whole blocks where attention is sparse, with room for drafts.
        sparse: by what blocks are chosen; None where attention is dense.
        rotary: cosines and sines of all positions [length or more, 2, H/2].
        layers: of each layer.
        drafts: what MTP layers keep; None where none draft.
    """

    length: int
    num_slots: int
    sparse: SparseConfig | None
    rotary: Tensor
    layers: list[LayerCache]
    drafts: DraftCache | None = None


def init_cache(
    config: ModelConfig,
    batch_size: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device | str,
    num_mtp_layers: int = 0,
) -> Cache:
    """An empty cache.

    Args:
        config: of the model.
        batch_size: B.
        length: tokens of a prompt and its continuation together. It decides for the whole sequence whether attention is
            sparse and which of LongRoPE's lists is taken.
        dtype: of keys and values.
        device: where it lies.
        num_mtp_layers: M, layers that draft; there is room for 3 · M drafts and passes over them behind `length`.

    Raises:
        LengthError: the model has no positions for so many tokens.
    """
    if not 1 <= length <= config.max_position_embeddings:
        raise LengthError(
            f"a cache of {length} tokens: accepted are 1 to max_position_embeddings = {config.max_position_embeddings}"
        )
    sparse = config.sparse if config.sparse is not None and config.sparse.applies(length) else None
    room = length + 3 * num_mtp_layers
    num_slots = room if sparse is None else -(-room // sparse.block_size) * sparse.block_size

    def zeros(places: int) -> Tensor:
        return torch.zeros(batch_size, config.num_kv_heads, places, config.head_dim, dtype=dtype, device=device)

    def layer() -> LayerCache:
        if sparse is None:
            return LayerCache(zeros(num_slots), zeros(num_slots))
        kernels = num_kernels(num_slots, sparse.kernel_size, sparse.kernel_stride)
        return LayerCache(
            zeros(num_slots),
            zeros(num_slots),
            zeros(num_slots) if sparse.use_nope else None,
            zeros(kernels + 1),
            zeros(num_kernels(num_slots, *sparse.coarse) + 1) if sparse.lse_approximation else None,
        )

    # The length that decides about frequencies is that of the sequence, not of its slots.
    rotary = rotary_table(config.rope, config.head_dim, length, device, room)
    drafts = None
    if num_mtp_layers:
        hidden = torch.zeros(batch_size, 3 * num_mtp_layers, config.hidden_size, dtype=dtype, device=device)
        tokens = torch.zeros(batch_size, num_slots, dtype=torch.long, device=device)
        drafts = DraftCache([layer() for _ in range(num_mtp_layers)], hidden, tokens)
    return Cache(length, num_slots, sparse, rotary, [layer() for _ in range(config.num_layers)], drafts)
