"""The selection of InfLLM v2 written from its equations, with every score in memory. Slow, and obviously right.

The equations (InfLLM-V2, section 3): per head a softmax over the kernels that a query may see; the sum over the heads
of a group; of the kernels that touch a block the largest; initial and local blocks before all others; the best |I|.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.block_selection.selection import BlockSelection


def block_scores(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B J K H"],
    k_coarse: Float[Array, "B J2 K H"] | None,
    scale: float,
    selection: BlockSelection,
    query_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
    num_blocks: int,
) -> Float[Array, "B K T C"]:
    """See `kernels_pallas.block_selection.api.block_scores`."""
    scores = _kernel_scores(q, k_compressed, scale)  # [B, K, G, T, J]
    visible = _visible_kernels(
        scores.shape[-1], selection.kernel_size, selection.kernel_stride, query_positions, document_starts
    )
    if k_coarse is None:
        normaliser = jax.nn.logsumexp(scores, axis=-1, where=visible, keepdims=True)
    else:
        coarse = _kernel_scores(q, k_coarse, scale)
        sizes = selection.coarse_kernel_size, selection.coarse_kernel_stride
        visible_coarse = _visible_kernels(coarse.shape[-1], *sizes, query_positions, document_starts)
        normaliser = jax.nn.logsumexp(coarse, axis=-1, where=visible_coarse, keepdims=True)
    # A query that sees nothing to normalise by has no scores: its normaliser is -inf, and exp(s + inf) is not one.
    visible &= normaliser > -jnp.inf
    probabilities = jnp.where(visible, jnp.exp(scores - normaliser), 0.0)
    grouped = probabilities.sum(axis=2)
    blocks = []
    for c in range(num_blocks):
        first = selection.kernels_per_block * c - selection.pool_padding
        touching = grouped[..., max(first, 0) : first + selection.pool_size]
        blocks.append(touching.max(axis=-1, initial=0.0))
    pooled = jnp.stack(blocks, axis=-1)
    first_block, last_block = _block_range(selection, query_positions, document_starts)
    block = jnp.arange(num_blocks)
    return jnp.where((first_block <= block) & (block <= last_block), pooled, -jnp.inf)


def select_blocks(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B J K H"],
    k_coarse: Float[Array, "B J2 K H"] | None,
    scale: float,
    selection: BlockSelection,
    query_positions: Int[Array, "B T"],
    document_starts: Int[Array, "B T"],
    num_blocks: int,
) -> Int[Array, "B K T I"]:
    """See `kernels_pallas.block_selection.api.select_blocks`."""
    scores = block_scores(
        q, k_compressed, k_coarse, scale, selection, query_positions, document_starts, num_blocks
    )  # [B, K, T, C]
    first_block, last_block = _block_range(selection, query_positions, document_starts)
    block = jnp.arange(num_blocks)
    forced = (block < first_block + selection.init_blocks) | (block > last_block - selection.num_local)
    ranked = jnp.where(forced & (scores > -jnp.inf), jnp.inf, scores)
    # A stable sort of the negated scores: of equal ones the lowest block first.
    best = jnp.argsort(-ranked, axis=-1, stable=True)[..., : min(selection.num_selected, num_blocks)]
    seen = jnp.take_along_axis(ranked, best, axis=-1) > -jnp.inf
    ascending = jnp.sort(jnp.where(seen, best, num_blocks), axis=-1)
    return jnp.where(ascending < num_blocks, ascending, -1).astype(jnp.int32)


def _kernel_scores(
    q: Float[Array, "B T N H"], kernels: Float[Array, "B J K H"], scale: float
) -> Float[Array, "B K G T J"]:
    q = q.reshape(*q.shape[:2], kernels.shape[2], -1, q.shape[3]).astype(jnp.float32)
    return scale * jnp.einsum("btkgh,bjkh->bkgtj", q, kernels.astype(jnp.float32))


def _visible_kernels(
    number: int, size: int, stride: int, query_positions: Array, document_starts: Array
) -> Array:  # [B, 1, 1, T, J]
    """A query sees the kernels whose keys are all of its document and none after it."""
    first = stride * jnp.arange(number)
    last = first + size - 1
    return ((document_starts[..., None] <= first) & (last <= query_positions[..., None]))[:, None, None]


def _block_range(
    selection: BlockSelection, query_positions: Array, document_starts: Array
) -> tuple[Array, Array]:  # each [B, 1, T, 1]
    """The first and the last block that hold a key which the query may see."""
    first, last = document_starts // selection.block_size, query_positions // selection.block_size
    return first[:, None, :, None], last[:, None, :, None]
