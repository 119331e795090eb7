"""Named shapes of real models, over which the tests and benchmarks of sparse decoding run."""

import math
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class ArgSpec:
    """Arguments of one call of sparse decoding.

    Attributes:
        batch_size: B.
        cache_len: S, of one sequence.
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        dtype: of q and the caches.
        num_queries: T.
        block_size: keys of a block.
        num_selected: most blocks that a query chooses; I is that, or the number of blocks where they are fewer.
        page_size: keys of a page; None is a contiguous cache.
    """

    batch_size: int
    cache_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    num_queries: int = 1
    block_size: int = 64
    num_selected: int = 96
    page_size: int | None = None

    def abstract_args(self, **kwargs: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns q, k_cache, v_cache, block_ids, query_positions and, where paged, page_table without their values."""
        q = (self.batch_size, self.num_queries, self.num_heads, self.head_dim)
        cache: tuple[int, ...] = (self.batch_size, self.num_kv_heads, self.cache_len, self.head_dim)
        pages = math.ceil(self.cache_len / self.page_size) if self.page_size else 0
        if self.page_size:
            cache = (self.num_kv_heads, self.batch_size * pages, self.page_size, self.head_dim)
        chosen = min(self.num_selected, math.ceil(self.cache_len / self.block_size))
        ids = [(self.batch_size, self.num_kv_heads, self.num_queries, chosen), q[:2]]
        ids += [(self.batch_size, pages)] if self.page_size else []
        args = [jax.ShapeDtypeStruct(shape, self.dtype, **kwargs) for shape in (q, cache, cache)]
        return *args, *(jax.ShapeDtypeStruct(shape, "int32", **kwargs) for shape in ids)


ARG_SPECS: dict[str, ArgSpec] = {
    **{f"minicpm4_8b_{n}k": ArgSpec(1, n * 1024, 32, 2, 128) for n in (32, 128)},
    **{f"minicpm4_0.5b_{n}k": ArgSpec(1, n * 1024, 16, 2, 64) for n in (32, 128)},
    "minicpm4_8b_32k_paged": ArgSpec(4, 32_768, 32, 2, 128, page_size=64),
    "smollm2_135m_8k": ArgSpec(4, 8192, 9, 3, 64, dtype="float32", num_selected=24),
    "odd_tiny": ArgSpec(2, 77, 6, 2, 16, dtype="float32", num_queries=3, block_size=16, num_selected=3),
    "odd_tiny_paged": ArgSpec(
        2, 77, 6, 2, 16, dtype="float32", num_queries=3, block_size=8, num_selected=3, page_size=16
    ),
}
