"""GPTQ (Frantar et al., arXiv 2210.17323): each rounding error is made up for in the weights not yet rounded.

Weights are rounded input by input, in their order (no `desc_act`), to scales that are fixed before (`static_groups`).
With H the second moments of the inputs, rounding input i off by e changes the outputs least, in squares, if the later
weights change by -e · U[i, later] / U[i, i], where U is the upper triangular matrix with H⁻¹ = Uᵀ U.

All is float32. Damping bounds the condition of H by K / damping; U is found without forming H⁻¹, from one Cholesky
factorisation of H in reversed order and one triangular solve. Tests hold it against float64, with massive activations
too; where float32 cannot factorise H, that is said, and more damping helps.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from cpm_jax.quantization.symmetric import group_scales, round_to_codes

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def second_moments(inputs: Float[Array, "B T K"], skip_initial_tokens: int) -> Float[Array, "K K"]:
    """The sum of x xᵀ over all tokens but the first ones of each sequence, in float32.

    GPTQ's Hessian up to a factor, which changes nothing. With `skip_initial_tokens` = s it is X[s:]ᵀ X[s:] of each
    sequence, Eq. 12 of the MiniCPM4 report.
    """
    valid = inputs[:, skip_initial_tokens:].reshape(-1, inputs.shape[-1]).astype(jnp.float32)
    return _matmul(valid.T, valid)


def inverse_factor(hessian: Float[Array, "K K"], damping: float) -> Float[Array, "K K"]:
    """The upper triangular U with (H + damping · mean(diag H) · I)⁻¹ = Uᵀ U.

    An input that is always zero gets 1 on the diagonal: nothing depends on it.
    """
    diagonal = jnp.diagonal(hessian)
    size = len(diagonal)
    added = damping * jnp.mean(diagonal) + jnp.where(diagonal == 0, 1.0, 0.0)
    damped = hessian.astype(jnp.float32) + jnp.diag(added)
    # H = V Vᵀ with V upper triangular, by the lower factor of H with rows and columns reversed; then U = V⁻¹.
    upper = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(upper, jnp.eye(size, dtype=jnp.float32), lower=False)


@functools.partial(jax.jit, static_argnames=("group_size", "bits", "damping", "block_size"))
def quantize_gptq(
    kernel: Float[Array, "K N"],
    hessian: Float[Array, "K K"],
    *,
    group_size: int,
    bits: int,
    damping: float = 0.01,
    block_size: int = 128,
) -> tuple[Int8[Array, "K N"], Float[Array, "K/g N"]]:
    """Quantises a layer by GPTQ.

    Args:
        kernel: weights, inputs first.
        hessian: second moments of the inputs, of any scale.
        group_size: inputs that share a scale; divides K.
        bits: of a code.
        damping: added to the diagonal of the Hessian, in units of its mean.
        block_size: inputs whose error is passed on within the block at once, and beyond it when the block is done. It
            changes the time, and nothing else but the order of summation.

    Returns:
        Codes and scales; scales that are not numbers where the damped Hessian has no Cholesky factor in float32.
    """
    size, width = kernel.shape
    # Weights of an input that is always zero may as well be zero (as in the paper's code).
    alive = jnp.diagonal(hessian) != 0
    kernel = jnp.where(alive[:, None], kernel.astype(jnp.float32), 0.0)
    scales = group_scales(kernel, group_size, bits)
    factor = inverse_factor(hessian, damping)
    # Codes have no value that says so: without it they would be zeros.
    scales = jnp.where(jnp.all(jnp.isfinite(factor)), scales, jnp.nan)

    block_size = min(block_size, size)
    padding = -size % block_size
    weights = jnp.pad(kernel, ((0, padding), (0, 0)))
    steps = jnp.pad(jnp.repeat(scales, group_size, axis=0), ((0, padding), (0, 0)), constant_values=1.0)
    factor = jnp.pad(factor, ((0, padding), (0, padding))) + jnp.diag(
        jnp.where(jnp.arange(size + padding) < size, 0.0, 1.0)
    )

    def block(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weights, codes = carry
        start = index * block_size
        rows = jax.lax.dynamic_slice_in_dim(factor, start, block_size, 0)
        within = jax.lax.dynamic_slice_in_dim(rows, start, block_size, 1)
        own_steps = jax.lax.dynamic_slice_in_dim(steps, start, block_size, 0)

        def column(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            own, own_codes, errors = carry
            code = round_to_codes(own[i], own_steps[i], bits)
            error = (own[i] - code * own_steps[i]) / within[i, i]
            own = own - within[i][:, None] * error  # zero to the left of the diagonal: what is rounded stays
            return own, own_codes.at[i].set(code), errors.at[i].set(error)

        own = jax.lax.dynamic_slice_in_dim(weights, start, block_size, 0)
        zeros = jnp.zeros_like(own)
        _, own_codes, errors = jax.lax.fori_loop(0, block_size, column, (own, zeros, zeros))
        # Rows of this block change too, but are not read again; those before it have zeros in the factor.
        weights = weights - _matmul(rows.T, errors)
        return weights, jax.lax.dynamic_update_slice_in_dim(codes, own_codes.astype(jnp.int8), start, 0)

    codes = jnp.zeros((size + padding, width), jnp.int8)
    _, codes = jax.lax.fori_loop(0, (size + padding) // block_size, block, (weights, codes))
    return codes[:size], scales


@jax.jit
def output_error(
    kernel: Float[Array, "K N"], quantized: Float[Array, "K N"], hessian: Float[Array, "K K"]
) -> Float[Array, ""]:
    """The squared error of a layer's outputs on the calibration data, as a share of their squares."""

    def squares(weights: jax.Array) -> jax.Array:
        return jnp.sum(weights * _matmul(hessian, weights))

    return squares(quantized - kernel) / jnp.maximum(squares(kernel), jnp.finfo(jnp.float32).tiny)
