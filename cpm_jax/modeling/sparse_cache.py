"""Sparse attention over a cache: beside keys and values it keeps the semantic kernels by which blocks are chosen.

A kernel is written when its last key is, from the keys in the cache, so that a slot that padding filled leaves no trace
in the kernels once the real token of that position is written; until then no query sees them. Prefill at once, in
chunks of any length and token by token therefore give the same kernels, and with them the same blocks.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from cpm_jax.common.sharding import activation_spec
from cpm_jax.modeling.attention import Selectors
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from kernels_pallas.block_selection.api import select_blocks
from kernels_pallas.block_selection.selection import num_kernels
from kernels_pallas.block_sparse_attention.api import block_sparse_attention
from kernels_pallas.compress_keys.api import compress_keys
from kernels_pallas.sparse_decode_attention.api import sparse_decode_attention

# New tokens of a row from which on they share the reading of blocks. To share, the keys of a layer are laid out as of a
# row; below, each query fetches its own blocks from where they lie.
SHARING_QUERIES = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseKVCache:
    """What sparse attention keeps of past tokens in every layer; slot = position, as in `KVCache`.

    Attributes:
        keys: rotated keys [L, B, K, S, H].
        values: [L, B, K, S, H].
        selecting: keys before rotation, from which kernels are made under `use_nope` [L, B, K, S, H]; else None, as
            they are made from `keys`.
        kernels: means of `kernel_size` keys, one for every `kernel_stride` [L, B, J, K, H].
        coarse_kernels: the same four times as long and as far apart, by which scores are normalised [L, B, J2, K, H];
            None where they are normalised exactly.
        sparse: by what blocks are chosen.
    """

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]
    selecting: Float[Array, "L B K S H"] | None
    kernels: Float[Array, "L B J K H"]
    coarse_kernels: Float[Array, "L B J2 K H"] | None
    sparse: SparseConfig = field(metadata={"static": True})

    @property
    def length(self) -> int:
        """Number of slots, S."""
        return self.keys.shape[3]


def init_sparse_cache(
    config: ModelConfig, sparse: SparseConfig, batch_size: int, length: int, dtype: jnp.dtype | str
) -> SparseKVCache:
    """An empty cache of `length` slots, with all kernels that these will have; see `kv_cache.init_cache`."""
    layers, heads, size = config.num_layers, config.num_kv_heads, config.head_size
    shape = (layers, batch_size, heads, length, size)
    sizes = sparse.selection

    def kernels(kernel_size: int, stride: int) -> Array:
        return jnp.zeros((layers, batch_size, num_kernels(length, kernel_size, stride), heads, size), dtype)

    @jax.jit  # so that each device of a mesh in scope makes its own part only
    def make() -> SparseKVCache:
        cache = SparseKVCache(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            selecting=jnp.zeros(shape, dtype) if sparse.use_nope else None,
            kernels=kernels(sizes.kernel_size, sizes.kernel_stride),
            coarse_kernels=kernels(sizes.coarse_kernel_size, sizes.coarse_kernel_stride)
            if sparse.lse_approximation
            else None,
            sparse=sparse,
        )
        specs = sparse_cache_specs(cache)
        return cache if specs is None else jax.tree.map(jax.lax.with_sharding_constraint, cache, specs)

    return make()


def check_new_tokens(number: int, length: int) -> None:
    """Refuses to write more tokens of a sequence at once than a cache has slots.

    Single positions beyond the cache are not looked at: padding may have them, and they are not written.

    Args:
        number: T, new tokens of each sequence.
        length: S, slots of the cache.

    Raises:
        ValueError: the cache is too short; names both.
    """
    if number > length:
        raise ValueError(
            f"{number} new tokens in a cache of {length} slots: at most {length} fit; make the cache longer "
            "(init_cache), or read fewer tokens at once"
        )


def sparse_cache_specs(cache: SparseKVCache) -> Any:
    """A tree of how the cache lies on a mesh in scope: divided by sequences and, as far as they go round, heads.

    None outside a mesh, as `activation_spec`.
    """
    spec = activation_spec(("batch", "kv_heads"), cache.keys.shape[1:3])
    if spec is None:
        return None
    rows, heads = spec
    slots, kernels = PartitionSpec(None, rows, heads), PartitionSpec(None, rows, None, heads)
    specs = {"keys": slots, "values": slots, "selecting": slots, "kernels": kernels, "coarse_kernels": kernels}
    held: dict[str, Any] = {name: spec for name, spec in specs.items() if getattr(cache, name) is not None}
    return dataclasses.replace(cache, **held)


def attend_to_sparse_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    selectors: Selectors,
    positions: Int[Array, "B T"],
    cache: SparseKVCache,
    layer: int | Int[Array, ""],
) -> tuple[Float[Array, "B T N H"], SparseKVCache]:
    """Writes new keys, values and the kernels that they complete, then attends to the blocks that each query chooses.

    On a mesh each device does so for its sequences and key/value heads.

    Args:
        q: rotated queries of new tokens.
        k: their rotated keys.
        v: their values.
        selectors: queries and keys by which blocks are chosen.
        positions: position of each token, consecutive within a row. Tokens beyond the cache are not written.
        cache: of all layers.
        layer: which one.

    Raises:
        ValueError: more new tokens than the cache has slots.
    """
    check_new_tokens(q.shape[1], cache.length)
    sparse = cache.sparse

    def attend(
        q: Array, k: Array, v: Array, selectors: Selectors, positions: Array, cache: SparseKVCache, layer: Array
    ) -> tuple[Array, SparseKVCache]:
        cache = _write(k, v, selectors[1], positions, cache, layer)
        coarse = None if cache.coarse_kernels is None else cache.coarse_kernels[layer]
        block_ids = select_blocks(
            selectors[0], cache.kernels[layer], coarse, selection=sparse.selection, query_positions=positions
        )
        size = sparse.block_size
        # It tells the number of slots by that of kernels, which is the same for a few of them.
        block_ids = block_ids[..., : math.ceil(cache.length / size)]
        if q.shape[1] < SHARING_QUERIES:
            return sparse_decode_attention(
                q, cache.keys, cache.values, block_ids, positions, block_size=size, layer=layer
            ), cache
        keys, values = (jnp.swapaxes(x[layer], 1, 2).astype(q.dtype) for x in (cache.keys, cache.values))
        return block_sparse_attention(q, keys, values, block_ids, block_size=size, query_positions=positions), cache

    specs = sparse_cache_specs(cache)
    if specs is not None:
        _, rows, heads = specs.keys
        new, tokens = PartitionSpec(rows, None, heads), PartitionSpec(rows, None)
        attend = jax.shard_map(
            attend,
            in_specs=(new, new, new, (new, new), tokens, specs, PartitionSpec()),
            out_specs=(new, specs),
            check_vma=False,
        )
    return attend(q, k, v, selectors, positions, cache, jnp.int32(layer))


def _write(k: Array, v: Array, selecting: Array, positions: Array, cache: SparseKVCache, layer: Array) -> SparseKVCache:
    """Writes keys and values to the slots of their positions, and the kernels whose last key is among them."""
    rows = jnp.arange(k.shape[0])[:, None]

    def write(slots: Array, new: Array) -> Array:
        return slots.at[layer, rows, :, positions].set(new.astype(slots.dtype), mode="drop")

    keys, values = write(cache.keys, k), write(cache.values, v)
    unrotated = None if cache.selecting is None else write(cache.selecting, selecting)
    source = keys if unrotated is None else unrotated

    def complete(kernels: Array, size: int, stride: int) -> Array:
        number = -(-k.shape[1] // stride)  # at most so many are completed
        # The first kernel whose last key, stride·j + size - 1, is not before the first new position.
        first = jnp.maximum(-((size - 1 - positions[:, :1]) // stride), 0)  # [B, 1]
        span = stride * first + jnp.arange(stride * (number - 1) + size)
        read = source.at[layer, rows, :, span].get(mode="clip")  # [B, span, K, H]
        means = compress_keys(read, kernel_size=size, kernel_stride=stride)
        # What comes after the last completed one is written again when its own last key is.
        return kernels.at[layer, rows, first + jnp.arange(number)].set(means.astype(kernels.dtype), mode="drop")

    sizes, coarse = cache.sparse.selection, cache.coarse_kernels
    if coarse is not None:
        coarse = complete(coarse, sizes.coarse_kernel_size, sizes.coarse_kernel_stride)
    kernels = complete(cache.kernels, sizes.kernel_size, sizes.kernel_stride)
    return SparseKVCache(keys, values, unrotated, kernels, coarse, cache.sparse)
