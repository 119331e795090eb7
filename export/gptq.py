"""Writes the GPTQ checkpoint format: what vLLM, SGLang, gptqmodel and transformers load as 4-bit weights.

Of each quantised linear layer with K inputs and N outputs (names as in Hugging Face, in place of `weight`):

    qweight int32 [K·bits/32, N]    codes + 2^(bits-1), consecutive inputs from the lowest bits of a word up
    qzeros  int32 [K/g, N·bits/32]  the code of zero less one ("gptq"; "gptq_v2" would store it as it is), likewise
    scales  float16 [K/g, N]
    g_idx   int32 [K]               the group of each input

Groups follow the order of the inputs (`desc_act` false) and their scales were fixed before (`static_groups` true), as
CPM.cu asks for. All else is float16. The weights that it stands for are the fake-quantised ones of `QuantizedModel`,
bit for bit.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jaxtyping import Float, Int, Int8, Int32

from cpm_jax.checkpoints.hf_config import Layout
from cpm_jax.checkpoints.hf_layouts import Tensor, flatten, tensors
from cpm_jax.common.config import ConfigError
from cpm_jax.common.files import write_text
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import abstract_params
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.layer import LINEARS, linear_of
from cpm_jax.quantization.pipeline import QuantizedModel
from export.folders import MARK, whole_folder
from export.hf import (
    HfExport,
    StoredTensor,
    choose_layout,
    facts_table,
    hf_config,
    stored,
    write_companions,
    write_weights,
)
from export.hf_code import auto_map, code_of

WORD = 32  # bits
PACKED_BITS = (2, 4, 8)  # of a code: what divides a word
DTYPE = "float16"  # of scales, and of all that is not quantised


def pack_words(values: Int[np.ndarray, "... n"], bits: int) -> Int32[np.ndarray, "... n*bits/32"]:
    """Packs unsigned numbers of the last dimension into words, the first into the lowest bits."""
    per_word = WORD // bits
    parts = values.astype(np.uint32).reshape(*values.shape[:-1], -1, per_word)
    shifts = np.arange(per_word, dtype=np.uint32) * np.uint32(bits)
    return np.bitwise_or.reduce(parts << shifts, axis=-1).view(np.int32)


def unpack_words(words: Int32[np.ndarray, "... n*bits/32"], bits: int) -> Int[np.ndarray, "... n"]:
    """Undoes `pack_words`."""
    shifts = np.arange(WORD // bits, dtype=np.uint32) * np.uint32(bits)
    values = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return values.reshape(*words.shape[:-1], -1).astype(np.int32)


def pack_linear(codes: Int8[np.ndarray, "K N"], scales: Float[np.ndarray, "K/g N"], bits: int) -> dict[str, np.ndarray]:
    """The four tensors of one linear layer, by the last part of their names.

    Args:
        codes: signed codes, inputs first; K and N are multiples of 32 / bits.
        scales: values of float16.
        bits: of a code.
    """
    inputs, outputs = codes.shape
    zero = 1 << (bits - 1)
    return {
        "qweight": np.ascontiguousarray(pack_words(codes.T.astype(np.int32) + zero, bits).T),
        "qzeros": pack_words(np.full((len(scales), outputs), zero - 1), bits),
        "scales": scales.astype(np.float16),
        "g_idx": np.arange(inputs, dtype=np.int32) // np.int32(inputs // len(scales)),
    }


def unpack_linear(parts: Mapping[str, np.ndarray], bits: int) -> Float[np.ndarray, "N K"]:
    """The weights that the four tensors of a linear layer stand for, outputs first, as in Hugging Face's folders."""
    codes = unpack_words(np.ascontiguousarray(parts["qweight"].T), bits)
    zeros = (unpack_words(parts["qzeros"], bits) + 1) % (1 << bits)  # one less than 0 is stored as all ones
    groups = parts["g_idx"]
    return (codes - zeros[groups].T) * parts["scales"].astype(np.float32)[groups].T


def quantization_config(quantization: QuantizationConfig) -> dict[str, Any]:
    """The entry `quantization_config` of config.json."""
    return {
        "quant_method": "gptq",
        "bits": quantization.bits,
        "group_size": quantization.group_size,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "damp_percent": quantization.damping,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }


def describe(quantization: QuantizationConfig) -> str:
    """How the weights were quantised, in a line for a model card."""
    group = "one scale for each output" if quantization.group_size < 0 else f"groups of {quantization.group_size}"
    skipped = quantization.skip_initial_tokens
    parts = [f"{quantization.method.upper()}, {quantization.bits} bits, symmetric, {group}"]
    if quantization.calibrates and skipped:
        parts.append(f"calibrated without the first {skipped} tokens of each sequence")
    parts += ["activation-aware smoothing"] if quantization.smoothing else []
    parts += ["rotated residual stream"] if quantization.rotation else []
    return "; ".join(parts)


def split_tensors(quantized: QuantizedModel, layout: Layout) -> tuple[list[tuple[str, str, int]], list[Tensor]]:
    """The tensors of a layout that are quantised, and those that are not.

    Returns:
        Of each quantised one its Hugging Face name without ".weight", ours and the layer; and the other tensors.

    Raises:
        ConfigError: the layout fuses quantised layers.
    """
    ours = {f"layers/{name}/kernel": name for name in LINEARS}
    packed, rest = [], []
    for tensor in tensors(layout.names, quantized.config):
        if not any(path in ours for path in tensor.paths):
            rest.append(tensor)
        elif len(tensor.paths) == 1 and tensor.layer is not None:
            packed.append((tensor.name.removesuffix(".weight"), ours[tensor.paths[0]], tensor.layer))
        else:
            raise ConfigError(
                f"layout = {layout.model_type!r}: {tensor.name} is several linear layers in one, which no loader of "
                "GPTQ weights takes apart; choose the layout 'llama', which computes the same",
                field="layout",
            )
    return packed, rest


def write_quantized(
    quantized: QuantizedModel,
    tokenizer: Tokenizer,
    folder: Path,
    layout: Layout,
    write: Callable[[Path], tuple[str, ...]],
    card: str,
    facts: Mapping[str, str] | None,
    imported_config: Mapping[str, Any] | None,
    imported_generation_config: Mapping[str, Any] | None,
) -> HfExport:
    """Writes a folder of quantised weights, whole or not at all.

    Args:
        quantized: the model.
        tokenizer: what it was trained with.
        folder: where to; an earlier export there is replaced.
        layout: of names and config.json.
        write: writes the weight files into a folder and returns their names.
        card: what the model card says first of how to load them.
        facts: further lines of it.
        imported_config: as in `export_hf`.
        imported_generation_config: as in `export_hf`.
    """
    config = quantized.config
    content = hf_config(config, tokenizer, DTYPE, layout, imported_config)
    content["quantization_config"] = quantization_config(quantized.quantization)
    code = {} if layout.in_transformers else code_of(layout, config_only=True)
    if code:
        content["auto_map"] = auto_map(layout, config_only=True)
    held = {path for tensor in tensors(layout.names, config) for path in tensor.paths}
    sizes = {path: math.prod(leaf.shape) for path, leaf in flatten(quantized.params).items()}
    with whole_folder(folder) as partial:
        files = write(partial)
        write_companions(partial, content, config, tokenizer, imported_generation_config)
        for name, text in code.items():
            write_text(partial / name, text)
        kept = sum(size for path, size in sizes.items() if path in held)
        lines = ["---", "pipeline_tag: text-generation", "---", "", f"# A quantised decoder {MARK}", ""]
        lines += [f"{kept:,} parameters. {describe(quantized.quantization)}.", "", card]
        write_text(partial / "README.md", "\n".join([*lines, *facts_table(facts or {})]) + "\n")
    count = 0
    for file in files:
        with safetensors.safe_open(folder / file, "numpy") as weights:
            count += len(weights.keys())
    return HfExport(folder, layout.architecture, kept, sum(sizes.values()) - kept, files, count)


def kernel_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each linear layer, by our names."""
    layers = abstract_params(config)["layers"]
    return {name: linear_of(layers, name)["kernel"].shape[1:] for name in LINEARS}


def check_gptq(config: ModelConfig, quantization: QuantizationConfig) -> None:
    """Checks, before anything is quantised, that `export_gptq` can pack it.

    Raises:
        ConfigError: codes do not fill words.
    """
    bits = quantization.bits
    if bits not in PACKED_BITS:
        raise ConfigError(
            f"QuantizationConfig.bits = {bits}: codes of {bits} bits do not fill words of 32; quantise to one of "
            f"{', '.join(map(str, PACKED_BITS))} bits",
            field="QuantizationConfig.bits",
        )
    for name, shape in kernel_shapes(config).items():
        for what, size in zip(("inputs", "outputs"), shape, strict=True):
            if size * bits % WORD:
                raise ConfigError(
                    f"{name} has {size} {what}: the GPTQ format packs {WORD // bits} codes of {bits} bits into a word, "
                    f"so it takes multiples of {WORD // bits}; export the fake-quantised weights as a Hugging Face "
                    "folder instead",
                    field="ModelConfig",
                )


def _stored_linear(quantized: QuantizedModel, theirs: str, name: str, layer: int) -> Iterator[StoredTensor]:
    linear, bits = quantized.linears[name], quantized.quantization.bits

    def read(part: str) -> np.ndarray:
        return pack_linear(linear.codes[layer], linear.scales[layer], bits)[part]

    inputs, outputs = linear.codes.shape[1:]
    groups = linear.scales.shape[1]
    num_bytes = {
        "qweight": inputs * outputs * bits // 8,
        "qzeros": groups * outputs * bits // 8,
        "scales": 2 * groups * outputs,
        "g_idx": 4 * inputs,
    }
    for part, size in num_bytes.items():
        yield StoredTensor(f"{theirs}.{part}", size, functools.partial(read, part))


def export_gptq(
    quantized: QuantizedModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    layout: str = "",
    max_shard_bytes: int = 5_000_000_000,
    facts: Mapping[str, str] | None = None,
    imported_config: Mapping[str, Any] | None = None,
    imported_generation_config: Mapping[str, Any] | None = None,
) -> HfExport:
    """Writes a Hugging Face folder with GPTQ weights, whole or not at all.

    Args:
        quantized: from `quantize_model`.
        tokenizer: what the model was trained with.
        folder: where to write; an earlier export there is replaced.
        layout: architecture of the folder, a key of `hf_config.LAYOUTS`; "" takes a class that transformers has.
        max_shard_bytes: larger models are split into several weight files, with an index.
        facts: lines for the model card.
        imported_config: as in `export_hf`.
        imported_generation_config: as in `export_hf`.

    Raises:
        ConfigError: codes that do not fill words, a layout that fuses layers or has no place for something that the
            model computes, a tokenizer that is not the model's, or a folder that holds something else.
    """
    check_gptq(quantized.config, quantized.quantization)
    chosen = choose_layout(layout, quantized.config, tokenizer)
    packed, rest = split_tensors(quantized, chosen)
    parts = list(stored(flatten(quantized.params), rest, quantized.config, DTYPE))
    for place in packed:
        parts += _stored_linear(quantized, *place)
    return write_quantized(
        quantized,
        tokenizer,
        Path(folder),
        chosen,
        lambda partial: tuple(write_weights(parts, partial, max_shard_bytes)),
        "GPTQ format: vLLM, SGLang and gptqmodel load it, and transformers where gptqmodel is installed.",
        facts,
        imported_config,
        imported_generation_config,
    )
