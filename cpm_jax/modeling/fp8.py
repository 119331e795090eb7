"""Matrix products with FP8 operands, scaled in blocks (MiniCPM4 report §2.3, after DeepSeek-V3 §3.3.2).

Operands are E4M3 (3 bits of mantissa, largest value 448) times a scale: one for each 128 x 128 block of a weight, and
for activations one for each token's 128 channels along the contraction. Scales are found online, from the block's
largest magnitude, and sums are float32. Three products belong to a linear layer:

    y  = Q(x) Q(W)        FP8
    dx = Q(dy) Q(W)ᵀ      FP8; square blocks make the transposed weight's scales those of the weight
    dW = xᵀ dy            bfloat16

Scales are powers of two, rounded up from amax / 448. An E4M3 value times a power of two is a bfloat16 value, exactly,
so that Q(x) Q(W) with its scales inside the sum is one bfloat16 product with float32 sums, on every device, and equals
the product of FP8 numbers whose scales are applied outside. It needs no FP8 units and gains no speed from them.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

BLOCK = 128
E4M3_MAX = 448.0
# Blocks smaller than this become zeros; keeps scales far from underflow.
SMALLEST_AMAX = 1e-30


@jax.custom_vjp
def fp8_matmul(x: Float[Array, "... in"], kernel: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """Multiplies as FP8 training does, in the forward and the backward pass.

    Sizes need not be multiples of 128: the last block of a dimension is smaller.

    Args:
        x: activations, bfloat16 or float32.
        kernel: the weight, in the type it is stored in.

    Returns:
        x @ kernel in the type of `x`. The gradient of `kernel` comes in the type of `kernel`.
    """
    return _f32_matmul(quantize_activation(x), quantize_weight(kernel)).astype(x.dtype)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return fp8_matmul(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    dx = _f32_matmul(quantize_activation(dy), quantize_weight(kernel).T).astype(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.bfloat16)
    drows = dy.reshape(-1, dy.shape[-1]).astype(jnp.bfloat16)
    return dx, _f32_matmul(rows.T, drows).astype(kernel.dtype)


fp8_matmul.defvjp(_forward, _backward)


def quantize_activation(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Rounds to E4M3 with a scale for every 128 values of the last dimension; the result is exact in bfloat16."""
    channels = x.shape[-1]
    padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -channels % BLOCK)])
    blocks = padded.reshape(*x.shape[:-1], -1, BLOCK)
    return _round_blocks(blocks, (-1,)).reshape(padded.shape)[..., :channels]


def quantize_weight(kernel: Float[Array, "in out"]) -> Float[Array, "in out"]:
    """Rounds to E4M3 with a scale for every 128 x 128 block; the result is exact in bfloat16."""
    rows, columns = kernel.shape
    padded = jnp.pad(kernel.astype(jnp.float32), ((0, -rows % BLOCK), (0, -columns % BLOCK)))
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    return _round_blocks(blocks, (1, 3)).reshape(padded.shape)[:rows, :columns]


def _round_blocks(blocks: Array, axes: tuple[int, ...]) -> Array:
    """Rounds float32 values to E4M3 with a scale shared along `axes`; returns value times scale in bfloat16."""
    amax = jnp.maximum(jnp.max(jnp.abs(blocks), axis=axes, keepdims=True), SMALLEST_AMAX)
    mantissa, exponent = jnp.frexp(amax / E4M3_MAX)  # mantissa in [0.5, 1)
    scale = jnp.ldexp(jnp.float32(1.0), exponent - (mantissa == 0.5))
    # The barrier keeps the compiler from removing the two conversions as a pair that only loses precision.
    values = lax.optimization_barrier((blocks / scale).astype(jnp.float8_e4m3fn))
    return values.astype(jnp.bfloat16) * scale.astype(jnp.bfloat16)


def _f32_matmul(x: Array, y: Array) -> Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)
