"""FP8 products against a plain numpy transcription of the scheme."""

import dataclasses
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from cpm_jax.modeling.fp8 import fp8_matmul, quantize_activation, quantize_weight
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import wsd
from cpm_jax.training.train_state import init_state
from cpm_jax.training.train_step import make_train_step


def scale_of(block):
    """The power of two above amax / 448, by which the block is divided; 1 for a block of zeros."""
    amax = np.abs(block).max()
    return 2.0 ** np.ceil(np.log2(amax / 448.0)) if amax else 1.0


def e4m3(block, scale):
    return (block / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def plain_product(x, w):
    """x [rows, in] times w [in, out]: FP8 values per block, scales outside each block's sum, all in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    out = np.zeros((x.shape[0], w.shape[1]))
    for start in range(0, x.shape[1], 128):
        inner = slice(start, start + 128)
        for column in range(0, w.shape[1], 128):
            outer = slice(column, column + 128)
            w_scale = scale_of(w[inner, outer])
            w_values = e4m3(w[inner, outer], w_scale)
            for row in range(x.shape[0]):
                x_scale = scale_of(x[row, inner])
                out[row, outer] += x_scale * w_scale * (e4m3(x[row, inner], x_scale) @ w_values)
    return out


def make_inputs(rows, d_in, d_out, dtype="float32"):
    rng = np.random.default_rng(0)
    # Widely different magnitudes, so that a wrong block's scale shows.
    x = rng.normal(size=(rows, d_in)) * np.exp(rng.normal(size=(rows, 1)) * 2) * np.exp(rng.normal(size=d_in))
    w = rng.normal(size=(d_in, d_out)) * np.exp(rng.normal(size=(d_in, 1)) * 2)
    dy = rng.normal(size=(rows, d_out))
    return tuple(jnp.asarray(a, dtype) for a in (x, w, dy))


def product_and_gradients(x, w, dy):
    y, vjp = jax.vjp(fp8_matmul, x, w)
    return y, *vjp(dy)


@pytest.mark.parametrize("shape", [(4, 256, 384), (3, 130, 200), (5, 7, 1), (1, 300, 128)])
def test_equals_the_plain_reference(shape):
    x, w, dy = make_inputs(*shape)
    y, dx, dw = jax.jit(product_and_gradients)(x, w, dy)
    bf16 = [np.asarray(a).astype(ml_dtypes.bfloat16).astype(np.float64) for a in (x, dy)]
    for got, want in (
        (y, plain_product(x, w)),
        (dx, plain_product(dy, np.asarray(w).T)),
        (dw, bf16[0].T @ bf16[1]),
    ):
        np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max(), rtol=1e-4)


def test_types_and_leading_dimensions():
    x, w, dy = make_inputs(6, 130, 140, "bfloat16")
    y, dx, dw = jax.jit(product_and_gradients)(x, w, dy)
    assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16
    folded = jax.jit(product_and_gradients)(x.reshape(2, 3, 130), w.astype(jnp.float32), dy.reshape(2, 3, 140))
    assert folded[2].dtype == jnp.float32
    np.testing.assert_array_equal(folded[0].reshape(6, 140), y)
    np.testing.assert_array_equal(folded[1].reshape(6, 130), dx)
    np.testing.assert_array_equal(folded[2].astype(jnp.bfloat16), dw)


def test_zeros_stay_zeros_and_blocks_keep_to_themselves():
    x = jnp.zeros((2, 256)).at[0, 0].set(1e20).at[1, 200].set(1e-20)
    got = jax.jit(quantize_activation)(x)
    np.testing.assert_allclose(got.astype(jnp.float32), x, rtol=2**-4)
    np.testing.assert_array_equal(got == 0, x == 0)
    w = jnp.zeros((256, 200)).at[0, 0].set(1e10).at[130, 130].set(1e-10)
    np.testing.assert_allclose(jax.jit(quantize_weight)(w).astype(jnp.float32), w, rtol=2**-4)
    for gradient in jax.jit(product_and_gradients)(jnp.zeros((2, 200)), jnp.zeros((200, 3)), jnp.zeros((2, 3))):
        np.testing.assert_array_equal(gradient, 0.0)


def test_the_largest_value_of_a_block_does_not_overflow():
    amax = jnp.float32(448.0) * 2.0 ** jnp.arange(-20, 20)[:, None]
    for factor in (1.0, 1.0 + 2**-23, 1.0 - 2**-24, 1.5, 1.999999):
        x = factor * amax * jnp.array([1.0, -0.5])
        got = jax.jit(quantize_activation)(x).astype(jnp.float32)
        np.testing.assert_allclose(got, x, rtol=2**-4)
        # 16 values to the octave in the upper octaves: powers of two below the largest are exact.
        if factor == 1.0:
            np.testing.assert_array_equal(got, x)


def test_error_is_that_of_three_mantissa_bits():
    x, w, _ = make_inputs(64, 512, 256)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    error = np.linalg.norm(jax.jit(fp8_matmul)(x, w) - exact) / np.linalg.norm(exact)
    # Uniform rounding errors of up to 2^-4 in both operands: about 2^-4 / sqrt(3) * sqrt(2) * (2/3) of the norm.
    assert 0.01 < error < 0.06


def test_vmap_and_remat():
    x, w, dy = make_inputs(4, 130, 40)
    want = jax.jit(product_and_gradients)(x, w, dy)
    remat = jax.jit(lambda x, w, dy: jax.vjp(jax.checkpoint(fp8_matmul), x, w)[1](dy))(x, w, dy)
    np.testing.assert_allclose(remat[0], want[1], rtol=1e-5)
    mapped = jax.jit(jax.vmap(product_and_gradients, (0, None, 0)))(x, w, dy)
    np.testing.assert_allclose(mapped[0], want[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(mapped[2].sum(0), want[2], rtol=1e-3, atol=1e-3)


def book_of_code(length):
    """Bytes of the Python standard library's source."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return np.frombuffer(text[:length], np.uint8).astype(np.int32)


def train(config, data, steps, batch_size, seq_len):
    """Losses of a run; the batches depend on the step alone."""
    schedule = wsd(peak_lr=1e-2, train_steps=steps, warmup_steps=20, decay_steps=steps // 4)
    optimizer = make_optimizer(OptimizerConfig(), schedule, config)
    step, state = make_train_step(config, optimizer), init_state(config, optimizer, jax.random.key(0))
    losses = []
    for i in range(steps):
        starts = np.random.default_rng(i).integers(0, len(data) - seq_len - 1, batch_size)
        rows = np.stack([data[start : start + seq_len + 1] for start in starts])
        ones = np.ones((batch_size, seq_len), np.int32)
        batch = {
            "tokens": rows[:, :-1],
            "targets": rows[:, 1:],
            "loss_weights": ones.astype(np.float32),
            "segment_ids": ones,
            "positions": np.broadcast_to(np.arange(seq_len, dtype=np.int32), ones.shape),
            "source_ids": np.zeros(batch_size, np.int32),
        }
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses)


@pytest.mark.slow
def test_training_on_real_text_ends_within_a_percent_of_bf16(tiny_config):
    config = dataclasses.replace(
        tiny_config, vocab_size=256, d_model=160, d_ff=320, num_layers=3, dtype="bfloat16", scan_layers=False
    )
    data = book_of_code(2_000_000)
    bf16 = train(config, data, steps=200, batch_size=8, seq_len=128)
    fp8 = train(dataclasses.replace(config, fp8=True), data, steps=200, batch_size=8, seq_len=128)
    assert not np.array_equal(bf16[:5], fp8[:5])
    assert bf16[-20:].mean() < 0.6 * bf16[0]
    assert fp8[-20:].mean() == pytest.approx(bf16[-20:].mean(), rel=0.01)
