"""The GPU's forward pass by interpretation, its gradients, and what it does not serve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.block_sparse_attention import pallas_gpu, reference
from kernels_pallas.block_sparse_attention.api import block_sparse_attention
from tests.kernels_pallas.block_sparse_attention.test_block_sparse_attention import (
    inputs,
    new_tokens_of_a_cache,
    random_blocks,
)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "block_size", "number"),
    [(6, 2, 77, 16, 3), (16, 1, 40, 32, 2), (20, 1, 33, 16, 2), (2, 2, 9, 16, 1)],
)
def test_values_and_gradients(heads, kv_heads, length, block_size, number, packed):
    q, k, v, dout = inputs(length, heads, kv_heads, width=16, batch=2)
    ids = random_blocks(length, block_size, number, batch=2, kv_heads=kv_heads, own=False)
    ids = ids.at[:, :, length // 2].set(-1)  # a query that sees nothing
    segments = None
    if packed:
        segments = jnp.asarray(np.minimum(np.arange(length) // 7, 3)[None].repeat(2, 0).astype(np.int32))

    def both(attend):
        (out, lse), vjp = jax.vjp(lambda q, k, v: attend(q, k, v, ids, segments, block_size, 0.25), q, k, v)
        return out, lse, *vjp((dout, jnp.where(jnp.isfinite(lse), 0.1, 0.0)))

    ours = both(functools.partial(pallas_gpu.block_sparse_attention, interpret=True))
    for got, want in zip(ours, both(reference.block_sparse_attention), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_new_tokens_of_a_cache(packed):
    q, k, v, dout, ids, segments, positions = new_tokens_of_a_cache(16, 73, 16, packed=packed, width=16)
    positions = jnp.minimum(positions, 72)

    def both(attend):
        (out, lse), vjp = jax.vjp(lambda q, k, v: attend(q, k, v, ids, segments, 16, 0.25, positions), q, k, v)
        return out, lse, *vjp((dout, jnp.where(jnp.isfinite(lse), 0.1, 0.0)))

    ours = both(functools.partial(pallas_gpu.block_sparse_attention, interpret=True))
    for got, want in zip(ours, both(reference.block_sparse_attention), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bfloat16():
    """Of the values all but a few are within two roundings."""
    q, k, v, _ = (x.astype("bfloat16") for x in inputs(64, 4, 2, width=32))
    args = q, k, v, random_blocks(64, 16, 3), None, 16, 32**-0.5
    ours, lse = pallas_gpu.block_sparse_attention(*args, interpret=True)
    assert ours.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    difference = np.abs(np.asarray(ours - reference.block_sparse_attention(*args)[0], np.float32))
    assert (difference < 2**-7).mean() > 0.98
    assert difference.max() < 2**-5


def test_keys_of_another_type():
    """As from a cache in bfloat16: they are taken as the queries' type, their gradients keep their own."""
    q, k, v, dout = inputs(40, 4, 2, width=16)
    k, v = k.astype("bfloat16"), v.astype("bfloat16")
    ids = random_blocks(40, 16, 2)

    def both(attend, k, v):
        (out, _), vjp = jax.vjp(lambda q, k, v: attend(q, k, v, ids, None, 16, 0.25), q, k, v)
        return out, *vjp((dout, jnp.zeros((1, 4, 40))))

    ours = both(functools.partial(pallas_gpu.block_sparse_attention, interpret=True), k, v)
    want = both(reference.block_sparse_attention, k.astype("float32"), v.astype("float32"))
    assert [x.dtype for x in ours] == ["float32", "float32", "bfloat16", "bfloat16"]
    for got, expected in zip(ours[:2], want[:2], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for got, expected in zip(ours[2:], want[2:], strict=True):
        np.testing.assert_array_equal(got, expected.astype("bfloat16"))


def test_what_it_cannot_serve_is_named():
    q, k, v, _ = inputs(24)
    with pytest.raises(ValueError, match="'pallas_gpu': block_size = 8: must be a power of two from 16"):
        block_sparse_attention(q, k, v, random_blocks(24, 8, 2), block_size=8, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="'pallas_gpu': head_dim = 8: must be a power of two from 16"):
        block_sparse_attention(q, k, v, random_blocks(24, 16, 2), block_size=16, implementation="pallas_gpu")
