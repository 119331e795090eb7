"""Every implementation of sparse decoding against float64 sums written here, over odd shapes, types and layouts."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.sparse_decode_attention import xla
from kernels_pallas.sparse_decode_attention.api import sparse_decode_attention
from kernels_pallas.sparse_decode_attention.arg_specs import ARG_SPECS, ArgSpec

SPECS = {
    "odd": ARG_SPECS["odd_tiny"],
    "odd_paged": ARG_SPECS["odd_tiny_paged"],
    "one_query_mha": ArgSpec(3, 40, 2, 2, 8, dtype="float32", block_size=8, num_selected=4),
    "sixteen_to_one": ArgSpec(1, 96, 16, 1, 32, dtype="float32", block_size=32, num_selected=2),
    "shorter_than_a_block": ArgSpec(2, 5, 4, 2, 8, dtype="float32", block_size=16, num_selected=4),
    "pages_of_one_block": ArgSpec(2, 64, 4, 2, 8, dtype="float32", block_size=16, num_selected=3, page_size=16),
}


def make(spec: ArgSpec, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Values: sequences of different lengths, lists of different lengths, and for pages a shuffled table."""
    rng = np.random.default_rng(seed)
    q, k, v, ids, _, *tables = spec.abstract_args()
    arrays = [rng.standard_normal(x.shape).astype(x.dtype) for x in (q, k, v)]
    last = rng.integers(spec.num_queries, spec.cache_len, spec.batch_size) if spec.cache_len > 8 else [2, 4]
    at = np.asarray(last)[:, None] - np.arange(spec.num_queries)[::-1]
    blocks = np.full(ids.shape, -1, np.int32)
    for where in np.ndindex(ids.shape[:3]):
        visible = at[where[0], where[2]] // spec.block_size + 1
        number = min(visible, rng.integers(1, ids.shape[3] + 1))
        blocks[where][:number] = np.sort(rng.choice(visible, number, replace=False))
    table = [rng.permutation(np.prod(t.shape)).reshape(t.shape).astype(np.int32) for t in tables]
    return *arrays, blocks, at.astype(np.int32), *table


def expected(spec: ArgSpec, args: tuple[np.ndarray, ...]) -> np.ndarray:
    """One query, one head at a time, in float64."""
    q, k, v, ids, positions, *table = (np.asarray(x) for x in args)
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        head = n // (spec.num_heads // spec.num_kv_heads)
        slots = [c * spec.block_size + i for c in ids[b, head, t] if c >= 0 for i in range(spec.block_size)]
        slots = [s for s in slots if s <= positions[b, t]]
        if not slots:
            continue
        if table:
            where = [(head, table[0][b, s // spec.page_size], s % spec.page_size) for s in slots]
        else:
            where = [(b, head, s) for s in slots]
        keys, values = (np.array([x[at] for at in where], np.float64) for x in (k, v))
        scores = keys @ q[b, t, n].astype(np.float64) / np.sqrt(spec.head_dim)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ values / weights.sum()
    return out


def call(spec: ArgSpec, args: tuple, implementation: str | None = None, **changes):
    q, k, v, ids, positions, *table = args
    page_table = table[0] if table else None
    return sparse_decode_attention(
        q,
        k,
        v,
        ids,
        positions,
        block_size=spec.block_size,
        page_table=page_table,
        implementation=implementation,
        **changes,
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", SPECS)
def test_values(name: str, implementation: str) -> None:
    for seed in range(3):
        args = make(SPECS[name], seed)
        ours = jax.jit(lambda *args: call(SPECS[name], args, implementation))(*args)
        np.testing.assert_allclose(ours, expected(SPECS[name], args), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_values_of_any_shape(data: st.DataObject) -> None:
    """Ratios of heads from 1 to 16, lengths that no block divides, more entries than blocks, and pages."""
    draw = data.draw
    block_size, kv_heads, paged = draw(st.sampled_from([4, 8, 16])), draw(st.integers(1, 3)), draw(st.booleans())
    length = block_size * draw(st.integers(3, 6)) if paged else draw(st.integers(9, 90))
    spec = ArgSpec(
        batch_size=draw(st.integers(1, 3)),
        cache_len=length,
        num_heads=kv_heads * draw(st.integers(1, 16)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 24, 64])),
        dtype="float32",
        num_queries=draw(st.integers(1, min(4, length - 1))),
        block_size=block_size,
        num_selected=draw(st.integers(1, -(-length // block_size))),
        page_size=block_size if paged else None,
    )
    args = make(spec, draw(st.integers(0, 1000)))
    want = expected(spec, args)
    for implementation in ("reference", "xla"):
        np.testing.assert_allclose(call(spec, args, implementation), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["odd", "odd_paged"])
def test_bfloat16(name: str) -> None:
    """Of the values all but a few are within two roundings of float64 sums over the same bfloat16 inputs."""
    spec = dataclasses.replace(SPECS[name], dtype="bfloat16")
    args = make(spec)
    ours = call(spec, tuple(map(jnp.asarray, args)))
    assert ours.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(ours, np.float64) - expected(spec, args))
    assert (difference < 2**-7).mean() > 0.98
    assert difference.max() < 2**-5


@pytest.mark.parametrize("name", SPECS)
def test_few_queries_at_a_time_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(SPECS[name], num_queries=min(5, SPECS[name].cache_len - 2))
    args = make(spec)
    together = call(spec, args)
    monkeypatch.setattr(
        xla, "MAX_GATHERED_BYTES", 2 * args[3].size // spec.num_queries * spec.block_size * spec.head_dim * 4
    )
    np.testing.assert_allclose(call(spec, args), together, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["odd", "odd_paged"])
def test_one_layer_of_many(name: str, implementation: str) -> None:
    q, k, v, *rest = args = make(SPECS[name])
    alone = call(SPECS[name], args, implementation)
    layers = [np.stack([x + 1, x, -x]) for x in (k, v)]
    ours = jax.jit(lambda layer: call(SPECS[name], (q, *layers, *rest), implementation, layer=layer))(1)
    np.testing.assert_allclose(ours, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_what_is_not_chosen_is_not_seen(implementation: str) -> None:
    """Neither other blocks nor later slots, whatever numbers they hold; and an empty list gives zeros.

    Blocks that are not chosen are not even read but for the first, which stands for -1: they may hold NaN.
    """
    spec = SPECS["one_query_mha"]
    q, k, v, ids, positions = make(spec)
    ids[0, 0], positions[1] = -1, -1
    before = call(spec, (q, k, v, ids, positions), implementation)
    assert not np.asarray(before[0, 0, 0]).any()
    assert not np.asarray(before[1]).any()
    assert np.asarray(before[2]).all()
    slots = np.arange(spec.cache_len)
    seen = (ids[:, :, 0, None, :] == (slots // spec.block_size)[:, None]).any(-1) & (slots <= positions[:, :, None])
    other = [np.where(seen[..., None], x, 1e6).astype(np.float32) for x in (k, v)]
    if implementation == "xla":
        read = (np.maximum(ids, 0)[:, :, 0, None, :] == (slots // spec.block_size)[:, None]).any(-1)
        assert not read.all()
        other = [np.where(read[..., None], x, np.float32(np.nan)) for x in other]
    np.testing.assert_array_equal(call(spec, (q, *other, ids, positions), implementation), before)


def test_reads_no_more_than_the_chosen_blocks() -> None:
    """The compiled program's temporary memory does not know the length of the cache."""

    def temporary(length: int) -> int:
        spec = ArgSpec(1, length, 16, 2, 64, dtype="float32", num_selected=8)
        args = spec.abstract_args()
        program = jax.jit(lambda *args: call(spec, args)).lower(*args).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(65_536) == temporary(8192) < 4 * 8 * 64 * 64 * 2 * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": (2, 3, 6)}, "q, k_cache, v_cache have shapes (2, 3, 6)"),
        ({"q": (2, 3, 5, 16)}, "N a multiple of K"),
        ({"v_cache": (2, 2, 70, 16)}, "must be [B, T, N, H], [B, K, S, H] and the shape of k_cache"),
        ({"block_ids": (2, 1, 3, 3)}, "block_ids has shape (2, 1, 3, 3): must be [B, K, T, I] = (2, 2, 3) and I"),
        (
            {"block_ids": (2, 2, 3, 7)},
            "block_ids has shape (2, 2, 3, 7): I must be at most 6, one more than the blocks of 16 keys in 77 keys",
        ),
        ({"query_positions": (2,)}, "query_positions has shape (2,): must be [B, T] = (2, 3)"),
        ({"block_size": 0}, "block_size = 0: must be an int of at least 1"),
        (
            {"q": (2, 0, 4, 16), "block_ids": (2, 2, 0, 3), "query_positions": (2, 0)},
            "q has shape (2, 0, 4, 16): every size",
        ),
        ({"implementation": "cuda"}, "implementation = 'cuda': must be None or one of 'reference', 'xla'"),
        ({"layer": 0}, "must be [B, T, N, H], [L, B, K, S, H]"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict, message: str) -> None:
    names = ("q", "k_cache", "v_cache", "block_ids", "query_positions")
    shapes = {name: x.shape for name, x in zip(names, make(SPECS["odd"]), strict=True)}
    options = {"block_size": 16} | {name: value for name, value in changes.items() if name not in names}
    integers = ("block_ids", "query_positions")
    arrays = {n: np.zeros(changes.get(n, x), np.int32 if n in integers else np.float32) for n, x in shapes.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        sparse_decode_attention(**arrays, **options)


def test_a_layer_that_is_not_there_and_lists_of_floats_are_named() -> None:
    q, k, v, ids, positions = make(SPECS["odd"])
    layers = [np.stack([x, x]) for x in (k, v)]
    with pytest.raises(ValueError, match="layer = 2: must be from 0 to 1, the layers of k_cache"):
        sparse_decode_attention(q, *layers, ids, positions, block_size=16, layer=2)
    with pytest.raises(ValueError, match="block_ids is of float32: must be integers"):
        sparse_decode_attention(q, k, v, np.asarray(ids, np.float32), positions, block_size=16)


def test_pages_hold_whole_blocks() -> None:
    args = make(SPECS["odd_paged"])
    with pytest.raises(ValueError, match=r"pages of 16 keys: must be a multiple of block_size = 12"):
        sparse_decode_attention(*args[:5], block_size=12, page_table=args[5])
    with pytest.raises(ValueError, match=r"page_table has shape \(1, 5\): must be \[B, M\], with B = 2"):
        sparse_decode_attention(*args[:5], block_size=8, page_table=args[5][:1])
    ids = np.zeros((*args[3].shape[:3], 6), np.int32)
    with pytest.raises(ValueError, match=r"I must be at most 5, .* blocks of 8 keys in the 2 pages of page_table"):
        sparse_decode_attention(*args[:3], ids, args[4], block_size=8, page_table=args[5][:, :2])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["odd", "odd_paged"])
def test_what_the_cache_does_not_have_adds_nothing(name: str, implementation: str) -> None:
    """A page table that ends before a query's blocks do gives no key of another page, nor of another sequence."""
    spec = SPECS[name]
    args = make(spec)
    args[3][..., 1:], args[4][...] = -1, spec.cache_len + 100
    args[3][..., 0] = 1
    if name == "odd_paged":
        args = (*args[:5], args[5][:, :2])
    before = call(spec, args, implementation)
    assert np.asarray(before).all()
    slots = 77 if name == "odd" else 32
    args[3][..., 1] = -(-slots // spec.block_size)
    np.testing.assert_array_equal(call(spec, args, implementation), before)
