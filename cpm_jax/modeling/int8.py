"""Weight-only int8: kernels as codes with a scale for each output, which the matrix product reads as they are.

An output's scale is a factor of its whole sum, x @ (codes · scales) = (x @ codes) · scales, so that no kernel in
floating point is ever part of the parameters: a quarter of float32's bytes, half of bfloat16's. A code is exact in
bfloat16, sums are float32, and the scale is applied to them before the one rounding to the type of `x`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int8

from cpm_jax.common.config import ConfigError
from cpm_jax.common.sharding import is_divided
from cpm_jax.modeling.absmax import quantize_absmax
from cpm_jax.modeling.config import ModelConfig

# What the kernels of linear layers are held in; "" is what they are.
WeightDType = Literal["", "int8"]

# Outputs whose codes are in float together. A kernel that XLA sees converted as a whole it converts once, before the
# loop over tokens, and keeps in float; where kernels are unrolled, XLA on CPU converts many of them ahead of their use.
OUTPUT_BLOCK = 256


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Kernel:
    """A linear layer's kernel, or a stack of them, in the place that its array has in the parameters.

    Attributes:
        codes: of each weight.
        scales: of each output.
    """

    codes: Int8[Array, "... K N"]
    scales: BFloat16[Array, "... N"]


@jax.jit
def quantize_kernel(kernel: Float[Array, "... K N"]) -> Int8Kernel:
    """Rounds a kernel, or a stack of them, to the nearest codes."""
    return Int8Kernel(*quantize_absmax(kernel, 8, axis=-2))


def int8_matmul(x: Float[Array, "... K"], kernel: Int8Kernel) -> Float[Array, "... N"]:
    """x @ kernel in the type of `x`, some outputs at a time."""
    outputs = kernel.codes.shape[-1]
    if is_divided():
        return _product(x, kernel.codes, kernel.scales)  # some outputs would be on one device
    number = max(2, -(-outputs // OUTPUT_BLOCK))
    size = -(-outputs // number)

    def add_block(index: Array, out: Array) -> Array:
        first = jnp.minimum(index * size, outputs - size)  # The last block may overlap the one before it.
        block = (jax.lax.dynamic_slice_in_dim(leaf, first, size, axis=-1) for leaf in (kernel.codes, kernel.scales))
        return jax.lax.dynamic_update_slice_in_dim(out, _product(x, *block), first, axis=-1)

    return jax.lax.fori_loop(0, number, add_block, jnp.zeros((*x.shape[:-1], outputs), x.dtype))


def _product(x: Array, codes: Array, scales: Array) -> Array:
    sums = jnp.matmul(x, codes.astype(x.dtype), preferred_element_type=jnp.float32)
    return (sums * scales.astype(jnp.float32)).astype(x.dtype)


def quantize_layers(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with the kernels of all layers in int8; embedding, norms, head and MTP layers stay as they are.

    Args:
        config: of the model.
        params: with the structure of `decoder.abstract_params(config)`.

    Raises:
        ConfigError: the model multiplies in FP8.
    """
    if config.fp8:
        raise ConfigError(
            "weight_dtype = 'int8': the model multiplies in FP8 (ModelConfig.fp8), which takes its scales from weights "
            "in floating point; leave weight_dtype ''",
            field="weight_dtype",
        )

    def quantize(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.Array) -> jax.Array | Int8Kernel:
        return quantize_kernel(leaf) if path[-1].key == "kernel" else leaf

    return params | {"layers": jax.tree_util.tree_map_with_path(quantize, params["layers"])}
