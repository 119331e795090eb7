"""Block selection's GPU kernels: values by interpretation, and what they do not serve."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.block_selection import api, pallas_gpu
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.dispatch import UnsupportedError
from tests.kernels_pallas.block_selection import test_pallas_tpu as tpu
from tests.kernels_pallas.block_selection.test_pallas_tpu import SMALL, example

assert_equals_reference = functools.partial(tpu.assert_equals_reference, interpret=True, kernels=pallas_gpu)


@pytest.mark.parametrize(
    ("length", "kv_heads", "group", "width", "dtype", "coarse", "fields"),
    [
        (133, 2, 3, 64, "float32", True, {}),
        (120, 1, 16, 128, "bfloat16", False, {"variant": "huggingface"}),
        (110, 2, 1, 64, "float32", True, {"kernel_size": 12, "kernel_stride": 4}),
        (90, 1, 2, 16, "float32", False, {"kernel_size": 8, "kernel_stride": 8, "variant": "cpm_cu"}),
        (70, 1, 2, 16, "float32", True, {"topk": 1}),
        (1, 1, 4, 16, "float32", True, {}),
    ],
)
def test_interpreted_equals_reference(length, kv_heads, group, width, dtype, coarse, fields):
    selection = dataclasses.replace(SMALL, **fields)
    assert_equals_reference(example(length, kv_heads, group, width, selection, dtype, 2, coarse))


def test_several_chunks_spans_and_programs(monkeypatch):
    monkeypatch.setattr(pallas_gpu, "GPU_SPAN_BYTES", 4 * 64 * 100)
    # 75 blocks, five chunks of them: kernels reach from one chunk into the next.
    selection = dataclasses.replace(SMALL, block_size=4, window_size=8)
    assert_equals_reference(example(300, 1, 4, 16, selection, documents=False))


def test_equal_scores_are_ranked_by_block_number():
    q, fine, coarse, *rest = example(160, 1, 2, 16, SMALL, documents=False)
    assert_equals_reference((jnp.zeros_like(q), fine, coarse, *rest))


def test_what_the_kernels_cannot_serve_is_refused():
    call = functools.partial(api.select_blocks, selection=SMALL, implementation="pallas_gpu")
    q, fine, coarse, *_ = example(64, 1, 2, 8, SMALL)
    with pytest.raises(UnsupportedError, match="q has dtype float32 and k_compressed bfloat16: must be the same"):
        call(q, fine.astype("bfloat16"), coarse)
    with pytest.raises(UnsupportedError, match="'pallas_gpu': head_dim = 8: must be a power of two from 16"):
        call(q, fine, coarse)
    long = jax.ShapeDtypeStruct((1, 2**21, 2, 128), "bfloat16")
    kernels = (
        jax.ShapeDtypeStruct((1, (2**21 - size) // stride + 1, 1, 128), "bfloat16")
        for size, stride in ((32, 16), (128, 64))
    )
    with pytest.raises(UnsupportedError, match="32768 blocks: must be at most 16384"):
        jax.eval_shape(functools.partial(call, selection=BlockSelection()), long, *kernels)
