"""Quantises a model layer by layer: each layer is calibrated on what the quantised layers before it compute.

Memory: the parameters on the host, one layer and one batch of activations on the device, and on the host the residual
stream of the calibration sequences (sequences × tokens × d_model values, whatever the number of layers).

Within a layer the groups of linear layers with equal inputs go in the order of computation (`layer.GROUPS`), so that o
is calibrated on what the quantised q, k and v give it. A layer so costs a few forward passes: XLA leaves out what the
statistics of a group do not depend on.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Int8

from cpm_jax.common.progress import Progress
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params
from cpm_jax.quantization.config import QuantizationConfig, QuantizationError
from cpm_jax.quantization.gptq import output_error, quantize_gptq
from cpm_jax.quantization.layer import GROUPS, LINEARS, InputStatistics, embed, linear_of, run_layer
from cpm_jax.quantization.rotation import rotate
from cpm_jax.quantization.smoothing import smooth_layer
from cpm_jax.quantization.symmetric import dequantize, quantize_nearest


class QuantizedLinear(NamedTuple):
    """A linear layer of all decoder layers.

    Attributes:
        codes: int8, inputs first.
        scales: values of float16 in float32, one for each group of inputs and each output.
    """

    codes: Int8[np.ndarray, "L K N"]
    scales: Float[np.ndarray, "L K/g N"]


@dataclasses.dataclass(frozen=True)
class QuantizedModel:
    """What quantisation made.

    Attributes:
        config: the model's; with a rotation its head is untied.
        params: as any model's, with the linear layers' weights replaced by what their codes stand for. Exactly that
            in float32; `param_dtype` bfloat16 rounds them once more.
        linears: codes and scales by the names in `layer.LINEARS`.
        quantization: how.
        errors: of each linear layer, by decoder layer: squared error of its outputs on the calibration data as a share
            of their squares. Empty where there was no calibration data.
        exponents: of the smoothing, by the first name of each group and decoder layer; empty without.
    """

    config: ModelConfig
    params: Params
    linears: dict[str, QuantizedLinear]
    quantization: QuantizationConfig
    errors: dict[str, list[float]]
    exponents: dict[str, list[float]]


class _Calibration:
    """The residual stream of the calibration sequences, before the layer that is being quantised."""

    def __init__(self, config: ModelConfig, params: Params, tokens: np.ndarray, batch_size: int, skip: int):
        self._config, self._skip = config, skip
        table = jnp.asarray(params["embed_tokens"]["embedding"])
        batches = [tokens[start : start + batch_size] for start in range(0, len(tokens), batch_size)]
        self._streams = [np.asarray(embed(config, table, jnp.asarray(batch))) for batch in batches]

    def statistics(self, layer: Params, groups: tuple[int, ...]) -> dict[int, InputStatistics]:
        """Sums over all sequences."""
        on_device = jax.tree.map(jnp.array, layer)
        total: dict[int, InputStatistics] = {}
        for stream in self._streams:
            _, found = run_layer(self._config, on_device, stream, groups=groups, skip_initial_tokens=self._skip)
            total = jax.tree.map(jnp.add, total, found) if total else found
        return total

    def advance(self, layer: Params) -> None:
        """Goes on to the next layer."""
        on_device = jax.tree.map(jnp.array, layer)
        for index, stream in enumerate(self._streams):
            self._streams[index] = np.asarray(run_layer(self._config, on_device, stream)[0])


def quantize_model(
    params: Params,
    config: ModelConfig,
    quantization: QuantizationConfig,
    tokens: Int[np.ndarray, "n T"] | None = None,
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> QuantizedModel:
    """Quantises the linear layers of a model; embedding, norms, head and MTP layers stay as they are.

    Args:
        params: of the model; not changed.
        config: of the model.
        quantization: how.
        tokens: calibration sequences, each a row that begins where a text begins or was cut. None is allowed where
            nothing depends on them.
        batch_size: sequences that run together.
        progress: whether to show how far it is.

    Raises:
        ConfigError: the group size does not divide the inputs of a linear layer, a rotation meets MTP layers, or the
            model is ternary.
        QuantizationError: calibration data that is missing, too short or too long, or weights or activations that are
            not finite.
    """
    _check(config, quantization, tokens)
    if quantization.rotation:
        params, config = rotate(params, config, quantization.seed)
    # Calibration computes what the decoder computes, in one type and without what only training needs.
    plain = dataclasses.replace(config, fp8=False, remat="none", num_nextn_predict_layers=0)
    layers = params["layers"] if quantization.rotation else jax.tree.map(np.array, params["layers"])
    params = {**params, "layers": layers}
    linears = {name: _empty(linear_of(layers, name)["kernel"].shape, quantization, name) for name in LINEARS}
    done = QuantizedModel(config, params, linears, quantization, {}, {})
    calibration = None
    if tokens is not None:
        calibration = _Calibration(plain, params, tokens, batch_size, quantization.skip_initial_tokens)
    with Progress("quantize", config.num_layers, unit="layer", enabled=progress) as bar:
        for index in range(config.num_layers):
            layer = jax.tree.map(lambda leaf, index=index: leaf[index], layers)  # views, changed in place
            if quantization.smoothing and calibration is not None:
                statistics = calibration.statistics(layer, tuple(range(len(GROUPS))))
                for name, exponent in smooth_layer(layer, config, quantization, statistics).items():
                    done.exponents.setdefault(name, []).append(exponent)
            for group in range(len(GROUPS)):
                _quantize_group(layer, index, group, calibration, done)
            if calibration is not None and index + 1 < config.num_layers:
                calibration.advance(layer)
            figures = {name.rpartition("/")[2]: errors[-1] for name, errors in done.errors.items()}
            bar.update(index + 1, **figures)
    return done


def _check(config: ModelConfig, quantization: QuantizationConfig, tokens: np.ndarray | None) -> None:
    config.refuse_ternary("quantisation after training")
    if tokens is None:
        if quantization.calibrates:
            switch = "method = 'gptq'" if quantization.method == "gptq" else "smoothing = True"
            raise QuantizationError(
                f"QuantizationConfig.{switch} needs calibration sequences: give some, or method 'rtn' without smoothing"
            )
        return
    skip, longest = quantization.skip_initial_tokens, config.max_position_embeddings
    if tokens.ndim != 2 or not len(tokens) or not skip < tokens.shape[1] <= longest:
        raise QuantizationError(
            f"calibration sequences of shape {tokens.shape}: must be [sequences, tokens] with at least one sequence "
            f"of more than skip_initial_tokens = {skip} and at most max_position_embeddings = {longest} tokens"
        )


def _empty(shape: Sequence[int], quantization: QuantizationConfig, name: str) -> QuantizedLinear:
    layers, inputs, outputs = shape
    groups = inputs // quantization.group_size_of(inputs, name)
    return QuantizedLinear(np.zeros(shape, np.int8), np.zeros((layers, groups, outputs), np.float32))


def _quantize_group(
    layer: Params, index: int, group: int, calibration: _Calibration | None, done: QuantizedModel
) -> None:
    """Quantises the linear layers of a group, in place in the layer's parameters too."""
    quantization = done.quantization
    hessian = None if calibration is None else calibration.statistics(layer, (group,))[group].hessian
    for name in GROUPS[group]:
        kernel = linear_of(layer, name)["kernel"]
        settings: dict[str, Any] = {
            "group_size": quantization.group_size_of(len(kernel), name),
            "bits": quantization.bits,
        }
        given = jnp.array(kernel, jnp.float32)
        if quantization.method == "gptq":
            settings |= {"damping": quantization.damping, "block_size": quantization.block_size}
            codes, scales = quantize_gptq(given, hessian, **settings)
        else:
            codes, scales = quantize_nearest(given, **settings)
        quantized = dequantize(codes, scales)
        # Each by itself: XLA's maximum on CPU may pass over what is not a number.
        if not all(np.isfinite(array).all() for array in (kernel, scales, hessian) if array is not None):
            raise QuantizationError(
                f"{name} of layer {index}: weights that are not finite or beyond the range of float16 scales, "
                "activations that are not finite, or a Hessian that float32 cannot factorise: then raise "
                f"QuantizationConfig.damping = {quantization.damping}"
            )
        if hessian is not None:
            done.errors.setdefault(name, []).append(float(output_error(given, quantized, hessian)))
        done.linears[name].codes[index] = codes
        done.linears[name].scales[index] = scales
        kernel[...] = quantized
