"""Block-sparse attention's TPU kernels: values by interpretation, races, and whether the programs lower for TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas.attention import reference as dense
from kernels_pallas.block_sparse_attention import api, costs, pallas_tpu, reference
from kernels_pallas.block_sparse_attention.arg_specs import ARG_SPECS
from kernels_pallas.block_sparse_attention.tile_unions import range_starts, tile_unions
from kernels_pallas.dispatch import UnsupportedError
from tests.kernels_pallas.block_sparse_attention.test_block_sparse_attention import new_tokens_of_a_cache
from tests.kernels_pallas.races import DETECT_RACES, races


def random_lists(rng, batch_size, num_kv_heads, length, num_blocks, longest):
    """Ascending lists of 0 to `longest` blocks, the future and -1 among them."""
    ids = np.full((batch_size, num_kv_heads, length, longest), num_blocks)
    for index in np.ndindex(ids.shape[:3]):
        number = rng.integers(0, longest + 1)
        ids[index][:number] = np.sort(rng.permutation(num_blocks)[:number])
    return jnp.asarray(np.where(ids == num_blocks, -1, ids), jnp.int32)


def example(shape, block_size, longest, dtype, seed=0):
    batch_size, length, num_heads, num_kv_heads, head_dim = shape
    keys = jax.random.split(jax.random.key(seed), 5)
    q, dout = (jax.random.normal(key, (batch_size, length, num_heads, head_dim), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (batch_size, length, num_kv_heads, head_dim), dtype) for key in keys[2:4])
    dlse = jax.random.normal(keys[4], (batch_size, num_heads, length))
    rng = np.random.default_rng(seed)
    ids = random_lists(rng, batch_size, num_kv_heads, length, -(-length // block_size), longest)
    position = np.arange(length)
    # Three documents, padding, and an id that comes back.
    segments = np.select([position < length // 3, position < length // 2, position < length - 9], [1, 2, 1], 0)
    return q, k, v, ids, jnp.asarray(np.tile(segments, (batch_size, 1)), jnp.int32), dout, dlse


@functools.partial(jax.jit, static_argnums=(0, 1))
def value_and_gradients(attend, block_size, q, k, v, ids, segments, dout, dlse):
    (out, lse), vjp = jax.vjp(lambda q, k, v: attend(q, k, v, ids, segments, block_size, q.shape[-1] ** -0.5), q, k, v)
    return out, jnp.where(jnp.isneginf(lse), -1e3, lse), *vjp((dout, dlse))


def interpreted(params):
    return functools.partial(pallas_tpu.block_sparse_attention, interpret=params)


NAMES = ("out", "lse", "dq", "dk", "dv")


def tolerance(want):
    """1e-5 of the largest number; a query that sees nothing has the log-sum-exp -inf, which both sides must have."""
    return 1e-5 * max(1.0, np.abs(want, where=np.isfinite(want), out=np.zeros(want.shape)).max())


@pytest.mark.parametrize(
    ("shape", "block_size", "longest", "packed"),
    [
        ((2, 77, 4, 2, 16), 16, 3, True),
        ((1, 1, 2, 1, 16), 64, 1, True),
        ((1, 300, 16, 1, 32), 64, 4, False),
        ((1, 200, 3, 3, 64), 128, 2, True),
    ],
)
def test_interpreted_equals_reference(shape, block_size, longest, packed):
    q, k, v, ids, segments, *cotangents = example(shape, block_size, longest, "float32")
    args = q, k, v, ids, segments if packed else None, *cotangents
    got = value_and_gradients(interpreted(True), block_size, *args)
    want = value_and_gradients(reference.block_sparse_attention, block_size, *args)
    for name, a, b in zip(NAMES, got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance(b), rtol=0, err_msg=name)


def test_several_ranges_of_keys_and_groups_of_blocks(monkeypatch):
    monkeypatch.setattr(costs, "RANGE_BYTES", 2 * 192 * 2 * 16 * 4)
    monkeypatch.setattr(pallas_tpu, "RANGE_GROUP_KEYS", 128)
    args = example((1, 520, 2, 1, 16), 32, 9, "float32")
    # A function of its own: jit would take what it compiled with other sizes.
    got = value_and_gradients(lambda *args: pallas_tpu.block_sparse_attention(*args, interpret=True), 32, *args)
    want = value_and_gradients(reference.block_sparse_attention, 32, *args)
    for name, a, b in zip(NAMES, got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance(b), rtol=0, err_msg=name)


@pytest.mark.parametrize("packed", [False, True])
def test_new_tokens_of_a_cache(packed, monkeypatch):
    """Queries are not where their number says: with several ranges of keys each range meets them all."""
    monkeypatch.setattr(costs, "RANGE_BYTES", 2 * 128 * 2 * 16 * 4)
    q, k, v, dout, ids, segments, positions = new_tokens_of_a_cache(40, 300, 16, packed=packed, width=16)
    positions = jnp.minimum(positions, 299)

    def both(attend):
        (out, lse), vjp = jax.vjp(lambda q, k, v: attend(q, k, v, ids, segments, 16, 0.25, positions), q, k, v)
        return out, lse, *vjp((dout, jnp.where(jnp.isfinite(lse), 0.1, 0.0)))

    got = both(functools.partial(pallas_tpu.block_sparse_attention, interpret=True))
    for name, a, b in zip(NAMES, got, both(reference.block_sparse_attention), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance(b), rtol=0, err_msg=name)


def test_bfloat16_is_as_near_as_bfloat16_can_be():
    args = example((1, 300, 8, 2, 64), 64, 4, "bfloat16")
    got = value_and_gradients(interpreted(True), 64, *args)
    wide = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in args]
    want = value_and_gradients(reference.block_sparse_attention, 64, *wide)
    for name, a, b in zip(NAMES, got, want, strict=True):
        error = np.abs(np.asarray(a, np.float32) - b) / np.maximum(np.abs(b), np.asarray(b).std())
        assert np.mean(error > 2**-7) < 0.02, name
        assert error.max() < 2**-4, name


def test_all_blocks_are_dense_attention():
    q, k, v, ids, segments, dout, dlse = example((1, 150, 4, 2, 16), 16, 1, "float32")
    ids = jnp.broadcast_to(jnp.arange(10, dtype=jnp.int32), (*ids.shape[:3], 10))
    got = value_and_gradients(interpreted(True), 16, q, k, v, ids, segments, dout, jnp.zeros_like(dlse))
    out, vjp = jax.vjp(lambda q, k, v: dense.dot_product_attention(q, k, v, segments, 0.25, None), q, k, v)
    for a, b in zip((got[0], *got[2:]), (out, *vjp(dout)), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance(b), rtol=0)


def test_copies_do_not_race(capfd, monkeypatch):
    args = example((1, 140, 2, 2, 16), 16, 3, "float32")
    assert not races(capfd, lambda: value_and_gradients(interpreted(DETECT_RACES), 16, *args))
    # Ranges of five, three and one step, in each of which dq is fetched and written.
    monkeypatch.setattr(costs, "RANGE_BYTES", 2 * 256 * 2 * 16 * 4)
    args = example((1, 600, 2, 1, 16), 32, 4, "float32")
    in_ranges = functools.partial(pallas_tpu.block_sparse_attention, interpret=DETECT_RACES)
    got = []
    assert not races(capfd, lambda: got.extend(value_and_gradients(in_ranges, 32, *args)))
    want = value_and_gradients(reference.block_sparse_attention, 32, *args)
    for name, a, b in zip(NAMES, got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance(b), rtol=0, err_msg=name)


def test_unions_and_ranges_of_lists():
    rng = np.random.default_rng(0)
    ids = rng.integers(-2, 12, size=(2, 2, 64, 5))  # repeated, unordered, and blocks that do not exist
    unions = tile_unions(jnp.asarray(ids, jnp.int32), 32, 9, 8)
    starts = range_starts(unions, 4, 3)
    for b, h, m in np.ndindex(2, 2, 2):
        words: dict[int, int] = {}
        for t, c in np.argwhere(np.ones((32, 5))):
            block = ids[b, h, m * 32 + t, c]
            if 0 <= block < 9:
                words[int(block)] = words.get(int(block), 0) | 1 << int(t)
        count = int(unions.counts[b, h, m])
        listed = [int(x) for x in unions.ids[b, h, m, :count]]
        assert listed == sorted(words)
        assert [int(x) & 0xFFFFFFFF for x in unions.words[b, h, m, :count]] == [words[block] for block in listed]
        assert not unions.words[b, h, m, count:].any()
        assert [int(x) for x in starts[b, h, m]] == [sum(block < 4 * r for block in words) for r in range(4)]


@pytest.mark.parametrize("name", ["minicpm4_8b_128k", "minicpm4_0.5b_32k", "one_head_each_2k", "odd_tiny"])
def test_is_the_choice_for_a_tpu_that_is_elsewhere_and_lowers(name):
    spec = ARG_SPECS[name]
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)

    def gradients(q, k, v, ids, segments):
        def attend(q, k, v):
            return api.block_sparse_attention(q, k, v, ids, block_size=spec.block_size, segment_ids=segments)

        with jax.sharding.use_abstract_mesh(mesh):
            out, vjp = jax.vjp(attend, q, k, v)
            return vjp(out)

    lowered = jax.jit(gradients).trace(*spec.abstract_args()).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == 2  # forward and backward


@pytest.mark.parametrize(
    ("dtype", "block_size", "message"),
    [
        ("float16", 64, "q has dtype float16: must be float32 or"),
        ("float32", 48, "block_size = 48: must be 16, 32, 64"),
    ],
)
def test_refuses_what_it_cannot_serve(dtype, block_size, message):
    q = jnp.zeros((1, 96, 2, 16), dtype)
    ids = jnp.zeros((1, 2, 96, 1), jnp.int32)
    with pytest.raises(UnsupportedError, match=message):
        api.block_sparse_attention(q, q, q, ids, block_size=block_size, implementation="pallas_tpu")


def test_on_a_mesh_it_belongs_into_shard_map():
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    args = ARG_SPECS["odd_tiny"].abstract_args()

    def attend(q, k, v, ids, segments):
        return api.block_sparse_attention(
            q, k, v, ids, block_size=16, segment_ids=segments, implementation="pallas_tpu"
        )

    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(UnsupportedError, match="on a mesh of 2 devices: call it inside shard_map"):
            jax.eval_shape(attend, *args)
        rows = PartitionSpec("data")
        divided = jax.shard_map(attend, in_specs=(rows,) * 5, out_specs=rows, check_vma=False)
        assert jax.eval_shape(divided, *args).shape == args[0].shape
