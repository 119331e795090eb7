"""Causal attention on TPU: JAX's splash attention kernel behind our function.

The kernel takes one sequence and one key/value head with its G query heads; we map it over both. It needs lengths
that are multiples of 128: we pad at the end, where no real query looks, and cut the padding off.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kernels_pallas.attention.tuned_block_sizes import LANES, block_size


def unsupported_reason(q: Float[Array, "B T N H"], partition_spec: PartitionSpec | None) -> str | None:
    """Says why the kernel cannot serve these queries, or None if it can."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"q has dtype {q.dtype}: must be float32 or bfloat16"
    num_devices = jax.sharding.get_abstract_mesh().size
    if num_devices > 1 and partition_spec is None:
        return f"partition_spec = None on a mesh of {num_devices} devices: must say how q lies on them"
    return None


def dot_product_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
    window: int | None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """See `kernels_pallas.attention.api.dot_product_attention`.

    `interpret` runs the kernel's program step by step on any device, for tests.
    """
    batch_size, seq_len, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    padding = -seq_len % LANES
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    q = q.reshape(batch_size, seq_len + padding, num_kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, K, T, H]
    kernel = _make_kernel(seq_len + padding, num_heads // num_kv_heads, window, interpret)
    if segment_ids is None:
        out = jax.vmap(jax.vmap(kernel))(q, k, v)
    else:
        ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
        over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        out = jax.vmap(over_heads)(q, k, v, splash.SegmentIds(q=ids, kv=ids))
    return out.transpose(0, 3, 1, 2, 4).reshape(batch_size, -1, num_heads, head_dim)[:, :seq_len]


@functools.cache
def _make_kernel(length: int, groups: int, window: int | None, interpret: bool) -> Callable[..., Array]:
    """Returns the kernel for q [G, T, H], k and v [T, H] and, optionally, segment ids [T]."""
    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), offset=0)
    block = block_size(length)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    # The mask's tables are constants, also when the first call happens while another function is being traced.
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mqa_single_device(
            splash.MultiHeadMask([mask] * groups), block_sizes=sizes, interpret=interpret
        )
