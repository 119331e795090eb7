"""Activation-aware smoothing (AWQ, Lin et al., arXiv 2306.00978): what the report calls S-.

Inputs of a layer with large activations matter most. Their weights are multiplied by s before quantisation and the
activations divided by s where they are made: in the norm before q, k, v or gate, up; in v's outputs before o; in up's
outputs before down. In float nothing changes. s = mean|x|^a, with the exponent a that gives the least error of the
quantised layers' outputs.

The error comes from the second moments of the inputs alone: the squared error of x (W' - W) summed over tokens is
tr((W' - W)ᵀ H (W' - W)). So the search needs no second look at the data.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.gptq import output_error
from cpm_jax.quantization.layer import GROUPS, InputStatistics, linear_of
from cpm_jax.quantization.symmetric import dequantize, quantize_nearest

_LEAST = 1e-4  # of a scale before it is normalised: an input that is never active


def shared_magnitudes(magnitudes: Float[Array, " N*H"], num_kv_heads: int, head_size: int) -> Float[Array, " N*H"]:
    """Magnitudes of o's inputs, equal for all query heads of one value head: the mean over them.

    Dividing a value head's outputs by s divides the inputs of all the query heads that read it.
    """
    heads = magnitudes.reshape(num_kv_heads, -1, head_size)
    return jnp.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape).reshape(-1)


@functools.partial(jax.jit, static_argnames=("group_size", "bits", "steps"))
def search_scales(
    kernels: Sequence[Float[Array, "K _"]],
    hessian: Float[Array, "K K"],
    magnitudes: Float[Array, " K"],
    *,
    group_size: int,
    bits: int,
    steps: int,
) -> tuple[Float[Array, " K"], Float[Array, ""]]:
    """The scales of the inputs with the least error of the outputs of layers that share these inputs.

    Tried are mean|x|^a for a = 0, 1/steps, …, (steps - 1)/steps, each divided so that its extremes multiply to 1. The
    layers are rounded to nearest for it, as in AWQ, whatever quantises them afterwards.

    Args:
        kernels: of the layers, inputs first.
        hessian: second moments of the inputs.
        magnitudes: mean |x| of each input.
        group_size: inputs that share a scale of the quantisation.
        bits: of a code.
        steps: number of exponents to try.

    Returns:
        What to multiply the rows of the kernels by, and the exponent.
    """
    kernel = jnp.concatenate(list(kernels), axis=1).astype(jnp.float32)

    def scales_of(exponent: jax.Array) -> jax.Array:
        scales = jnp.maximum(magnitudes, _LEAST) ** exponent
        return scales / jnp.sqrt(jnp.max(scales) * jnp.min(scales))

    def error_of(exponent: jax.Array) -> jax.Array:
        scales = scales_of(exponent)[:, None]
        codes, steps_of_codes = quantize_nearest(kernel * scales, group_size=group_size, bits=bits)
        return output_error(kernel, dequantize(codes, steps_of_codes) / scales, hessian)

    exponents = jnp.arange(steps) / steps
    best = exponents[jnp.argmin(jax.lax.map(error_of, exponents))]
    return scales_of(best), best


def smooth_layer(
    layer: Params,
    config: ModelConfig,
    quantization: QuantizationConfig,
    statistics: Mapping[int, InputStatistics],
) -> dict[str, float]:
    """Scales the inputs of all linear layers of a decoder layer up, and what makes them down.

    Args:
        layer: numpy arrays, changed in place.
        config: of the model.
        quantization: group size, bits, number of exponents.
        statistics: of the inputs of each of `GROUPS`, in the layer as it is given.

    Returns:
        The exponent of each group, by the name of its first linear layer.
    """
    attention, mlp = layer["self_attn"], layer["mlp"]
    # What makes the inputs of each group: arrays whose last dimension is theirs.
    makers = (
        [layer["input_layernorm"]["scale"]],
        list(attention["v_proj"].values()),  # the kernel, and a bias
        [layer["post_attention_layernorm"]["scale"]],
        [mlp["up_proj"]["kernel"]],
    )
    exponents = {}
    for group, names in enumerate(GROUPS):
        hessian, magnitudes = statistics[group]
        of_heads = names == ("self_attn/o_proj",)
        if of_heads:
            magnitudes = shared_magnitudes(magnitudes, config.num_kv_heads, config.head_size)
        kernels = [linear_of(layer, name)["kernel"] for name in names]
        found, exponent = search_scales(
            [jnp.array(kernel) for kernel in kernels],
            hessian,
            magnitudes,
            group_size=quantization.group_size_of(len(hessian), names[0]),
            bits=quantization.bits,
            steps=quantization.smoothing_steps,
        )
        scales = np.asarray(found)
        exponents[names[0]] = float(exponent)
        for kernel in kernels:
            kernel[...] = kernel * scales[:, None]
        if of_heads:
            scales = scales.reshape(config.num_kv_heads, -1, config.head_size)[:, 0].reshape(-1)
        for maker in makers[group]:
            maker[...] = maker / scales
    return exponents
