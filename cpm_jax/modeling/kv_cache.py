"""Keys and values of past tokens, and attention over them.

Slot and position are the same: a token at position p is written to slot p and attends to slots 0..p. Prompts of
different lengths are therefore padded on the right. Padding is best given positions beyond the cache, where it is not
written. In a float cache it may also fill slots: the real token of that position writes them again before any token can
see them.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from cpm_jax.common.config import ConfigError
from cpm_jax.common.sharding import activation_spec
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.quantized_cache import CACHE_BITS, QuantizedKVCache
from cpm_jax.modeling.sparse_cache import SparseKVCache, check_new_tokens, init_sparse_cache, sparse_cache_specs

# Slots that are scored together: bounds the scores to [B, N, T, 512].
KEY_BLOCK = 512

# What keys and values are held in; "" is the compute dtype.
CacheDType = Literal["", "float32", "bfloat16", "int8", "int4"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Rotated keys, and values, of every layer; slot = position.

    Attributes:
        keys: [L, B, K, S, H]: the slots of a head lie together, in the order in which attention reads them.
        values: [L, B, K, S, H].
    """

    keys: Float[Array, "L B K S H"]
    values: Float[Array, "L B K S H"]

    @property
    def length(self) -> int:
        """Number of slots, S."""
        return self.keys.shape[3]

    @property
    def num_slots(self) -> int:
        """The same; caches that hold groups of slots may have room for more."""
        return self.length

    def write(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        layer: int | Int[Array, ""],
    ) -> "KVCache":
        """Writes keys and values to the slots of their positions; positions beyond the cache are not written."""
        rows = jnp.arange(k.shape[0])[:, None]
        return KVCache(
            self.keys.at[layer, rows, :, positions].set(k.astype(self.keys.dtype), mode="drop"),
            self.values.at[layer, rows, :, positions].set(v.astype(self.values.dtype), mode="drop"),
        )

    def read(
        self, layer: int | Int[Array, ""], first: int | Int[Array, ""], size: int, dtype: jnp.dtype
    ) -> tuple[Float[Array, "B K size H"], Float[Array, "B K size H"]]:
        """Keys and values of `size` slots of a layer from `first` on."""
        _, batch, heads, _, head_size = self.keys.shape
        keys, values = (
            jax.lax.dynamic_slice(x, (layer, 0, 0, first, 0), (1, batch, heads, size, head_size))[0].astype(dtype)
            for x in (self.keys, self.values)
        )
        return keys, values


# The kind that `init_cache` makes is the kind of attention: sparse where the model's config says so.
DenseCache = KVCache | QuantizedKVCache
Cache = DenseCache | SparseKVCache


def init_cache(config: ModelConfig, batch_size: int, length: int, dtype: CacheDType = "") -> Cache:
    """An empty cache of `length` slots for each of `batch_size` sequences.

    Args:
        config: of the model.
        batch_size: B.
        length: S, the most tokens of a prompt and its continuation together. LongRoPE chooses its factors by it, and
            `config.sparse_config` whether attention is sparse.
        dtype: of keys and values: "int8" and "int4" hold codes and scales, "" takes the compute dtype.

    Raises:
        ConfigError: codes are asked for, and attention is sparse at this length.
    """
    sparse = config.sparse_config
    if sparse is not None and sparse.applies(length):
        if dtype in CACHE_BITS:
            raise ConfigError(
                f"cache_dtype = {dtype!r}: a cache of {length} slots attends sparsely (SparseConfig.dense_len = "
                f"{sparse.dense_len}), and sparse attention reads keys and values as float32 or bfloat16: take one of "
                "these",
                field="cache_dtype",
            )
        return init_sparse_cache(config, sparse, batch_size, length, dtype or config.dtype)
    shape = (config.num_layers, batch_size, config.num_kv_heads, length, config.head_size)

    @jax.jit  # so that each device of a mesh in scope makes its own part only
    def make() -> DenseCache:
        if dtype in CACHE_BITS:
            return _constrain(QuantizedKVCache.empty(shape, CACHE_BITS[dtype], config.dtype))
        return _constrain(KVCache(jnp.zeros(shape, dtype or config.dtype), jnp.zeros(shape, dtype or config.dtype)))

    return make()


def cache_specs(cache: Cache) -> Any:
    """A tree of how a cache lies on a mesh in scope: divided by sequences and, as far as they go round, heads.

    None outside a mesh, as `activation_spec`.
    """
    if isinstance(cache, SparseKVCache):
        return sparse_cache_specs(cache)
    spec = activation_spec(("batch", "kv_heads"), cache.keys.shape[1:3])
    return None if spec is None else jax.tree.map(lambda _: PartitionSpec(None, *spec), cache)


def _constrain(cache: DenseCache) -> DenseCache:
    specs = cache_specs(cache)
    return cache if specs is None else jax.tree.map(jax.lax.with_sharding_constraint, cache, specs)


def attend_to_cache(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    cache: DenseCache,
    layer: int | Int[Array, ""],
) -> tuple[Float[Array, "B T N H"], DenseCache]:
    """Writes new keys and values to the slots of their positions, then attends to all slots up to each query's own.

    Positions beyond the cache are not written. Softmax and sums are in float32. Several queries read slots a block at a
    time and only as far as any of them sees, with the running softmax of flash attention (arXiv 2205.14135): a prompt
    in a cache that is mostly empty costs no more than what is in it. Single queries do so where the cache is quantised,
    of which no more than a block is ever in float.

    Raises:
        ValueError: more new tokens than the cache has slots.
    """
    check_new_tokens(q.shape[1], cache.length)
    cache = _constrain(cache.write(k, v, positions, layer))
    batch, length, _, size = q.shape
    num_kv_heads, num_slots = k.shape[2], cache.num_slots
    block = min(KEY_BLOCK, num_slots)
    if length == 1 and isinstance(cache, KVCache):
        block = num_slots  # Scores of one query are small, and no loop's length depends on data.
    # The queries of a group share their keys: [B, K, G·T, H] times [B, K, block, H].
    queries = q.reshape(batch, length, num_kv_heads, -1, size).transpose(0, 2, 3, 1, 4)
    queries = queries.reshape(batch, num_kv_heads, -1, size)
    limits = jnp.tile(positions, (1, queries.shape[2] // length))[:, None, :, None]

    def add_block(index: Array | int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        maximum, total, attended = carry
        first = jnp.minimum(index * block, num_slots - block)  # The last block may overlap the one before it.
        keys, values = cache.read(layer, first, block, q.dtype)
        slots = first + jnp.arange(block)
        scores = jnp.einsum("bkqh,bksh->bkqs", queries, keys, preferred_element_type=jnp.float32) * size**-0.5
        scores = jnp.where((slots <= limits) & (slots >= index * block), scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1, keepdims=True))
        weights, shrink = jnp.exp(scores - new_maximum), jnp.exp(maximum - new_maximum)
        product = jnp.einsum("bkqs,bksh->bkqh", weights.astype(q.dtype), values, preferred_element_type=jnp.float32)
        return new_maximum, total * shrink + weights.sum(axis=-1, keepdims=True), attended * shrink + product

    # Slot 0 is visible to every query, so that the maximum is finite from the first block on.
    start = (
        jnp.full((*queries.shape[:3], 1), -jnp.inf),
        jnp.zeros((*queries.shape[:3], 1)),
        jnp.zeros(queries.shape, jnp.float32),
    )
    if block == num_slots:
        _, total, attended = add_block(0, start)
    else:
        filled = jnp.where(positions < cache.length, positions + 1, 1).max()
        _, total, attended = jax.lax.fori_loop(0, (filled + block - 1) // block, add_block, start)
    heads = (attended / total).astype(q.dtype).reshape(batch, num_kv_heads, -1, length, size)
    return heads.transpose(0, 3, 1, 2, 4).reshape(q.shape), cache
