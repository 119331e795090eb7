"""Blockwise attention against its definition and against PyTorch."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kernels_pallas.attention import api
from kernels_pallas.attention.arg_specs import ARG_SPECS
from kernels_pallas.dispatch import UnsupportedError, log_choice

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def make_inputs(batch_size, seq_len, num_heads, num_kv_heads, head_dim, dtype="float32", seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q = jax.random.normal(keys[0], (batch_size, seq_len, num_heads, head_dim), dtype)
    k = jax.random.normal(keys[1], (batch_size, seq_len, num_kv_heads, head_dim), dtype)
    v = jax.random.normal(keys[2], (batch_size, seq_len, num_kv_heads, head_dim), dtype)
    dout = jax.random.normal(keys[3], q.shape, dtype)
    return q, k, v, dout


def make_segments(batch_size, seq_len, seed=0):
    """Documents of random lengths, numbered from 1, and a tail of padding with id 0."""
    rng = np.random.default_rng(seed)
    ids = np.cumsum(rng.random((batch_size, seq_len)) < 3 / seq_len, axis=1) + 1
    ids[:, seq_len - seq_len // 5 :] = 0
    return jnp.asarray(ids, jnp.int32)


@functools.partial(jax.jit, static_argnames=("window", "scale", "implementation"))
def value_and_gradients(q, k, v, dout, segment_ids, window, scale, implementation):
    def attend(q, k, v):
        return api.dot_product_attention(
            q, k, v, segment_ids=segment_ids, window=window, scale=scale, implementation=implementation
        )

    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(dout)


def assert_close(got, want, dtype):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert a.dtype == jnp.dtype(dtype), name
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * max(1.0, np.abs(b).max()), rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "window", "packed", "dtype"),
    [
        ((2, 1, 2, 2, 4), None, False, "float32"),
        ((2, 1, 2, 1, 4), None, True, "bfloat16"),
        ((2, 7, 4, 4, 8), 1, False, "float32"),
        ((2, 77, 4, 2, 16), None, True, "float32"),
        ((1, 128, 4, 1, 8), 200, True, "bfloat16"),
        ((2, 129, 6, 2, 16), 17, False, "bfloat16"),
        ((2, 129, 6, 2, 16), 17, True, "float32"),
        ((1, 300, 6, 3, 12), None, False, "float32"),
        ((2, 300, 4, 1, 20), 128, True, "float32"),
        ((2, 384, 2, 2, 64), 129, True, "bfloat16"),
    ],
)
def test_equals_reference(shape, window, packed, dtype):
    q, k, v, dout = make_inputs(*shape, dtype=dtype)
    segments = make_segments(*shape[:2]) if packed else None
    got = value_and_gradients(q, k, v, dout, segments, window, None, "xla")
    want = value_and_gradients(q, k, v, dout, segments, window, None, "reference")
    assert_close(got, want, dtype)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("window", "scale"), [(None, None), (40, 0.3)])
def test_equals_torch(implementation, window, scale):
    q, k, v, dout = make_inputs(2, 150, 6, 2, 16)
    segments = make_segments(2, 150)
    got = value_and_gradients(q, k, v, dout, segments, window, scale, implementation)

    leaves = [torch.tensor(np.asarray(x)).requires_grad_() for x in (q, k, v)]
    distance = torch.arange(150)[:, None] - torch.arange(150)[None, :]
    ids = torch.tensor(np.asarray(segments))
    mask = (distance >= 0) & (distance < (window or 150)) & (ids[:, :, None] == ids[:, None, :])
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves), attn_mask=mask[:, None], scale=scale, enable_gqa=True
    ).transpose(1, 2)
    out.backward(torch.tensor(np.asarray(dout)))
    assert_close(got, [out.detach().numpy(), *(x.grad.numpy() for x in leaves)], "float32")


def test_the_future_and_other_documents_change_nothing():
    q, k, v, dout = make_inputs(1, 200, 4, 2, 8)
    segments = jnp.repeat(jnp.array([[1, 2, 0]]), jnp.array([90, 80, 30]), axis=1, total_repeat_length=200)
    before = value_and_gradients(q, k, v, dout, segments, None, None, "xla")[0]
    k, v = (x.at[:, 100:].set(1e4).at[:, :90].set(-1e4) for x in (k, v))
    after = value_and_gradients(q, k, v, dout, segments, None, None, "xla")[0]
    np.testing.assert_array_equal(before[:, 90:100], after[:, 90:100])
    assert not np.allclose(before[:, :90], after[:, :90])


def test_large_scores_stay_finite():
    q, k, v, dout = make_inputs(1, 160, 2, 1, 8)
    got = value_and_gradients(100 * q, 100 * k, v, dout, make_segments(1, 160), 50, None, "xla")
    want = value_and_gradients(100 * q, 100 * k, v, dout, make_segments(1, 160), 50, None, "reference")
    assert all(np.isfinite(x).all() for x in got)
    # Scores of thousands: float32 knows them to about 1e-3, and so the weights.
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-2 * np.abs(b).max())


def test_vmap_scan_and_remat():
    args = *make_inputs(3, 140, 4, 2, 8), make_segments(3, 140)
    args = tuple(x[:, None] for x in args)

    def loss(q, k, v, dout, segments):
        return jnp.sum(dout * api.dot_product_attention(q, k, v, segment_ids=segments, implementation="xla"))

    def scanned(args):
        remat = jax.checkpoint(loss)
        return jax.lax.scan(lambda _, x: (None, jax.grad(remat, argnums=(0, 1, 2))(*x)), None, args)[1]

    want = value_and_gradients(*(x[:, 0] for x in args), None, None, "xla")[1:]
    by_vmap = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))))(*args)
    for a, b, c in zip(want, by_vmap, jax.jit(scanned)(args), strict=True):
        np.testing.assert_allclose(b[:, 0], a, atol=1e-5)
        np.testing.assert_allclose(c[:, 0], a, atol=1e-5)


def test_deterministic():
    q, k, v, dout = make_inputs(2, 260, 4, 2, 16)
    first = value_and_gradients(q, k, v, dout, None, None, None, "xla")
    second = value_and_gradients(q, k, v, dout, None, None, None, "xla")
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_memory_does_not_hold_all_scores():
    spec = ARG_SPECS["minicpm4_8b_32k"]
    args = spec.abstract_args()

    def loss(q, k, v, segments):
        out = api.dot_product_attention(q, k, v, segment_ids=segments, implementation="xla")
        return jnp.sum(out.astype(jnp.float32))

    memory = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile().memory_analysis()
    all_scores = 4 * spec.num_heads * spec.seq_len**2
    q_bytes = 2 * spec.seq_len * spec.num_heads * spec.head_dim
    assert memory.temp_size_in_bytes < 10 * q_bytes < all_scores / 40


def test_chooses_by_itself_and_says_so_once(caplog):
    q, k, v, _ = make_inputs(1, 8, 2, 2, 4)
    log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels_pallas"):
        chosen = api.dot_product_attention(q, k, v)
        api.dot_product_attention(q, k, v)
    assert [r.getMessage() for r in caplog.records] == ["attention: using implementation='xla' (on cpu)"]
    np.testing.assert_array_equal(chosen, api.dot_product_attention(q, k, v, implementation="xla"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"implementation": "cudnn"}, "implementation = 'cudnn': must be None or one of 'reference', 'xla'"),
        ({"window": 0}, "window = 0: must be at least 1"),
        ({"k": jnp.zeros((1, 8, 3, 4)), "v": jnp.zeros((1, 8, 3, 4))}, "a multiple of the number of key heads"),
        ({"v": jnp.zeros((1, 8, 2, 5))}, "the shape of k"),
        ({"segment_ids": jnp.zeros((8,), jnp.int32)}, r"segment_ids has shape \(8,\): must be \[B, T\] = \(1, 8\)"),
    ],
)
def test_refuses_what_it_cannot_serve(changes, message):
    q, k, v, _ = make_inputs(1, 8, 4, 2, 4)
    with pytest.raises(UnsupportedError, match=message):
        api.dot_product_attention(**{"q": q, "k": k, "v": v} | changes)
