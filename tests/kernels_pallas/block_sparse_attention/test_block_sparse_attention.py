"""Attention over chosen blocks against PyTorch in float64, query by query, and what must hold for any lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.attention.api import dot_product_attention
from kernels_pallas.block_sparse_attention import transposed_index, xla
from kernels_pallas.block_sparse_attention.api import block_sparse_attention

IMPLEMENTATIONS = ["reference", "xla"]


def inputs(length, heads=4, kv_heads=2, width=8, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


def random_blocks(length, block_size, number, batch=1, kv_heads=2, seed=0, own=True):
    """Lists of up to `number` blocks at or before each query's own, in ascending order, -1 at the end."""
    rng = np.random.default_rng(seed)
    number = min(number, -(-length // block_size))
    ids = np.full((batch, kv_heads, length, number), -1, np.int32)
    for index in np.ndindex(batch, kv_heads, length):
        last = index[-1] // block_size
        chosen = rng.choice(last + 1, min(number, last + 1), replace=False)
        if own:
            chosen[0] = chosen[0] if last in chosen else last
        ids[index][: len(chosen)] = np.sort(chosen)
    return jnp.asarray(ids)


def torch_by_query(q, k, v, ids, block_size, segment_ids=None, scale=None, positions=None):
    """Output and log-sum-exp in float64, one query and head after another, over a list of its keys."""
    batch, length, heads, width = q.shape
    out, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full((batch, heads, length), -torch.inf).double()
    for b, n, t in np.ndindex(batch, heads, length):
        g, at = n * k.shape[2] // heads, t if positions is None else min(int(positions[b, t]), k.shape[1] - 1)
        keys = [s for c in ids[b, g, t] if c >= 0 for s in range(c * block_size, (c + 1) * block_size) if s <= at]
        keys = [s for s in keys if segment_ids is None or segment_ids[b, s] == segment_ids[b, at]]
        if keys:
            scores = (k[b, keys, g] @ q[b, t, n]) * (width**-0.5 if scale is None else scale)
            out[b, t, n] = torch.softmax(scores, 0) @ v[b, keys, g]
            lse[b, n, t] = torch.logsumexp(scores, 0)
    return out, lse


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_of_the_definition(implementation, packed):
    q, k, v, dout = inputs(21, heads=6, batch=2)
    ids = random_blocks(21, 4, 3, batch=2)
    segments = jnp.asarray(np.repeat([1, 2, 0], [9, 8, 4])[None].repeat(2, 0).astype(np.int32)) if packed else None
    leaves = [torch.tensor(np.asarray(x)).double().requires_grad_() for x in (q, k, v)]
    want, want_lse = torch_by_query(*leaves, np.asarray(ids), 4, segments)
    want_gradients = torch.autograd.grad(want, leaves, torch.tensor(np.asarray(dout)).double())

    def attend(q, k, v):
        return block_sparse_attention(
            q, k, v, ids, block_size=4, segment_ids=segments, return_lse=True, implementation=implementation
        )

    (out, lse), vjp = jax.vjp(attend, q, k, v)
    np.testing.assert_allclose(out, want.detach(), atol=1e-5)
    np.testing.assert_allclose(lse, want_lse.detach(), atol=1e-5)
    for a, b in zip(vjp((dout, jnp.zeros_like(lse))), want_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_blocks_is_dense_attention(implementation):
    q, k, v, _ = inputs(50)
    ids = jnp.broadcast_to(jnp.arange(7, dtype=jnp.int32), (1, 2, 50, 7))
    got = block_sparse_attention(q, k, v, ids, block_size=8, implementation=implementation)
    np.testing.assert_allclose(got, dot_product_attention(q, k, v, implementation="reference"), atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_without_blocks_is_zero_and_has_no_gradient(implementation):
    q, k, v, dout = inputs(24)
    ids = random_blocks(24, 8, 2).at[:, :, 5:9].set(-1)

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, ids, block_size=8, return_lse=True, implementation=implementation)

    (out, lse), vjp = jax.vjp(attend, q, k, v)
    assert not np.asarray(out[:, 5:9]).any()
    assert np.isneginf(np.asarray(lse[:, :, 5:9])).all()
    assert np.isfinite(np.asarray(lse[:, :, 9:])).all()
    dq, dk, dv = vjp((dout, jnp.zeros_like(lse)))
    assert not np.asarray(dq[:, 5:9]).any()
    assert all(np.isfinite(np.asarray(x)).all() for x in (dq, dk, dv))


@pytest.fixture
def small_pieces(monkeypatch):
    """Many tiles, several groups a block and several steps a tile, at lengths that a test can afford."""
    monkeypatch.setattr(xla, "ROWS_PER_GROUP", 12)
    monkeypatch.setattr(xla, "KEYS_PER_STEP", 16)
    sizes = xla._Sizes.of
    monkeypatch.setattr(xla._Sizes, "of", lambda *args: sizes(*args)._replace(tile=min(8, args[0])))


def compare_with_reference(q, k, v, dout, ids, block_size, segments=None):
    def both(implementation):
        def attend(q, k, v):
            return block_sparse_attention(
                q,
                k,
                v,
                ids,
                block_size=block_size,
                segment_ids=segments,
                return_lse=True,
                implementation=implementation,
            )

        (out, lse), vjp = jax.vjp(attend, q, k, v)
        return out, lse, *vjp((dout, jnp.where(jnp.isfinite(lse), 0.1, 0.0)))

    return both("xla"), both("reference")


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("heads", "length", "block_size", "number"),
    [
        (3, 83, 4, 5),
        pytest.param(1, 1, 4, 1, marks=pytest.mark.slow),
        pytest.param(2, 5, 8, 1, marks=pytest.mark.slow),
        pytest.param(7, 64, 8, 8, marks=pytest.mark.slow),
        pytest.param(16, 70, 6, 4, marks=pytest.mark.slow),
    ],
)
def test_pieces_equal_the_reference(heads, length, block_size, number):
    q, k, v, dout = inputs(length, heads=2 * heads, batch=2, seed=length)
    ids = random_blocks(length, block_size, number, batch=2, seed=heads, own=heads != 3)
    for a, b in zip(*compare_with_reference(q, k, v, dout, ids, block_size), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("lengths", [[1, 2, 30, 7], pytest.param([8, 8, 24], marks=pytest.mark.slow)])
def test_packed_pieces_equal_the_reference(lengths):
    q, k, v, dout = inputs(40)
    segments = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths)[None].astype(np.int32))
    ids = random_blocks(40, 4, 4)
    for a, b in zip(*compare_with_reference(q, k, v, dout, ids, 4, segments), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    length=st.integers(1, 60),
    groups=st.integers(1, 16),
    kv_heads=st.integers(1, 3),
    block_size=st.integers(1, 20),
    number=st.integers(1, 6),
    packed=st.booleans(),
)
def test_any_shape(length, groups, kv_heads, block_size, number, packed):
    q, k, v, dout = inputs(length, heads=groups * kv_heads, kv_heads=kv_heads, seed=length)
    ids = random_blocks(length, block_size, number, kv_heads=kv_heads, seed=number)
    segments = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (1, length)))) if packed else None
    for a, b in zip(*compare_with_reference(q, k, v, dout, ids, block_size, segments), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "heads"), [(64, 8), (128, 16)])
def test_bfloat16_at_the_published_shapes(width, heads):
    length, block_size = 320, 64
    q, k, v, dout = (x.astype(jnp.bfloat16) for x in inputs(length, heads=heads, kv_heads=1, width=width))
    ids = random_blocks(length, block_size, 3, kv_heads=1)
    got, want = compare_with_reference(q, k, v, dout, ids, block_size)
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.isfinite(a).all()
        # bfloat16 has 8 bits: nearly all elements within two units of the last place, none beyond a few.
        error = np.abs(a - b) / (np.abs(b) + np.abs(b).std())
        assert (error < 2**-7).mean() > 0.99
        assert error.max() < 2**-4


@pytest.mark.usefixtures("small_pieces")
def test_gradient_by_finite_differences_in_float64():
    q, k, v, dout = inputs(19)
    ids = random_blocks(19, 4, 3)

    def total(q, k, v):
        out, lse = torch_by_query(q, k, v, np.asarray(ids), 4)
        return (out * torch.tensor(np.asarray(dout)).double()).sum() + 0.3 * lse.sum()

    leaves = [torch.tensor(np.asarray(x)).double() for x in (q, k, v)]

    def ours(q, k, v):
        out, lse = block_sparse_attention(q, k, v, ids, block_size=4, return_lse=True, implementation="xla")
        return (out * dout).sum() + 0.3 * lse.sum()

    rng = np.random.default_rng(0)
    for number, gradient in enumerate(jax.grad(ours, argnums=(0, 1, 2))(q, k, v)):
        direction = torch.tensor(rng.normal(size=gradient.shape))
        step = 1e-5
        ahead, behind = (
            total(*(x + sign * step * direction if i == number else x for i, x in enumerate(leaves)))
            for sign in (1, -1)
        )
        slope = float(ahead - behind) / (2 * step)
        np.testing.assert_allclose(
            float((np.asarray(gradient, np.float64) * direction.numpy()).sum()), slope, rtol=1e-4
        )


@pytest.mark.usefixtures("small_pieces")
def test_the_index_holds_each_pair_once():
    length, blocks, size = 48, 12, 4
    ids = random_blocks(length, size, 4, kv_heads=1, seed=3)[0, 0]
    index = transposed_index.transpose_index(
        ids, jnp.arange(length), num_blocks=blocks, block_size=size, tile_size=8, blocks_per_step=2, group_size=3
    )
    pairs = []
    for tile in range(6):
        for step in range(-(-int(index.tile_counts[tile]) // 2)):
            numbers, chosen = index.tile_step(tile, step, 2)
            pairs += [(8 * tile + i, int(numbers[j])) for i, j in np.argwhere(np.asarray(chosen))]
            assert all(2 * chosen[:, j].sum() >= 8 for j in range(2) if numbers[j] < blocks)
    shared = len(pairs)
    for c in range(blocks):
        for group in range(-(-int(index.starts[c + 1] - index.starts[c]) // 3)):
            pairs += [(int(i), c) for i in index.queries_of(c, group, 3, absent=-1) if i >= 0]
    want = [(t, int(c)) for t in range(length) for c in ids[t] if c >= 0]
    assert sorted(pairs) == sorted(want)
    assert 0 < shared < len(pairs)


def new_tokens_of_a_cache(length=13, num_keys=46, block_size=4, number=5, packed=False, **sizes):
    """Arguments of queries that lie somewhere among the keys, each row's elsewhere: q, k, v, ids, segments, positions.

    The second row's go on beyond the keys, and its lists name a block that does not exist; the third's begin before.
    """
    q, dout = (inputs(length, batch=3, seed=seed, **sizes)[0] for seed in (1, 2))
    _, k, v, _ = inputs(num_keys, batch=3, **sizes)
    positions = jnp.asarray([[17], [num_keys - 6], [-3]]) + jnp.arange(length)
    rng = np.random.default_rng(0)
    ids = np.full((3, k.shape[2], length, number), -1, np.int32)
    for b, h, t in np.ndindex(ids.shape[:3]):
        chosen = rng.permutation(max(int(positions[b, t]), 0) // block_size + 1)[: rng.integers(1, number + 1)]
        ids[b, h, t, : len(chosen)] = np.sort(chosen)
    assert ids[1].max() * block_size >= num_keys
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (3, num_keys)))) if packed else None
    return q, k, v, dout, jnp.asarray(ids), segments, positions


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_new_tokens_of_a_cache(implementation, packed):
    q, k, v, dout, ids, segments, positions = new_tokens_of_a_cache(packed=packed, heads=6)
    leaves = [torch.tensor(np.asarray(x)).double().requires_grad_() for x in (q, k, v)]
    want, want_lse = torch_by_query(*leaves, np.asarray(ids), 4, segments, positions=positions)
    want_gradients = torch.autograd.grad(want, leaves, torch.tensor(np.asarray(dout)).double())
    options = {"query_positions": positions, "segment_ids": segments, "implementation": implementation}

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, ids, block_size=4, return_lse=True, **options)

    (out, lse), vjp = jax.vjp(attend, q, k, v)
    assert not np.asarray(out[2, :3]).any()  # before the first key
    np.testing.assert_allclose(out, want.detach(), atol=1e-5)
    np.testing.assert_allclose(lse, want_lse.detach(), atol=1e-5)
    for a, b in zip(vjp((dout, jnp.zeros_like(lse))), want_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_memory_is_linear_in_the_length():
    def temporaries(length):
        shapes = [(1, length, n, 16) for n in (4, 1, 1)]
        q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        ids = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.int32)

        def loss(q, k, v, ids):
            return block_sparse_attention(q, k, v, ids, block_size=16, implementation="xla").sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(65_536) < 2.2 * temporaries(32_768)
    # A single bit for each query and key would be more.
    assert temporaries(65_536) < 65_536**2 / 8


def test_arguments_that_do_not_fit():
    q, k, v, _ = inputs(24)
    ids = random_blocks(24, 8, 2)
    for args, message in [
        ((q[:, :, :3], k, v, ids), "the number of query heads a multiple of the number of key heads"),
        ((q, k, v[:, :3], ids), "must be"),
        ((q, k, v, ids[:, :1]), r"block_ids has shape \(1, 1, 24, 2\): must be \[B, K, T, I\] = \(1, 2, 24\) and I at"),
        ((q, k, v, jnp.concatenate([ids, ids], -1)), "at most the 3 blocks of 8 keys"),
        ((q[:, :5], k, v, ids[:, :, :5]), "lengths must be equal without query_positions"),
    ]:
        with pytest.raises(ValueError, match=message):
            block_sparse_attention(*args, block_size=8)
    with pytest.raises(ValueError, match="block_size = 0: must be an int of at least 1"):
        block_sparse_attention(q, k, v, ids, block_size=0)
    positions = jnp.zeros((1, 24), jnp.int32)
    with pytest.raises(ValueError, match=r"query_positions has shape \(1, 24\): must be \[B, T\] = \(1, 5\)"):
        block_sparse_attention(q[:, :5], k, v, ids[:, :, :5], block_size=8, query_positions=positions)
    with pytest.raises(ValueError, match=r"segment_ids has shape \(1, 5\): must be \[B, S\] = \(1, 24\)"):
        block_sparse_attention(q, k, v, ids, block_size=8, segment_ids=jnp.zeros((1, 5), jnp.int32))
    with pytest.raises(ValueError, match=r"block_ids has shape \(1, 2, 24, 0\): every size must be at least 1"):
        block_sparse_attention(q, k, v, ids[..., :0], block_size=8)
    with pytest.raises(ValueError, match="block_ids is of float32: must be integers"):
        block_sparse_attention(q, k, v, ids.astype(jnp.float32), block_size=8)
    with pytest.raises(ValueError, match="implementation = 'cuda': must be None or one of 'reference'"):
        block_sparse_attention(q, k, v, ids, block_size=8, implementation="cuda")
