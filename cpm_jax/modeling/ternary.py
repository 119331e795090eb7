"""Ternary weights: -1, 0 or 1 times a scale (BitCPM4, MiniCPM4 report §3.3; BitNet b1.58, arXiv:2402.17764).

A group's scale is the mean magnitude of its weights, and a weight w becomes the nearest of -s, 0 and s:

    s = max(mean |w|, 2^-14)        w' = clip(round(w / s), -1, 1) · s

Training multiplies with w' and updates w, whose gradient is that of w' unchanged (straight-through estimator).
A scale is rounded to float16, which is what packed files store, so that training sees the values that they hold. 2^-14
is float16's smallest normal number; a group that is smaller throughout rounds to zeros.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cpm_jax.modeling.config import PER_CHANNEL, PER_TENSOR, ModelConfig

SMALLEST_SCALE = 2.0**-14
_LAYERS = ("layers", "mtp_layers")  # whose kernels are ternary; the head's is not


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fake_quantize(kernel: Float[Array, "*lead in out"], group_size: int) -> Float[Array, "*lead in out"]:
    """Rounds weights to three values; the gradient passes through as it is.

    Args:
        kernel: weights of one layer or of a stack.
        group_size: as `TernaryConfig.group_size`.

    Returns:
        -s, 0 or s for each weight, in the type of `kernel`.

    Raises:
        ValueError: the group size does not divide the inputs.
    """
    *lead, inputs, outputs = kernel.shape
    size = inputs if group_size in (PER_TENSOR, PER_CHANNEL) else group_size
    if size < 1 or inputs % size:
        raise ValueError(f"group_size = {group_size}: does not divide the {inputs} inputs of a matrix {kernel.shape}")
    groups = kernel.astype(jnp.float32).reshape(*lead, inputs // size, size, outputs)
    shared = (-2, -1) if group_size == PER_TENSOR else -2
    mean = jnp.mean(jnp.abs(groups), axis=shared, keepdims=True)
    # Not two conversions, which the compiler may remove as a pair that only loses precision.
    scale = jax.lax.reduce_precision(jnp.maximum(mean, SMALLEST_SCALE), exponent_bits=5, mantissa_bits=10)
    codes = jnp.clip(jnp.round(groups / scale), -1, 1)
    return (codes * scale).reshape(kernel.shape).astype(kernel.dtype)


def _forward(kernel: Array, group_size: int) -> tuple[Array, None]:
    return fake_quantize(kernel, group_size), None


def _backward(group_size: int, residuals: None, gradient: Array) -> tuple[Array]:
    return (gradient,)


fake_quantize.defvjp(_forward, _backward)


def materialize(config: ModelConfig, params: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """A ternary model as an ordinary one: its weights are the rounded values, and its config rounds nothing.

    It computes the same. What runs or exports a model takes it in this form, as rounding twice finds other scales.

    Args:
        config: of any model; one that is not ternary comes back as it is.
        params: with the structure of `decoder.abstract_params(config)`.
    """
    if config.ternary is None:
        return config, params
    group_size = config.ternary.group_size

    def rounded(path: tuple[jax.tree_util.DictKey, ...], leaf: Any) -> Any:
        if path[-1].key != "kernel":
            return leaf
        sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
        return jax.jit(fake_quantize, static_argnums=1, out_shardings=sharding)(leaf, group_size)

    layers = {name: jax.tree_util.tree_map_with_path(rounded, params[name]) for name in _LAYERS if name in params}
    return dataclasses.replace(config, ternary=None), params | layers
