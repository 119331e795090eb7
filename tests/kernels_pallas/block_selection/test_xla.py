"""Selection by tiles of queries against the reference, which holds every score: same blocks, and linear memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.block_selection import xla
from kernels_pallas.block_selection.api import block_scores, select_blocks
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.compress_keys.api import compress_keys

SMALL = BlockSelection(kernel_size=4, kernel_stride=2, init_blocks=1, block_size=8, window_size=16, topk=3)


@functools.partial(jax.jit, static_argnames=("selection", "coarse", "implementation", "what"))
def run(what, q, k, segments, positions, *, selection, coarse, implementation):
    fine = compress_keys(k, kernel_size=selection.kernel_size, kernel_stride=selection.kernel_stride)
    sizes = {"kernel_size": selection.coarse_kernel_size, "kernel_stride": selection.coarse_kernel_stride}
    return what(
        q,
        fine,
        compress_keys(k, **sizes) if coarse else None,
        selection=selection,
        query_positions=positions,
        segment_ids=segments,
        implementation=implementation,
    )


def assert_equals_reference(q, k, segments=None, positions=None, *, selection, coarse=True):
    args = q, k, segments, positions
    got, want = (
        [
            run(what, *args, selection=selection, coarse=coarse, implementation=name)
            for what in (block_scores, select_blocks)
        ]
        for name in ("xla", "reference")
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[1], want[1])
    return np.asarray(got[1])


def example(seed, batch, length, kv_heads, group, width, dtype="float32"):
    keys = jax.random.split(jax.random.key(seed), 2)
    q = 2 * jax.random.normal(keys[0], (batch, length, kv_heads * group, width))
    return q.astype(dtype), (2 * jax.random.normal(keys[1], (batch, length, kv_heads, width))).astype(dtype)


@pytest.mark.parametrize(
    ("variant", "coarse", "dtype", "group", "width"),
    [
        ("paper", True, "float32", 3, 64),
        ("paper", False, "bfloat16", 16, 128),
        ("huggingface", True, "bfloat16", 1, 64),
        ("cpm_cu", False, "float32", 1, 128),
    ],
)
def test_several_tiles_and_chunks(monkeypatch, variant, coarse, dtype, group, width):
    for name, value in (("TILE_ROWS", 16 * group), ("CHUNK", 32), ("COARSE_CHUNK", 8)):
        monkeypatch.setattr(xla, name, value)
    jax.clear_caches()  # of programs with other sizes
    selection = dataclasses.replace(SMALL, variant=variant)
    q, k = example(0, 2, 213, 2, group, width, dtype)
    segments = jnp.asarray(np.repeat([1, 2, 1, 0], [70, 50, 64, 29])[None].repeat(2, 0))
    assert_equals_reference(q, k, segments, selection=selection, coarse=coarse)
    jax.clear_caches()


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    data=st.data(),
    length=st.integers(1, 400),
    group=st.integers(1, 16),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    coarse=st.booleans(),
    sizes=st.sampled_from([(4, 2, 8), (32, 16, 64), (5, 2, 6), (12, 4, 8), (8, 8, 8)]),
)
def test_any_shape(data, length, group, batch, kv_heads, coarse, sizes):
    size, stride, block = sizes
    window, topk = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 6))
    selection = BlockSelection(
        kernel_size=size,
        kernel_stride=stride,
        block_size=block,
        window_size=window * block,
        init_blocks=data.draw(st.integers(0, 2)),
        topk=topk,
    )
    q, k = example(data.draw(st.integers(0, 99)), batch, length, kv_heads, group, 16)
    cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=4)))
    segments = np.searchsorted(cuts, np.arange(length), side="right")[None].repeat(batch, 0)
    assert_equals_reference(q, k, jnp.asarray(segments), selection=selection, coarse=coarse)


def test_chunks_of_a_prompt_and_single_tokens_choose_as_the_whole():
    q, k = example(3, 2, 150, 2, 4, 16)
    whole = assert_equals_reference(q, k, selection=SMALL)
    for first, length in ((0, 40), (40, 109), (149, 1)):
        part = q[:, first : first + length]
        positions = jnp.broadcast_to(first + jnp.arange(length), (2, length))
        some = assert_equals_reference(part, k, None, positions, selection=SMALL)
        np.testing.assert_array_equal(some, whole[:, :, first : first + length])
    positions = jnp.array([[149, -1, 3], [64, 63, -1]])
    some = assert_equals_reference(q[:, :3], k, None, positions, selection=SMALL)
    assert (some[0, :, 1] == -1).all()
    assert (some[1, :, 2] == -1).all()


def test_equal_keys_tie_in_a_fixed_order():
    q, _ = example(0, 1, 700, 1, 2, 16)
    chosen = assert_equals_reference(q, jnp.ones((1, 700, 1, 16)), selection=SMALL)
    assert chosen[0, 0, 699].tolist() == [0, 1, 2, 86, 87]


def memory_of_selection(length):
    selection = BlockSelection()
    shapes = (1, length, 32, 128), (1, length, 2, 128)
    args = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    lowered = run.lower(select_blocks, *args, None, None, selection=selection, coarse=True, implementation="xla")
    return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_the_length():
    short, long = memory_of_selection(32 * 1024), memory_of_selection(64 * 1024)
    assert long < 2.1 * short
    # All kernel scores of one head are 256 MiB in float32, the block scores of both key heads 128 MiB.
    assert short < 32 * 2**20
