"""The ops on 8 devices: equal to one device, without communication that a good layout does not need."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from cpm_jax.planning.hlo_costs import count_costs
from kernels_pallas.attention import api as attention_api
from kernels_pallas.dispatch import UnsupportedError
from kernels_pallas.linear_cross_entropy import api as loss_api
from kernels_pallas.linear_cross_entropy import xla

pytestmark = pytest.mark.multidevice


@pytest.fixture(scope="module")
def mesh():
    assert jax.device_count() == 8, "run with XLA_FLAGS=--xla_force_host_platform_device_count=8"
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def collectives(compiled):
    """(operation, number of elements of its largest result) of each collective in a program."""
    found = []
    pattern = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    for result, name in re.findall(pattern, compiled.as_text()):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        found.append((name, max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)))
    return found


def attention_inputs(num_kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (jax.random.normal(key, (8, 160, 4, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (8, 160, num_kv_heads, 16)) for key in keys[2:])
    segments = jnp.broadcast_to(jnp.arange(160) // 70, (8, 160))
    return q, k, v, segments, dout


def attention_gradients(spec):
    def gradients(q, k, v, segments, dout):
        def attend(q, k, v):
            return attention_api.dot_product_attention(q, k, v, segment_ids=segments, partition_spec=spec)

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    return gradients


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("spec", [P("data"), P("data", None, "tensor", None), P(("data", "tensor"), None, None, None)])
def test_attention_on_each_device_by_itself(mesh, spec, num_kv_heads):
    args = attention_inputs(num_kv_heads)
    want = jax.jit(attention_gradients(None))(*args)
    heads = NamedSharding(mesh, spec)
    kv = heads if num_kv_heads == 2 else NamedSharding(mesh, P(spec[0]))
    shardings = heads, kv, kv, NamedSharding(mesh, P(spec[0])), heads
    with jax.set_mesh(mesh):
        compiled = jax.jit(attention_gradients(spec), in_shardings=shardings).lower(*args).compile()
        got = compiled(*(jax.device_put(x, s) for x, s in zip(args, shardings, strict=True)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    if num_kv_heads == 2 and spec != P("data"):  # a device then shares no row or head with another
        assert collectives(compiled) == []


def test_attention_divided_by_the_partitioner(mesh):
    args = attention_inputs(2)
    want = jax.jit(attention_gradients(None))(*args)
    rows = NamedSharding(mesh, P(("data", "tensor")))
    compiled = jax.jit(attention_gradients(None), in_shardings=(rows,) * 5).lower(*args).compile()
    for a, b in zip(compiled(*(jax.device_put(x, rows) for x in args)), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert collectives(compiled) == []


def test_attention_refuses_what_it_cannot_divide(mesh):
    q, k, v, *_ = attention_inputs(2)
    with jax.set_mesh(mesh):
        with pytest.raises(UnsupportedError, match="may divide only batch and heads"):
            attention_api.dot_product_attention(q, k, v, partition_spec=P(None, "data"))
        with pytest.raises(UnsupportedError, match="8 must divide 4 heads"):
            attention_api.dot_product_attention(q, k, v, partition_spec=P(None, None, ("data", "tensor")))
        with pytest.raises(UnsupportedError, match="partition_spec = None on a mesh of 8 devices"):
            attention_api.dot_product_attention(q, k, v, implementation="pallas_tpu")


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(P(("data", "tensor")), P()), (P("data"), P(None, "tensor")), (P(("data", "tensor")), P("data"))],
    ids=["data", "data_and_vocabulary", "fsdp"],
)
def test_loss_never_gathers_logits(mesh, rows, columns):
    batch_size, seq_len, d_model, vocab_size = 8, 64, 16, 1000
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (batch_size, seq_len, d_model))
    kernel = jax.random.normal(keys[1], (d_model, vocab_size)) / 4
    targets = jax.random.randint(keys[2], (batch_size, seq_len), 0, vocab_size)
    args = hidden, kernel, targets, jnp.ones((batch_size, seq_len))

    def loss(hidden, kernel, targets, weights):
        return loss_api.linear_cross_entropy(hidden, kernel, targets, weights)

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    want = jax.jit(gradient)(*args)
    row, column = NamedSharding(mesh, rows), NamedSharding(mesh, columns)
    shardings = row, column, row, row
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient, in_shardings=shardings).lower(*args).compile()
        got = compiled(*(jax.device_put(x, s) for x, s in zip(args, shardings, strict=True)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))
    # Nothing larger than the kernel (or its gradient) travels; logits are 32 times as large.
    assert max(size for _, size in collectives(compiled)) <= d_model * vocab_size


@pytest.mark.parametrize(
    ("hidden_spec", "kernel_spec"),
    [
        (P("data", None, None), P("data", None)),
        (P("data", None, None), P(None, "tensor")),
        (P("data", "tensor", None), P("data", None)),
        (P(("data", "tensor"), None, None), P(("data", "tensor"), None)),
        (P(None, "tensor", None), P("data", None)),
    ],
    ids=["fsdp", "data_and_vocabulary", "length", "both_axes", "rows_whole"],
)
def test_head_travels_once_however_many_chunks_there_are(mesh, hidden_spec, kernel_spec, monkeypatch):
    monkeypatch.setattr(xla, "ROWS_PER_DEVICE", 16)
    batch_size, seq_len, d_model, vocab_size = 8, 64, 16, 1000
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (batch_size, seq_len, d_model))
    kernel = jax.random.normal(keys[1], (d_model, vocab_size)) / 4
    targets = jax.random.randint(keys[2], (batch_size, seq_len), 0, vocab_size)
    args = hidden, kernel, targets, jnp.arange(batch_size * seq_len, dtype=jnp.float32).reshape(batch_size, -1) / 512

    def loss(specs, *args):
        return loss_api.linear_cross_entropy(*args, **specs)

    def gradient(specs):
        return jax.value_and_grad(functools.partial(loss, specs), argnums=(0, 1), has_aux=True)

    want = jax.jit(gradient({}))(*args)
    row, column = NamedSharding(mesh, hidden_spec), NamedSharding(mesh, kernel_spec)
    shardings = row, column, *(NamedSharding(mesh, P(*hidden_spec[:2])),) * 2
    specs = {"hidden_spec": hidden_spec, "kernel_spec": kernel_spec}
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient(specs), in_shardings=shardings).lower(*args).compile()
        got = compiled(*(jax.device_put(x, s) for x, s in zip(args, shardings, strict=True)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))
    costs = count_costs(compiled.as_text())
    large = [c for c in costs.collectives if c.num_bytes >= d_model * vocab_size]  # a quarter of the head in float32
    assert large or kernel_spec[0] is None
    assert all(c.executions == 1 for c in large)
