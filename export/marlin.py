"""Writes Marlin weights as CPM.cu loads them: GPTQ's 4-bit codes in the order in which tensor cores read them.

q, k, v and gate, up are fused by their outputs. Of a linear layer with K inputs and N outputs are stored

    qweight int32 [K/16, 2·N]       eight codes + 8 in a word
    scales  float16 [K/128, N]

A row of qweight is a band of 16 inputs, in chunks of 64 outputs (128 words): four 16 × 16 tiles. Word 4·t + j of a
chunk holds what thread t of a warp multiplies of tile j, output t // 4 and inputs 2·(t % 4) + {0, 1, 8, 9}, of both
halves of 8 outputs; from the low bits up first the even inputs of both halves, then the odd ones. In each 64 outputs
the scales are transposed as an 8 × 8 matrix. Those of a single group (K = 128) are in Marlin's order of one scale for
each output, which CPM.cu's converter then takes: in each 32 outputs a 4 × 4 matrix of pairs is transposed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Float, Int8, Int32

from cpm_jax.checkpoints.hf_layouts import flatten
from cpm_jax.common.config import ConfigError
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.pipeline import QuantizedModel
from export.gptq import DTYPE, kernel_shapes, pack_words, split_tensors, unpack_words, write_quantized
from export.hf import HfExport, choose_layout, stored

BITS, GROUP_SIZE = 4, 128  # what CPM.cu loads
TILE, CHUNK = 16, 64
WEIGHTS_FILE = "model_gptq.safetensors"  # the name that CPM.cu looks for
# Fused layers by their name, and their parts in the order of the outputs.
FUSED = {
    "self_attn.qkv_proj": ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj"),
    "self_attn.o_proj": ("self_attn/o_proj",),
    "mlp.gate_up_proj": ("mlp/gate_proj", "mlp/up_proj"),
    "mlp.down_proj": ("mlp/down_proj",),
}


def pack_codes(codes: Int8[np.ndarray, "K N"]) -> Int32[np.ndarray, "K/16 2*N"]:
    """Codes of 4 bits in Marlin's order; K is a multiple of 16 and N of 64."""
    inputs, outputs = codes.shape
    # An input of a tile is 8·half + 2·pair + odd, an output 8·side + column.
    half, pair, odd, tile, side, column = 2, 4, 2, CHUNK // TILE, 2, 8
    parts = codes.reshape(inputs // TILE, half, pair, odd, outputs // CHUNK, tile, side, column)
    threads = parts.transpose(0, 4, 7, 2, 5, 3, 6, 1)  # band, chunk, column, pair, tile, then a word: odd, side, half
    words = pack_words(threads.reshape(-1, 8).astype(np.int32) + (1 << (BITS - 1)), BITS)
    return words.reshape(inputs // TILE, outputs * TILE * BITS // 32)


def unpack_codes(words: Int32[np.ndarray, "K/16 2*N"]) -> Int8[np.ndarray, "K N"]:
    """Undoes `pack_codes`."""
    bands, width = words.shape
    outputs = width // 2
    values = unpack_words(words.reshape(-1, 1), BITS) - (1 << (BITS - 1))
    parts = values.reshape(bands, outputs // CHUNK, 8, 4, CHUNK // TILE, 2, 2, 2).transpose(0, 7, 3, 5, 1, 4, 6, 2)
    return parts.reshape(bands * TILE, outputs).astype(np.int8)


def unpack_linear(parts: Mapping[str, np.ndarray]) -> Float[np.ndarray, "N K"]:
    """The weights that the two tensors of a fused layer stand for, outputs first."""
    scales = pack_scales(parts["scales"]).astype(np.float32)  # transposed twice, matrices are as they were
    codes = unpack_codes(parts["qweight"])
    return (codes * np.repeat(scales, len(codes) // len(scales), axis=0)).T


def pack_scales(scales: Float[np.ndarray, "G N"]) -> Float[np.ndarray, "G N"]:
    """Scales of groups in Marlin's order, as float16; N is a multiple of 64."""
    groups, outputs = scales.shape
    matrix = (8, 8, 1) if groups > 1 else (4, 4, 2)
    squares = scales.astype(np.float16).reshape(groups, -1, *matrix)
    return np.ascontiguousarray(squares.swapaxes(2, 3)).reshape(groups, outputs)


def _fuse(quantized: QuantizedModel, names: Sequence[str], layer: int) -> tuple[np.ndarray, np.ndarray]:
    linears = [quantized.linears[name] for name in names]
    codes = np.concatenate([linear.codes[layer] for linear in linears], axis=1)
    return codes, np.concatenate([linear.scales[layer] for linear in linears], axis=1)


def check_marlin(config: ModelConfig, quantization: QuantizationConfig) -> None:
    """Checks, before anything is quantised, that `export_marlin` can pack it.

    Raises:
        ConfigError: other bits or groups than CPM.cu loads, biases, or outputs that are no multiple of 64.
    """
    for field, value, accepted in (
        ("bits", quantization.bits, BITS),
        ("group_size", quantization.group_size, GROUP_SIZE),
    ):
        if value != accepted:
            raise ConfigError(
                f"QuantizationConfig.{field} = {value}: CPM.cu loads Marlin weights of 4 bits with groups of 128; "
                "quantise so, or write the GPTQ format, which vLLM repacks for other sizes",
                field=f"QuantizationConfig.{field}",
            )
    if config.attention_bias:
        raise ConfigError(
            "ModelConfig.attention_bias = True: CPM.cu's fused 4-bit layers have no biases; write the GPTQ format",
            field="ModelConfig.attention_bias",
        )
    shapes = kernel_shapes(config)
    for fused, names in FUSED.items():
        outputs = sum(shapes[name][1] for name in names)
        if outputs % CHUNK:
            raise ConfigError(
                f"{fused} has {outputs} outputs: Marlin takes multiples of {CHUNK}; write the GPTQ format",
                field="ModelConfig",
            )


def marlin_layout(config: ModelConfig) -> str:
    """What CPM.cu reads: MiniCPM's config.json where the model has anything of it, else Llama's."""
    multipliers = config.scale_emb != 1 or config.scale_depth or config.dim_model_base
    return "minicpm" if multipliers or config.sparse_config is not None else "llama"


def export_marlin(
    quantized: QuantizedModel,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    facts: Mapping[str, str] | None = None,
    imported_config: Mapping[str, Any] | None = None,
    imported_generation_config: Mapping[str, Any] | None = None,
) -> HfExport:
    """Writes the folder that CPM.cu loads, whole or not at all; the weights are one file, held in memory.

    Args:
        quantized: from `quantize_model`, of 4 bits with groups of 128.
        tokenizer: what the model was trained with.
        folder: where to write; an earlier export there is replaced.
        facts: lines for the model card.
        imported_config: as in `export_hf`.
        imported_generation_config: as in `export_hf`.

    Raises:
        ConfigError: other bits or groups, biases, outputs that are no multiple of 64, a tokenizer that is not the
            model's, or a folder that holds something else.
    """
    check_marlin(quantized.config, quantized.quantization)
    chosen = choose_layout(marlin_layout(quantized.config), quantized.config, tokenizer)
    _, rest = split_tensors(quantized, chosen)

    def write(partial: Path) -> tuple[str, ...]:
        arrays = {part.name: part.read() for part in stored(flatten(quantized.params), rest, quantized.config, DTYPE)}
        for layer in range(quantized.config.num_layers):
            for fused, names in FUSED.items():
                codes, scales = _fuse(quantized, names, layer)
                arrays[f"model.layers.{layer}.{fused}.qweight"] = pack_codes(codes)
                arrays[f"model.layers.{layer}.{fused}.scales"] = pack_scales(scales)
        safetensors.numpy.save_file(arrays, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        return (WEIGHTS_FILE,)

    return write_quantized(
        quantized,
        tokenizer,
        Path(folder),
        chosen,
        write,
        "Marlin weights for CPM.cu.",
        facts,
        imported_config,
        imported_generation_config,
    )
