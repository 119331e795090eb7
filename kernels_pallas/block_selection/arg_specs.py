"""Named shapes of real models, over which the tests and benchmarks of block selection run."""

from dataclasses import dataclass, field
from typing import Any

import jax

from kernels_pallas.block_selection.selection import BlockSelection, num_kernels


@dataclass(frozen=True)
class ArgSpec:
    """Arguments of one call of block selection.

    Attributes:
        batch_size: B.
        seq_len: T.
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        dtype: of queries and compressed keys.
        selection: sizes and numbers of blocks.
    """

    batch_size: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    selection: BlockSelection = field(default_factory=BlockSelection)

    def abstract_args(self, **kwargs: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns q, k_compressed, k_coarse and segment_ids without values; `kwargs` go to ShapeDtypeStruct."""
        sizes = (
            (self.selection.kernel_size, self.selection.kernel_stride),
            (self.selection.coarse_kernel_size, self.selection.coarse_kernel_stride),
        )
        heads = self.num_kv_heads, self.head_dim
        shapes = [(self.batch_size, self.seq_len, self.num_heads, self.head_dim)]
        shapes += [(self.batch_size, num_kernels(self.seq_len, *size), *heads) for size in sizes]
        args = [jax.ShapeDtypeStruct(shape, self.dtype, **kwargs) for shape in shapes]
        return *args, jax.ShapeDtypeStruct((self.batch_size, self.seq_len), "int32", **kwargs)


_SMALL = BlockSelection(kernel_size=8, kernel_stride=4, block_size=16, window_size=32, topk=2)
ARG_SPECS: dict[str, ArgSpec] = {
    **{f"minicpm4_8b_{n}k": ArgSpec(1, n * 1024, 32, 2, 128) for n in (4, 32, 128)},
    **{f"minicpm4_0.5b_{n}k": ArgSpec(1, n * 1024, 16, 2, 64) for n in (4, 32, 128)},
    "f32_4k": ArgSpec(1, 4096, 32, 2, 128, dtype="float32"),
    "one_head_each_2k": ArgSpec(2, 2048, 4, 4, 64),
    "odd_tiny": ArgSpec(2, 77, 6, 2, 16, dtype="float32", selection=_SMALL),
}
