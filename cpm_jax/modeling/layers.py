"""The parts that hold parameters: linear projection, RMSNorm, embedding.

A module only declares its parameters: each is an `nnx.Param` that holds a shape and a dtype, and carries as metadata
its logical axes and the mean and standard deviation of its initial values. `decoder.py` reads these declarations to
draw, describe and bind the parameter tree, so that no array is ever made by building a module.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from cpm_jax.common.sharding import activation_spec, is_divided
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.fp8 import fp8_matmul
from cpm_jax.modeling.int8 import Int8Kernel, int8_matmul
from cpm_jax.modeling.ternary import fake_quantize
from kernels_pallas.collectives import axis_names, gather_parameter


def declare_param(
    config: ModelConfig, shape: tuple[int, ...], axes: tuple[str, ...], *, mean: float = 0.0, std: float = 0.0
) -> nnx.Param:
    """Declares a parameter whose initial values are normal with the given mean and standard deviation."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.dtype(config.param_dtype)), axes=axes, mean=mean, std=std)


def factor(value: float | jax.Array, dtype: Any) -> float | jax.Array:
    """A multiplier for activations of a dtype: a number as it is, which compilers see; a traced scalar converted."""
    return value if isinstance(value, (int, float)) else value.astype(dtype)


def hidden_std(config: ModelConfig) -> float:
    """Initial standard deviation of a hidden matrix.

    `initializer_range` under standard parametrisation. Under µP it is divided by the square root of the width
    multiplier d_model / dim_model_base, as in MiniCPM's table of µP operations (arXiv 2404.06395, appendix) and as µP
    asks of matrices whose fan-in grows with width: the variance of their outputs then does not depend on the width.
    The embedding and the language-model head keep `initializer_range`: neither sums over a width that grows without
    a multiplier (the head's input is multiplied by dim_model_base / d_model).
    """
    return config.initializer_range / config.width_multiplier**0.5


class Linear(nnx.Module):
    """A matrix product, with a bias on request, in the dtype of its input.

    Operands are FP8 when `config.fp8`; the kernel is rounded to three values when `config.ternary`.

    Parameters: kernel [in, out] (for inference also an `Int8Kernel`), bias [out].
    """

    def __init__(
        self, config: ModelConfig, in_features: int, out_features: int, axes: tuple[str, str], *, use_bias: bool = False
    ):
        """Declares the parameters.

        Args:
            config: gives dtypes, the initial scale and how operands are rounded.
            in_features: size of the input's last dimension.
            out_features: size of the output's last dimension.
            axes: logical axes of the two dimensions of the kernel.
            use_bias: whether a bias is added.
        """
        self.fp8, self.ternary = config.fp8, config.ternary
        self.kernel = declare_param(config, (in_features, out_features), axes, std=hidden_std(config))
        self.bias = declare_param(config, (out_features,), axes[1:]) if use_bias else None

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Projects the last dimension of x."""
        kernel = self.kernel.get_value()
        if self.ternary is not None:
            kernel = fake_quantize(kernel, self.ternary.group_size)
        # Rows that are not divided over devices become one dimension: the kernel's gradient is then a product of two
        # matrices as they lie, where XLA on CPU would recompute what it sums over into a transposed copy.
        rows = x if is_divided() else x.reshape(-1, x.shape[-1])
        if isinstance(kernel, Int8Kernel):
            out = int8_matmul(rows, kernel)
        else:
            out = fp8_matmul(rows, kernel) if self.fp8 else rows @ kernel.astype(x.dtype)
        out = out.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias[...].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last dimension, computed in float32 (arXiv 1910.07467).

    Parameters: scale [D].
    """

    def __init__(self, config: ModelConfig):
        self.eps = config.rms_norm_eps
        self.scale = declare_param(config, (config.d_model,), ("norm",), mean=1.0)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises x, keeping its dtype."""
        wide = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * inverse_rms * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Embed(nnx.Module):
    """The token embedding.

    Parameters: embedding [V, D].
    """

    def __init__(self, config: ModelConfig):
        self.dtype = config.dtype
        self.embedding = declare_param(
            config, (config.vocab_size, config.d_model), ("vocab", "embed"), std=config.initializer_range
        )

    def __call__(self, tokens: Int[Array, "B T"], scale: float | jax.Array) -> Float[Array, "B T D"]:
        """Looks up tokens; the result has the compute dtype.

        Args:
            tokens: token ids.
            scale: factor on the result, `multipliers.embedding` of the decoder.
        """
        table = self.embedding[...]
        scale = factor(scale, self.dtype)
        rows = activation_spec(("batch", "length"), tokens.shape)
        if rows is None or not any(rows):
            return table[tokens].astype(self.dtype) * scale
        token_axes = axis_names(rows[0]) + axis_names(rows[1])
        parts = axis_names(activation_spec(("vocab", "embed"), table.shape)[1])  # type: ignore[index]

        # Each device looks up its own tokens in the whole table, and sums its gradient into its part of it: left to
        # itself the partitioner sums the gradient of the whole table on every device. A divided vocabulary stays so.
        def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
            if parts:
                table = gather_parameter(parts, 1, jnp.dtype(self.dtype), table)
            return table[tokens].astype(self.dtype) * scale

        return jax.shard_map(
            look_up,
            in_specs=(PartitionSpec(None, parts or None), rows),
            out_specs=PartitionSpec(*rows, None),
            axis_names={*token_axes, *parts},
            check_vma=False,
        )(table, tokens)


class Head(nnx.Module):
    """The language-model head of a model whose embedding is not tied.

    Parameters: kernel [D, V].
    """

    def __init__(self, config: ModelConfig):
        self.kernel = declare_param(
            config, (config.d_model, config.vocab_size), ("embed", "vocab"), std=config.initializer_range
        )
