"""InfLLM v2 in PyTorch: semantic kernels, the choice of blocks, attention over them (arXiv 2509.24663, section 3).

A query sees the kernels that end at or before its position. Each head's softmax over them is added up over the heads
that share a key/value head; a block has the largest score of the kernels that touch it; initial and local blocks come
before all others, and the best are attended to. Nothing here depends on values of tensors, so that a step of decoding
is one graph.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from export.torch_runtime.config import SparseConfig


def num_kernels(num_keys: int, size: int, stride: int) -> int:
    """How many kernels lie wholly within the first `num_keys` keys."""
    return max(0, (num_keys - size) // stride + 1)


def write_kernels(kernels: Tensor, keys: Tensor, positions: Tensor, size: int, stride: int) -> None:
    """Writes the kernels whose last key is among the new ones, from the keys in the cache.

    What follows the last of these is written again when its own last key is; until then no query sees it.

    Args:
        kernels: [B, K, J + 1, H] for the J kernels of the cache; what would lie behind them goes to the last place.
        keys: of the cache [B, K, S, H].
        positions: of the new keys, which are in the cache, consecutive [T].
        size: keys in a kernel.
        stride: keys from one kernel's start to the next one's.
    """
    number = -(-positions.shape[0] // stride)  # at most so many are completed
    first = (-((size - 1 - positions[0]) // stride)).clamp(min=0)
    span = first * stride + torch.arange(stride * (number - 1) + size, device=keys.device)
    read = keys.index_select(2, span.clamp(max=keys.shape[2] - 1))
    means = read.unfold(2, size, stride).float().mean(dim=-1).to(kernels.dtype)
    places = (first + torch.arange(number, device=keys.device)).clamp(max=kernels.shape[2] - 1)
    kernels.index_copy_(2, places, means)


def _scores(q: Tensor, kernels: Tensor, scale: float, positions: Tensor, size: int, stride: int) -> Tensor:
    """Scores of kernels in float32, -inf of those that a query does not see [B, K, G, T, J].

    Args:
        q: [B, T, N, H].
        kernels: [B, K, J, H].
        scale: factor on the scores.
        positions: of the queries [T].
        size: keys in a kernel.
        stride: keys from one kernel's start to the next one's.
    """
    grouped = q.unflatten(2, (kernels.shape[1], -1)).permute(0, 2, 3, 1, 4).float()  # [B, K, G, T, H]
    scores = torch.einsum("bkgth,bkjh->bkgtj", grouped, kernels.float()) * scale
    last = torch.arange(kernels.shape[2], device=q.device) * stride + size - 1
    return scores.masked_fill(last > positions[:, None], -math.inf)


def block_scores(
    q: Tensor,
    kernels: Tensor,
    coarse: Tensor | None,
    positions: Tensor,
    num_slots: int,
    scale: float,
    sparse: SparseConfig,
) -> Tensor:
    """The largest weight of the kernels that touch each block, summed over the heads of a group; 0 where none is seen.

    Args:
        q: [B, T, N, H].
        kernels: [B, K, J, H], J at least 1; those that end behind a query are passed over.
        coarse: the kernels of which the softmax's normaliser is taken [B, K, J2, H]; None takes it of `kernels`.
        positions: of the queries [T].
        num_slots: keys that there are.
        scale: factor on the scores.
        sparse: sizes.

    Returns:
        float32 [B, K, T, C], C the blocks of `num_slots`.
    """
    size, stride = sparse.kernel_size, sparse.kernel_stride
    scores = _scores(q, kernels, scale, positions, size, stride)
    normalising = scores if coarse is None else _scores(q, coarse, scale, positions, *sparse.coarse)
    normaliser = normalising.logsumexp(dim=-1, keepdim=True)
    # A query that sees nothing to normalise by has no scores.
    weights = (scores - normaliser).exp().masked_fill(normaliser == -math.inf, 0.0).sum(dim=2)  # [B, K, T, J]
    # Block c is touched by kernels [per_block · c - before, per_block · (c + 1)).
    per_block, before = sparse.block_size // stride, -(-size // stride) - 1
    width = -(-num_slots // sparse.block_size) * per_block
    padded = functional.pad(weights[..., :width], (before, max(width - weights.shape[-1], 0)))
    return padded.unfold(-1, per_block + before, per_block).amax(dim=-1)


def rank_blocks(scores: Tensor, positions: Tensor, sparse: SparseConfig) -> Tensor:
    """Chooses the blocks of each query and key/value head, of equal scores the lowest first.

    Args:
        scores: from `block_scores` [B, K, T, C].
        positions: of the queries [T].
        sparse: which come before all others, and how many there are.

    Returns:
        int64 [B, K, T, I], I = min(`sparse.num_selected`, C); -1 where a query has fewer.
    """
    num_blocks = scores.shape[-1]
    block = torch.arange(num_blocks, device=scores.device)
    own = (positions // sparse.block_size)[:, None]
    forced = (block < sparse.init_blocks) | (block > own - sparse.num_local)
    ranked = scores.masked_fill(forced, math.inf).masked_fill(block > own, -math.inf)
    # A stable sort, as `topk` does not say which of equal ones it takes.
    best, ids = ranked.sort(dim=-1, descending=True, stable=True)
    chosen = min(sparse.num_selected, num_blocks)
    return ids[..., :chosen].masked_fill(best[..., :chosen] == -math.inf, -1)


def attend_to_blocks(
    q: Tensor, keys: Tensor, values: Tensor, block_ids: Tensor, positions: Tensor, scale: float, block_size: int
) -> Tensor:
    """Attention of many queries over chosen blocks, by a mask over all slots.

    Args:
        q: [B, T, N, H].
        keys: [B, K, S, H].
        values: [B, K, S, H].
        block_ids: from `rank_blocks` [B, K, T, I].
        positions: of the queries [T].
        scale: factor on the scores.
        block_size: keys in a block.

    Returns:
        [B, T, N, H].
    """
    num_slots, kv_heads = keys.shape[2], keys.shape[1]
    num_blocks = -(-num_slots // block_size)
    # One place more, for the -1 that fills a list.
    chosen = torch.zeros(*block_ids.shape[:3], num_blocks + 1, dtype=torch.bool, device=q.device)
    chosen.scatter_(3, block_ids.masked_fill(block_ids < 0, num_blocks), True)
    slots = torch.arange(num_slots, device=q.device)
    causal = slots <= positions[:, None]
    grouped = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    attended = []
    for head in range(kv_heads):  # so that one mask of T·S is held at a time
        mask = (chosen[:, head][..., slots // block_size] & causal).unsqueeze(1)
        k, v = (x[:, head : head + 1].expand(-1, grouped.shape[2], -1, -1) for x in (keys, values))
        attended.append(functional.scaled_dot_product_attention(grouped[:, head], k, v, mask, scale=scale))
    return torch.stack(attended, dim=1).permute(0, 3, 1, 2, 4).flatten(2, 3)


def gather_and_attend(
    q: Tensor, keys: Tensor, values: Tensor, block_ids: Tensor, positions: Tensor, scale: float, block_size: int
) -> Tensor:
    """As `attend_to_blocks` for few queries, each of which fetches its blocks from where they lie.

    The number of slots is a multiple of `block_size`.
    """
    kv_heads, device = keys.shape[1], q.device
    ids = block_ids.clamp(min=0)  # [B, K, T, I]
    rows = torch.arange(q.shape[0], device=device)[:, None, None, None]
    groups = torch.arange(kv_heads, device=device)[:, None, None]

    def fetch(cache: Tensor) -> Tensor:
        blocks = cache.unflatten(2, (-1, block_size))[rows, groups, ids]  # [B, K, T, I, block, H]
        return blocks.flatten(3, 4).flatten(1, 2)  # [B, K · T, I · block, H]

    slots = (ids[..., None] * block_size + torch.arange(block_size, device=device)).flatten(3)
    known = (block_ids >= 0).repeat_interleave(block_size, dim=3)
    mask = (known & (slots <= positions[:, None])).flatten(1, 2).unsqueeze(2)  # [B, K · T, 1, I · block]
    # The heads that share keys are so many queries of one head.
    grouped = q.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(1, 2)  # [B, K · T, G, H]
    out = functional.scaled_dot_product_attention(grouped, fetch(keys), fetch(values), mask, scale=scale)
    return out.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
