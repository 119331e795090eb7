"""Named shapes of real models, over which the tests and benchmarks of attention run."""

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class ArgSpec:
    """Arguments of one call of attention.

    Attributes:
        batch_size: B.
        seq_len: T.
        num_heads: N.
        num_kv_heads: K.
        head_dim: H.
        dtype: of q, k and v.
        window: keys a query sees; None for all.
        packed: whether segment ids are given.
    """

    batch_size: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    window: int | None = None
    packed: bool = True

    def abstract_args(self, **kwargs: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Returns q, k, v and, where packed, segment_ids without their values; `kwargs` go to ShapeDtypeStruct."""
        q = (self.batch_size, self.seq_len, self.num_heads, self.head_dim)
        kv = (self.batch_size, self.seq_len, self.num_kv_heads, self.head_dim)
        args = [jax.ShapeDtypeStruct(shape, self.dtype, **kwargs) for shape in (q, kv, kv)]
        if self.packed:
            args.append(jax.ShapeDtypeStruct(q[:2], "int32", **kwargs))
        return tuple(args)


ARG_SPECS: dict[str, ArgSpec] = {
    "minicpm4_8b_4k": ArgSpec(1, 4096, 32, 2, 128),
    "minicpm4_8b_32k": ArgSpec(1, 32_768, 32, 2, 128),
    "minicpm4_0.5b_4k": ArgSpec(2, 4096, 16, 2, 64),
    "mimo_7b_4k": ArgSpec(1, 4096, 32, 8, 128),
    "smollm2_135m_2k": ArgSpec(4, 2048, 9, 3, 64),
    "window_4k": ArgSpec(1, 4096, 16, 2, 64, window=1024),
    "f32_1k": ArgSpec(1, 1024, 6, 2, 64, dtype="float32", packed=False),
    "odd_tiny": ArgSpec(2, 77, 4, 2, 16, dtype="float32"),
}
