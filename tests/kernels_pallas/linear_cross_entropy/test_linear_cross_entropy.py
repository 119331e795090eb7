"""The chunked language-model loss against its definition and against PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kernels_pallas.dispatch import UnsupportedError
from kernels_pallas.linear_cross_entropy import api, xla

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def make_inputs(batch_size, seq_len, d_model, vocab_size, hidden_dtype="float32", kernel_dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (batch_size, seq_len, d_model), hidden_dtype)
    kernel = jax.random.normal(keys[1], (d_model, vocab_size), kernel_dtype) / d_model**0.5
    targets = jax.random.randint(keys[2], (batch_size, seq_len), 0, vocab_size)
    weights = jax.random.bernoulli(keys[3], 0.7, (batch_size, seq_len)).astype(jnp.float32) * 1.5
    return hidden, kernel.astype(kernel_dtype), targets, weights


@functools.partial(jax.jit, static_argnames="implementation")
def value_and_gradients(hidden, kernel, targets, weights, implementation):
    """Loss, per-token losses, and the gradients of 3 · loss."""

    def loss(hidden, kernel):
        total, nll = api.linear_cross_entropy(hidden, kernel, targets, weights, implementation=implementation)
        return 3.0 * total, nll

    (total, nll), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, kernel)
    return total / 3.0, nll, *gradients


def assert_close(got, want, dtype):
    for name, a, b in zip(("loss", "nll", "dhidden", "dkernel"), got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * max(1.0, np.abs(b).max()), rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "hidden_dtype", "kernel_dtype", "rows"),
    [
        ((1, 1, 4, 3), "float32", "float32", 1024),
        ((2, 9, 8, 50), "float32", "float32", 1024),
        ((2, 9, 8, 50), "float32", "float32", 4),
        ((3, 17, 8, 130), "bfloat16", "float32", 12),
        ((3, 17, 8, 130), "bfloat16", "bfloat16", 1),
        ((2, 16, 8, 130), "float32", "bfloat16", 8),
    ],
)
def test_equals_reference(monkeypatch, shape, hidden_dtype, kernel_dtype, rows):
    monkeypatch.setattr(xla, "ROWS_PER_DEVICE", rows)
    value_and_gradients.clear_cache()
    args = make_inputs(*shape, hidden_dtype, kernel_dtype)
    got = value_and_gradients(*args, "xla")
    want = value_and_gradients(*args, "reference")
    low = "bfloat16" if "bfloat16" in (hidden_dtype, kernel_dtype) else "float32"
    assert_close(got, want, low)
    assert [x.dtype for x in got] == [x.dtype for x in want] == ["float32", "float32", hidden_dtype, kernel_dtype]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_torch(implementation):
    hidden, kernel, targets, weights = make_inputs(2, 40, 16, 300)
    got = value_and_gradients(hidden, kernel, targets, weights, implementation)
    h, k = (torch.tensor(np.asarray(x)).requires_grad_() for x in (hidden, kernel))
    nll = torch.nn.functional.cross_entropy(
        (h @ k).flatten(0, 1), torch.tensor(np.asarray(targets)).long().flatten(), reduction="none"
    ).reshape(2, 40)
    total = (nll * torch.tensor(np.asarray(weights))).sum()
    (3 * total).backward()
    assert_close(got, [x.detach().numpy() for x in (total, nll, h.grad, k.grad)], "float32")


def test_tokens_of_weight_zero_contribute_nothing():
    hidden, kernel, targets, _ = make_inputs(2, 40, 16, 300)
    weights = jnp.zeros((2, 40)).at[:, :10].set(1.0)
    loss, _, dhidden, dkernel = value_and_gradients(hidden, kernel, targets, weights, "xla")
    cut = value_and_gradients(hidden[:, :10], kernel, targets[:, :10], weights[:, :10], "xla")
    np.testing.assert_allclose(loss, cut[0], rtol=1e-6)
    np.testing.assert_allclose(dkernel, cut[3], atol=1e-6)
    np.testing.assert_array_equal(dhidden[:, 10:], 0.0)
    other = value_and_gradients(hidden.at[:, 10:].set(1e3), kernel, targets.at[:, 10:].set(0), weights, "xla")
    np.testing.assert_array_equal(other[0], loss)
    np.testing.assert_array_equal(other[3], dkernel)


def test_token_losses_and_weights_have_no_gradient():
    hidden, kernel, targets, weights = make_inputs(1, 5, 4, 7)
    for implementation in ("reference", "xla"):
        call = functools.partial(api.linear_cross_entropy, implementation=implementation)
        by_nll = jax.grad(lambda h, k, call=call: call(h, k, targets, weights)[1].sum(), (0, 1))(hidden, kernel)
        by_weights = jax.grad(lambda w, call=call: call(hidden, kernel, targets, w)[0])(weights)
        for gradient in (*by_nll, by_weights):
            np.testing.assert_array_equal(gradient, 0.0)


def test_under_vmap_and_remat():
    hidden, kernel, targets, weights = make_inputs(3, 12, 8, 50)

    def loss(hidden, kernel, targets, weights):
        return api.linear_cross_entropy(hidden[None], kernel, targets[None], weights[None])[0]

    gradient = jax.vmap(jax.grad(jax.checkpoint(loss), (0, 1)), (0, None, 0, 0))
    dhidden, dkernel = jax.jit(gradient)(hidden, kernel, targets, weights)
    want = value_and_gradients(hidden, kernel, targets, weights, "reference")
    np.testing.assert_allclose(3 * dhidden, want[2], atol=1e-5)
    np.testing.assert_allclose(3 * dkernel.sum(0), want[3], atol=1e-5)


def test_deterministic():
    args = make_inputs(2, 40, 16, 300)
    for a, b in zip(value_and_gradients(*args, "xla"), value_and_gradients(*args, "xla"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_chunks_are_bounded():
    assert xla.chunk_length(8, 512, 16_384, 1) == 128  # 1,024 rows
    assert xla.chunk_length(1, 32_768, 73_448, 1) <= 2**28 // (4 * 73_448)
    assert xla.chunk_length(2048, 512, 73_448, 1) == 1  # never less than a token
    assert xla.chunk_length(8, 5, 100, 1) == 5
    assert xla.chunk_length(512, 4096, 73_448, 512) > 700  # each device its own rows
    for seq_len in (1, 7, 100, 4097):
        length = xla.chunk_length(3, seq_len, 1000, 1)
        assert 1 <= length <= seq_len


@pytest.mark.parametrize("differentiate", [False, True])
def test_memory_does_not_hold_all_logits(differentiate):
    tokens, d_model, vocab_size = 32_768, 64, 73_448
    args = (
        jax.ShapeDtypeStruct((1, tokens, d_model), "bfloat16"),
        jax.ShapeDtypeStruct((d_model, vocab_size), "float32"),
        jax.ShapeDtypeStruct((1, tokens), "int32"),
        jax.ShapeDtypeStruct((1, tokens), "float32"),
    )

    def loss(hidden, kernel, targets, weights):
        return api.linear_cross_entropy(hidden, kernel, targets, weights)[0]

    function = jax.grad(loss, (0, 1)) if differentiate else loss
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    all_logits = 4 * tokens * vocab_size  # 9.6 GB
    assert memory.temp_size_in_bytes < 4 * xla.MAX_CHUNK_BYTES < all_logits / 8


def test_forms_no_gradient_unless_differentiated():
    args = make_inputs(1, 8, 16, 300)
    cost = jax.jit(api.linear_cross_entropy).lower(*args).compile().cost_analysis()
    with_gradient = value_and_gradients.lower(*args, "xla").compile().cost_analysis()
    product = 2 * 8 * 16 * 300
    assert cost["flops"] < 2 * product
    assert with_gradient["flops"] > 3 * product


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (1, jnp.zeros((5, 7)), r"must be \[B, T, D\] and \[D, V\]"),
        (2, jnp.zeros((2, 1), jnp.int32), r"must be \[B, T\] = \(2, 3\)"),
        (3, jnp.zeros((6,)), r"must be \[B, T\] = \(2, 3\)"),
    ],
)
def test_refuses_shapes_that_do_not_fit(index, value, message):
    args = list(make_inputs(2, 3, 4, 7))
    args[index] = value
    with pytest.raises(UnsupportedError, match=message):
        api.linear_cross_entropy(*args)


def test_refuses_an_unknown_implementation():
    with pytest.raises(UnsupportedError, match="implementation = 'triton': must be None or one of 'reference', 'xla'"):
        api.linear_cross_entropy(*make_inputs(2, 3, 4, 7), implementation="triton")
