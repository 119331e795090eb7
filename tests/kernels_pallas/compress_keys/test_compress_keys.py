"""Semantic kernels against PyTorch's average pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kernels_pallas.block_selection.selection import num_kernels
from kernels_pallas.compress_keys.api import compress_keys

IMPLEMENTATIONS = ["reference", "xla"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("num_keys", "size", "stride"),
    [
        (64, 32, 16),
        (79, 32, 16),
        (80, 32, 16),
        (32, 32, 16),
        (31, 32, 16),
        (300, 128, 64),
        (23, 6, 4),
        (9, 3, 3),
        (5, 1, 1),
    ],
)
def test_means_of_windows(implementation, num_keys, size, stride):
    k = np.random.default_rng(0).normal(size=(2, num_keys, 3, 8)).astype(np.float32)
    got = compress_keys(jnp.asarray(k), kernel_size=size, kernel_stride=stride, implementation=implementation)
    if num_keys < size:
        assert got.shape == (2, 0, 3, 8)
        return
    channels_first = torch.tensor(k).double().permute(0, 2, 3, 1).reshape(2, 24, num_keys)
    want = torch.nn.functional.avg_pool1d(channels_first, size, stride).reshape(2, 3, 8, -1).permute(0, 3, 1, 2)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_are_in_float32(implementation):
    # In bfloat16 a sum of ones stops at 256.
    k = jnp.ones((1, 1024, 1, 1), jnp.bfloat16)
    got = compress_keys(k, kernel_size=1024, kernel_stride=1024, implementation=implementation)
    assert got.dtype == jnp.bfloat16
    assert float(got[0, 0, 0, 0]) == 1.0


def test_a_growing_cache_compresses_its_new_end():
    k = jax.random.normal(jax.random.key(0), (1, 96, 2, 4))
    whole = compress_keys(k, kernel_size=32, kernel_stride=16)
    np.testing.assert_array_equal(compress_keys(k[:, 32:], kernel_size=32, kernel_stride=16), whole[:, 2:])
    np.testing.assert_array_equal(compress_keys(k[:, :70], kernel_size=32, kernel_stride=16), whole[:, :3])


@pytest.mark.parametrize(("size", "stride"), [(8, 4), (5, 2), (4, 4)])
@pytest.mark.parametrize("chunk", [1, 3, 4, 11])
def test_chunk_by_chunk_equals_whole(size, stride, chunk):
    k = jax.random.normal(jax.random.key(0), (1, 34, 1, 4))
    whole = compress_keys(k, kernel_size=size, kernel_stride=stride)
    found = whole[:, :0]
    for before in range(0, 34, chunk):
        # The keys that no completed kernel begins with, and the new ones.
        read = k[:, stride * found.shape[1] : before + chunk]
        found = jnp.concatenate([found, compress_keys(read, kernel_size=size, kernel_stride=stride)], axis=1)
        assert found.shape[1] == num_kernels(min(before + chunk, 34), size, stride)
    np.testing.assert_array_equal(found, whole)


def test_bad_input():
    k = jnp.zeros((1, 8, 1, 4))
    with pytest.raises(ValueError, match="kernel_stride = 0: must be an int of at least 1"):
        compress_keys(k, kernel_size=4, kernel_stride=0)
    with pytest.raises(ValueError, match="k is of int32: must be floats"):
        compress_keys(k.astype(jnp.int32), kernel_size=4, kernel_stride=4)
    with pytest.raises(ValueError, match=r"k has shape \(8, 1, 4\): must be \[B, S, K, H\]"):
        compress_keys(k[0], kernel_size=4, kernel_stride=4)
    with pytest.raises(ValueError, match="implementation = 'cuda': must be None or one of 'reference'"):
        compress_keys(k, kernel_size=4, kernel_stride=4, implementation="cuda")
