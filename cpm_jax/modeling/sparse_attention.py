"""Sparse attention of whole rows by InfLLM v2: keys are compressed, blocks chosen, and attention runs over those.

The three steps are ops of `kernels_pallas`; here is how the model and a mesh use them. The algorithm is explained in
docs/sparse_attention.md.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from cpm_jax.common.sharding import activation_spec
from cpm_jax.modeling.attention import Selectors
from cpm_jax.modeling.config import SparseConfig
from kernels_pallas.attention.per_device import attend_per_device
from kernels_pallas.block_selection.api import select_blocks
from kernels_pallas.block_sparse_attention.api import block_sparse_attention
from kernels_pallas.compress_keys.api import compress_keys

# What the backward pass finds the chosen blocks by, whatever else it recomputes.
BLOCK_IDS = "block_ids"


def sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    selectors: Selectors,
    segment_ids: Int[Array, "B T"],
    sparse: SparseConfig,
) -> Float[Array, "B T N H"]:
    """Attends to the blocks that each query chooses among those of its document.

    On a mesh queries stay where they are, and a device gathers the whole rows of its key/value heads, 2·S·H values for
    each of them. Dense attention exchanges tokens for heads instead, as the end of a row has most of its work; here
    every query beyond the first few thousand reads equally many blocks.

    Args:
        q: rotated queries.
        k: rotated keys.
        v: values.
        selectors: queries and keys by which blocks are chosen.
        segment_ids: document of each token.
        sparse: sizes and numbers of blocks.
    """
    block_ids = choose_blocks(selectors, segment_ids, sparse)

    def attend(
        q: Array, k: Array, v: Array, segment_ids: Array, block_ids: Array, query_positions: Array | None
    ) -> Array:
        return block_sparse_attention(
            q,
            k,
            v,
            block_ids,
            block_size=sparse.block_size,
            query_positions=query_positions,
            segment_ids=segment_ids,
        )

    spec = activation_spec(("batch", "length", "heads", None), q.shape)
    return attend_per_device(attend, q, k, v, segment_ids, spec, block_ids)


def compress(
    k: Float[Array, "B S K H"], sparse: SparseConfig
) -> tuple[Float[Array, "B J K H"], Float[Array, "B J2 K H"] | None]:
    """The semantic kernels of keys, and the coarse ones where the normaliser is approximated by them."""
    fine = compress_keys(k, kernel_size=sparse.kernel_size, kernel_stride=sparse.kernel_stride)
    if not sparse.lse_approximation:
        return fine, None
    sizes = sparse.selection
    return fine, compress_keys(k, kernel_size=sizes.coarse_kernel_size, kernel_stride=sizes.coarse_kernel_stride)


def choose_blocks(selectors: Selectors, segment_ids: Int[Array, "B T"], sparse: SparseConfig) -> Int[Array, "B K T I"]:
    """The blocks of each query and key/value head, named BLOCK_IDS for rematerialisation; no gradient flows.

    On a mesh each device chooses for a part of the queries, over all kernels of its key/value heads. A group of heads
    chooses together, so that the queries are divided by what the key/value heads leave over.
    """
    q, k = jax.lax.stop_gradient(selectors)
    (batch, length), heads = q.shape[:2], k.shape[2]
    spec = activation_spec(("batch", "kv_heads", "query_length", None), (batch, heads, length, 1))

    def choose(q: Array, k: Array, segment_ids: Array, positions: Array | None) -> Array:
        return select_blocks(
            q, *compress(k, sparse), selection=sparse.selection, query_positions=positions, segment_ids=segment_ids
        )

    if spec is None:
        return checkpoint_name(choose(q, k, segment_ids, None), BLOCK_IDS)
    batch_axes, head_axes, length_axes, _ = spec
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    queries = PartitionSpec(batch_axes, length_axes, head_axes, None)
    keys, rows = PartitionSpec(batch_axes, None, head_axes, None), PartitionSpec(batch_axes, None)
    in_specs = queries, keys, rows, PartitionSpec(batch_axes, length_axes)
    chosen = jax.shard_map(choose, in_specs=in_specs, out_specs=spec, check_vma=False)(q, k, segment_ids, positions)
    return checkpoint_name(chosen, BLOCK_IDS)
