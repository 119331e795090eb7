"""Named shapes of real models, over which the tests and benchmarks of block-sparse attention run."""

import math
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class ArgSpec:
    """Arguments of one call of block-sparse attention.

    Attributes:
        batch_size: B.
        seq_len: T.
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        dtype: of q, k and v.
        block_size: keys of a block.
        num_selected: most blocks that a query chooses; I is that, or the number of blocks where they are fewer.
    """

    batch_size: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    block_size: int = 64
    num_selected: int = 96

    def abstract_args(self, **kwargs: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns q, k, v, block_ids and segment_ids without their values; `kwargs` go to ShapeDtypeStruct."""
        q = (self.batch_size, self.seq_len, self.num_heads, self.head_dim)
        kv = (self.batch_size, self.seq_len, self.num_kv_heads, self.head_dim)
        chosen = min(self.num_selected, math.ceil(self.seq_len / self.block_size))
        ids = (self.batch_size, self.num_kv_heads, self.seq_len, chosen)
        args = [jax.ShapeDtypeStruct(shape, self.dtype, **kwargs) for shape in (q, kv, kv)]
        return *args, *(jax.ShapeDtypeStruct(shape, "int32", **kwargs) for shape in (ids, q[:2]))


ARG_SPECS: dict[str, ArgSpec] = {
    **{f"minicpm4_8b_{n}k": ArgSpec(1, n * 1024, 32, 2, 128) for n in (4, 32, 128)},
    **{f"minicpm4_0.5b_{n}k": ArgSpec(1, n * 1024, 16, 2, 64) for n in (4, 32, 128)},
    "f32_4k": ArgSpec(1, 4096, 32, 2, 128, dtype="float32"),
    "one_head_each_2k": ArgSpec(2, 2048, 4, 4, 64, num_selected=8),
    "odd_tiny": ArgSpec(2, 77, 6, 2, 16, dtype="float32", block_size=16, num_selected=3),
}
