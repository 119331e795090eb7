"""Splash attention behind our function: values by interpretation, and whether its programs lower for TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention import api, pallas_tpu, reference
from kernels_pallas.attention.arg_specs import ARG_SPECS
from kernels_pallas.attention.tuned_block_sizes import block_size
from kernels_pallas.dispatch import UnsupportedError

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


@functools.partial(jax.jit, static_argnames=("attend", "window"))
def value_and_gradients(attend, q, k, v, segment_ids, dout, window):
    out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids, q.shape[-1] ** -0.5, window), q, k, v)
    return out, *vjp(dout)


interpreted = functools.partial(pallas_tpu.dot_product_attention, interpret=True)


@pytest.mark.parametrize(
    ("shape", "window", "packed", "dtype"),
    [
        ((1, 1, 2, 1, 16), None, True, "float32"),
        ((2, 77, 4, 2, 16), None, True, "float32"),
        ((1, 300, 4, 2, 64), 100, True, "float32"),
        ((1, 256, 4, 4, 128), None, False, "bfloat16"),
    ],
)
def test_interpreted_equals_reference(shape, window, packed, dtype):
    batch_size, seq_len, num_heads, num_kv_heads, head_dim = shape
    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (jax.random.normal(key, (batch_size, seq_len, num_heads, head_dim), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (batch_size, seq_len, num_kv_heads, head_dim), dtype) for key in keys[2:])
    position = jnp.arange(seq_len)
    ids = jnp.where(position < seq_len // 2, 1, jnp.where(position < seq_len - seq_len // 8, 2, 0))
    segments = jnp.broadcast_to(ids, (batch_size, seq_len)) if packed else None
    got = value_and_gradients(interpreted, q, k, v, segments, dout, window)
    want = value_and_gradients(reference.dot_product_attention, q, k, v, segments, dout, window)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * max(1.0, np.abs(b).max()), rtol=0, err_msg=name)


@pytest.mark.parametrize("name", ARG_SPECS)
def test_forward_and_backward_lower_for_tpu(name):
    spec = ARG_SPECS[name]

    def gradients(q, k, v, segment_ids=None):
        def attend(q, k, v):
            return api.dot_product_attention(
                q, k, v, segment_ids=segment_ids, window=spec.window, implementation="pallas_tpu"
            )

        out, vjp = jax.vjp(attend, q, k, v)
        return vjp(out)

    exported = jax.export.export(jax.jit(gradients), platforms=["tpu"])(*spec.abstract_args())
    assert exported.mlir_module().count("tpu_custom_call") >= 3  # forward, dq, dk and dv


def test_is_the_choice_for_a_tpu_that_is_elsewhere():
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    spec = ARG_SPECS["minicpm4_0.5b_4k"]

    def attend(q, k, v, segment_ids):
        with jax.sharding.use_abstract_mesh(mesh):
            return api.dot_product_attention(q, k, v, segment_ids=segment_ids)

    lowered = jax.jit(attend).trace(*spec.abstract_args()).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_refuses_half_precision():
    q = jnp.zeros((1, 8, 2, 4), jnp.float16)
    with pytest.raises(UnsupportedError, match="q has dtype float16: must be float32 or bfloat16"):
        api.dot_product_attention(q, q, q, implementation="pallas_tpu")


def test_block_sizes_divide_the_length():
    assert [block_size(n) for n in (128, 256, 384, 512, 640, 4096, 5 * 128 * 3)] == [128, 256, 384, 512, 128, 512, 384]
