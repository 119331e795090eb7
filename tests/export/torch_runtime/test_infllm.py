"""Each step of sparse attention against the reference in `kernels_pallas`: the same kernels, blocks, and outputs."""

import itertools

import jax
import numpy as np
import pytest
import torch

from export.torch_runtime import infllm
from export.torch_runtime.config import SparseConfig
from kernels_pallas.block_selection import reference as selection_reference
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.block_sparse_attention.reference import block_sparse_attention
from kernels_pallas.compress_keys.reference import compress_keys

SIZES = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 32, "topk": 3}
# Sizes of a case, the number of keys, whether the normaliser is exact: kernels that overlap threefold or not at all,
# several initial blocks or none.
CASES = {
    "as published, smaller": (SIZES | {"variant": "huggingface"}, 203, False),
    "paper, exact": (SIZES | {"variant": "paper", "init_blocks": 2}, 203, True),
    "kernels side by side": (SIZES | {"kernel_size": 4, "variant": "paper", "init_blocks": 0}, 130, False),
    "kernels over three strides, exact": (SIZES | {"kernel_size": 11, "variant": "huggingface", "topk": 4}, 160, True),
    "fewer blocks than topk": (SIZES | {"variant": "cpm_cu", "topk": 30}, 47, False),
    "no kernel yet": (SIZES | {"variant": "huggingface"}, 5, False),
}


def inputs(length, heads=6, kv_heads=2, size=16):
    rng = np.random.default_rng(length)
    return [rng.standard_normal((2, length, n, size), np.float32) for n in (heads, kv_heads, kv_heads)]


def cached(x):
    """[B, S, K, H] as a cache holds it."""
    return torch.from_numpy(x).transpose(1, 2).contiguous()


def kernels_of(k, size, stride):
    """Kernels by the runtime, and the reference's, which are compared."""
    length, keys = k.shape[1], cached(k)
    kernels = torch.zeros(2, k.shape[2], infllm.num_kernels(length, size, stride) + 1, k.shape[3])
    chunks = itertools.accumulate([1, 3, 1, 29, 1, 64, length])
    for start, end in itertools.pairwise([0, *chunks]):
        if start < length:
            # Keys that come later may be anything.
            known = torch.where(torch.arange(length)[:, None] < end, keys, 7.0)
            infllm.write_kernels(kernels, known, torch.arange(start, min(end, length)), size, stride)
    expected = compress_keys(k, size, stride)
    np.testing.assert_allclose(kernels[:, :, :-1].transpose(1, 2), expected, atol=1e-6, rtol=0)
    return kernels, expected


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_references(case):
    sizes, length, exact = CASES[case]
    sparse, selection = SparseConfig(**sizes), BlockSelection(**sizes)
    q, k, v = inputs(length)
    fine, expected_fine = kernels_of(k, sparse.kernel_size, sparse.kernel_stride)
    coarse, expected_coarse = (None, None) if exact else kernels_of(k, *sparse.coarse)
    positions = torch.arange(length)
    every = np.broadcast_to(np.arange(length), (2, length))
    num_blocks = -(-length // sparse.block_size)
    expected = jax.jit(selection_reference.select_blocks, static_argnames=("scale", "selection", "num_blocks"))(
        q,
        expected_fine,
        expected_coarse,
        scale=0.25,
        selection=selection,
        query_positions=every,
        document_starts=np.zeros_like(every),
        num_blocks=num_blocks,
    )
    scores = infllm.block_scores(torch.from_numpy(q), fine, coarse, positions, length, 0.25, sparse)
    found = infllm.rank_blocks(scores, positions, sparse)
    np.testing.assert_array_equal(np.sort(found.numpy(), axis=-1), np.sort(expected, axis=-1))
    attend = jax.jit(block_sparse_attention, static_argnums=(5, 6))
    out, _ = attend(q, k, v, expected, None, sparse.block_size, 0.25)
    keys, values = cached(k), cached(v)
    many = infllm.attend_to_blocks(torch.from_numpy(q), keys, values, found, positions, 0.25, sparse.block_size)
    np.testing.assert_allclose(many, out, atol=1e-5, rtol=0)
    padding = (0, 0, 0, num_blocks * sparse.block_size - length)
    keys, values = (torch.nn.functional.pad(x, padding, value=7.0) for x in (keys, values))
    for at in {0, length // 2, length - 1}:
        one = infllm.gather_and_attend(
            torch.from_numpy(q[:, at : at + 1]),
            keys,
            values,
            found[:, :, at : at + 1],
            positions[at : at + 1],
            0.25,
            sparse.block_size,
        )
        np.testing.assert_allclose(one, out[:, at : at + 1], atol=1e-5, rtol=0)


def test_of_equal_scores_the_lowest_blocks_come_first():
    """Without a coarse kernel in sight every score is zero."""
    sparse = SparseConfig(**SIZES, variant="huggingface")
    q, kernels = torch.ones(1, 1, 2, 4), torch.zeros(1, 1, 40, 4)
    at = torch.tensor([150])
    scores = infllm.block_scores(q, kernels, torch.full((1, 1, 1, 4), 7.0), at - 130, 160, 0.5, sparse)
    ids = infllm.rank_blocks(scores, at, sparse)
    assert sorted(ids.flatten().tolist()) == [0, 1, 7, 8, 9]
