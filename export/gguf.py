"""Writes GGUF files, llama.cpp's format: what `cpm_jax/checkpoints/gguf.py` reads, by the same tables.

An architecture of llama.cpp is chosen that computes what the model does: `minicpm` where it has MiniCPM's multipliers,
`qwen2` where q, k and v have biases, else `llama`. What llama.cpp has no place for is refused if it changes the next
token's probabilities, and left out, with a note, if it does not.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf  # `cpm_jax.checkpoints.gguf_file` says how to install it
import numpy as np
from gguf import GGMLQuantizationType as Kind

from cpm_jax.checkpoints.gguf import (
    ARCHITECTURES,
    LAYER,
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    TOP,
    GgufSource,
    interleaved_rows,
)
from cpm_jax.checkpoints.gguf_file import dequantise
from cpm_jax.checkpoints.hf_config import LAYOUTS
from cpm_jax.checkpoints.hf_layouts import Tensor, flatten, tensors, to_theirs
from cpm_jax.common import provenance
from cpm_jax.common.config import ConfigError
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import PER_CHANNEL, PER_TENSOR, ModelConfig, TernaryConfig
from cpm_jax.modeling.rotary import attention_factor, inverse_frequencies
from export.folders import MARK, WHERE_SPARSE, ExportError, check_replaceable, on_host, whole_folder
from export.gguf_tokenizer import tokenizer_notes, tokenizer_to_gguf

# The types that the gguf package can write, and what llama.cpp calls a file of them.
FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "MXFP4": gguf.LlamaFileType.MOSTLY_MXFP4_MOE,
    "TQ2_0": gguf.LlamaFileType.MOSTLY_TQ2_0,
    "TQ1_0": gguf.LlamaFileType.MOSTLY_TQ1_0,
}
_FLOATS = ("F32", "F16", "BF16")
_TERNARY = ("TQ1_0", "TQ2_0")
_LARGEST_FLOAT16 = 65504.0
_VALUES_AT_A_TIME = 1 << 20  # values that are quantised together

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_GGUF_NAMES = {theirs: ours for ours, (theirs, _) in (TOP | LAYER).items()}


@dataclass(frozen=True)
class GgufExport:
    """What was written.

    Attributes:
        folder: where.
        file: name of the file in it.
        architecture: what llama.cpp is to run it as.
        parameters: number of values in the tensors.
        left_out: number of values that llama.cpp has no place for (MTP layers).
        types: number of tensors of each type.
        notes: what is not as in the model, in sentences.
    """

    folder: Path
    file: str
    architecture: str
    parameters: int
    left_out: int
    types: Mapping[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Planned:
    """A tensor that is to be written: its name in the file, where its values are, and as what."""

    name: str
    tensor: Tensor
    kind: Kind


def export_gguf(
    params: dict[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    kind: str = "F16",
    name: str = "model",
    ternary: TernaryConfig | None = None,
    eos_token_ids: Sequence[int] = (),
) -> GgufExport:
    """Writes a folder with one GGUF file, `<name>-<kind>.gguf`, whole or not at all.

    Args:
        params: our tree of arrays; one tensor at a time is held in another form.
        config: the model that it belongs to.
        tokenizer: what the model was trained with.
        folder: where to write; an earlier export there is replaced.
        kind: type of the matrices, a key of `FILE_TYPES`. Norms and biases are F32; the head (or the embedding that
            serves as one) is Q8_0 where the others have fewer bits, and with ternary types it and the embedding are
            F16; rows that no block of the type divides are F16.
        name: of the model.
        ternary: how the model was trained, where `params` are ternary values.
        eos_token_ids: as for `tokenizer_to_gguf`.

    Returns:
        What was written.

    Raises:
        ConfigError: llama.cpp has no place for something that the model or its tokenizer does, values are beyond the
            type's range, no matrix can be stored in the type, ternary values would not be stored as they are, or
            `folder` holds something else than an export.
    """
    folder = Path(folder)
    check_kind(kind)
    if ternary is not None:
        check_ternary(config, ternary, kind)
    check_replaceable(folder)
    architecture = find_architecture(config)
    metadata, factors = _metadata(config, architecture, kind, name)
    vocabulary = tokenizer_to_gguf(tokenizer, config.vocab_size, eos_token_ids)
    flat, planned = flatten(params), plan_tensors(config, kind)
    held = {path for item in planned for path in item.tensor.paths}
    left_out = sum(math.prod(leaf.shape) for path, leaf in flat.items() if path not in held)
    notes = (*_notes(config, left_out), *_fallback_notes(planned, kind), *tokenizer_notes(vocabulary))

    file = f"{name}-{kind}.gguf"
    with whole_folder(folder) as partial, contextlib.closing(gguf.GGUFWriter(partial / file, architecture)) as writer:
        for key, value in (metadata | vocabulary).items():
            _add(writer, key, value)
        for rope_name, values in factors.items():
            writer.add_tensor_info(rope_name, values.shape, values.dtype, values.nbytes)
        for item in planned:
            shape = item.tensor.shape
            stored = (*shape[:-1], _row_bytes(shape[-1], item.kind))
            writer.add_tensor_info(item.name, stored, np.dtype(np.uint8), math.prod(stored), item.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values)
        for item in planned:
            writer.write_tensor_data(_stored(flat, item, config, architecture))
    return GgufExport(
        folder=folder,
        file=file,
        architecture=architecture,
        parameters=sum(math.prod(item.tensor.shape) for item in planned),
        left_out=left_out,
        types=dict(Counter(item.kind.name for item in planned)) | ({"F32 factors": len(factors)} if factors else {}),
        notes=notes,
    )


def check_read_back(path: Path, params: dict[str, Any], config: ModelConfig, kind: str) -> int:
    """Reads every tensor of a file back: its values must be those of the model, after the type's own rounding, exactly.

    Args:
        path: the file.
        params: our tree of arrays.
        config: its model.
        kind: as for `export_gguf`.

    Returns:
        The number of values compared.

    Raises:
        ExportError: a value differs, or tensors are missing.
    """
    source, flat = GgufSource(path), flatten(params)
    planned = plan_tensors(config, kind)
    if missing := {item.tensor.name for item in planned} ^ set(source.names()):
        raise ExportError(f"{path} and the model differ in the tensors {', '.join(sorted(missing))}")
    compared = 0
    for item in planned:
        theirs = _values(flat, item.tensor, config)
        rows = theirs.reshape(-1, theirs.shape[-1])
        read = source.read(item.tensor.name).reshape(rows.shape)
        for part in _parts(rows):
            if not np.array_equal(dequantise(_quantise(rows[part], item.kind), item.kind), read[part]):
                raise ExportError(f"{path}: {item.name} ({item.kind.name}) reads back with other values than it had")
        compared += rows.size
    return compared


def check_kind(kind: str) -> None:
    """Checks that a type can be written.

    Raises:
        ConfigError: it cannot; says what to do instead.
    """
    if kind in FILE_TYPES:
        return
    advice = ""
    if kind in Kind.__members__ or re.fullmatch(r"I?Q\d_\w+", kind):
        advice = (
            f". The gguf package does not write {kind}: write F16, and let llama.cpp's llama-quantize make it {kind}"
        )
    raise ConfigError(f"kind = {kind!r}: accepted are {', '.join(FILE_TYPES)}{advice}", field="kind")


def check_ternary(config: ModelConfig, ternary: TernaryConfig, kind: str) -> None:
    """Checks that a packed ternary type holds the values of a ternary model as they are.

    Raises:
        ConfigError: a row cannot be divided into its blocks, or a block would have to hold several scales.
    """
    if kind not in _TERNARY:
        return
    block = gguf.GGML_QUANT_SIZES[Kind[kind]][0]
    for item in plan_tensors(config, kind):
        width = item.tensor.shape[-1]
        if len(item.tensor.shape) > 1 and item.name not in (_HEAD, _EMBEDDING) and width % block:
            raise ConfigError(
                f"kind = {kind!r}: it stores blocks of {block} values, and {item.name} has rows of {width}: choose F16 "
                f"or BF16, or train a model whose inputs are multiples of {block}",
                field="kind",
            )
    if (size := ternary.group_size) > 0 and size % block:
        raise ConfigError(
            f"TernaryConfig.group_size = {size}: {kind} has one scale for {block} values; accepted are multiples of "
            f"{block}, {PER_CHANNEL} (one for each output) and {PER_TENSOR} (one for each matrix) in the training, or "
            "F16 and BF16 as the type",
            field="TernaryConfig.group_size",
        )


# The model.


def find_architecture(config: ModelConfig) -> str:
    """The architecture of llama.cpp that computes what a model does, a key of `ARCHITECTURES`.

    Raises:
        ConfigError: none does; names the field.
    """
    config.refuse_ternary("a GGUF file")
    rope = config.rope

    def refuse(field: str, value: Any, why: str) -> None:
        raise ConfigError(f"{field} = {value}: {why}", field=field)

    if rope.rope_type == "dynamic":
        others = ", ".join(name for name, layout in LAYOUTS.items() if "dynamic" in layout.rope_types)
        refuse("RopeConfig.scaling", "dynamic", f"llama.cpp has no dynamic NTK; the Hugging Face layouts {others} have")
    usual = 0.1 * math.log(rope.factor) + 1 if rope.scaling == "yarn" else 1.0
    if not rope.is_longrope and rope.attention_factor not in (None, usual):
        refuse(
            "RopeConfig.attention_factor",
            rope.attention_factor,
            f"llama.cpp takes {usual:.6g} for rope type {rope.rope_type!r}; with longrope it takes any",
        )
    if rope.scaling == "yarn" and not rope.truncate:
        refuse("RopeConfig.truncate", False, "llama.cpp's YaRN rounds the ends of its ramp to whole dimensions")
    multipliers = config.scale_emb != 1 or config.scale_depth or config.dim_model_base
    has_factors = rope.rope_type in ("longrope", "llama3")  # lists of factors, which llama.cpp's qwen2 does not read
    architecture = "minicpm" if multipliers else "qwen2" if config.attention_bias and not has_factors else "llama"
    if multipliers and config.attention_bias:
        refuse(
            "ModelConfig.attention_bias",
            True,
            "with multipliers llama.cpp's architecture is minicpm, in whose files the order of biases is not settled",
        )
    if (multipliers or config.attention_bias) and config.head_size * config.num_heads != config.d_model:
        where = "llama.cpp's minicpm" if multipliers else "with biases of q, k and v llama.cpp"
        refuse("ModelConfig.head_dim", config.head_size, f"{where} takes d_model / num_heads; FORMAT=hf takes any")
    return architecture


def _metadata(
    config: ModelConfig, architecture: str, kind: str, name: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What the file says of the model, and the factors of its rotary frequencies, which are tensors."""
    scaling, factors = _rope(config)
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.d_model,
        "block_count": config.num_layers,
        "feed_forward_length": config.d_ff,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_size,
        "rope.freq_base": float(config.rope.rope_theta),
        **scaling,
    }
    if ARCHITECTURES[architecture].mup:
        values |= {
            "embedding_scale": float(config.scale_emb),
            "residual_scale": float(config.residual_multiplier),
            "logit_scale": float(config.width_multiplier),
        }
    general: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.file_type": int(FILE_TYPES[kind]),
    }
    if kind not in _FLOATS:
        general["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    revision = provenance.git_revision()
    general["general.description"] = f"{MARK}, commit {revision}" if revision else MARK
    return general | {f"{architecture}.{key}": value for key, value in values.items()}, factors


def _rope(config: ModelConfig) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    rope = config.rope
    original = {"rope.scaling.original_context_length": rope.original_max_position_embeddings}
    match rope.rope_type:
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}, {}
        case "yarn":
            values = {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope.factor), **original}
            values |= {
                "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
                "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
            }
            return values, {}
        case "longrope":
            values = {"rope.scaling.type": "longrope", **original}
            values["rope.scaling.attn_factor"] = float(attention_factor(config))
            lists = {ROPE_LONG: rope.long_factor, ROPE_SHORT: rope.short_factor}
            return values, {name: np.asarray(factors, np.float32) for name, factors in lists.items()}
        case "llama3":
            exponents = np.arange(config.head_size // 2, dtype=np.float64) / (config.head_size // 2)
            divisors = rope.rope_theta**-exponents / inverse_frequencies(config, config.max_position_embeddings)
            return {}, {ROPE_FREQS: divisors.astype(np.float32)}
    return {}, {}


def _notes(config: ModelConfig, left_out: int) -> Iterator[str]:
    if left_out:
        yield (
            f"{config.num_nextn_predict_layers} MTP layers ({left_out:,} parameters) are left out: llama.cpp has no "
            "place for them in this architecture. The next token's probabilities do not depend on them"
        )
    if config.sparse_config is not None:
        yield (
            "sparse attention (InfLLM v2) is left out: llama.cpp attends densely, with the same weights; "
            f"{WHERE_SPARSE}"
        )
    if config.fp8:
        yield "products in FP8 are left out: llama.cpp multiplies the weights as they are stored"


# The tensors.


def plan_tensors(config: ModelConfig, kind: str) -> list[_Planned]:
    """The tensors of a file and the type of each.

    Raises:
        ConfigError: no matrix can be stored in the type, or the model has no place in llama.cpp.
    """
    layout = LAYOUTS[ARCHITECTURES[find_architecture(config)].model_type]
    planned = [
        _Planned(name := _gguf_name(tensor.name), tensor, _kind_of(name, tensor.shape, kind, config))
        for tensor in tensors(layout.names, config)
    ]
    matrices = [item for item in planned if len(item.tensor.shape) > 1]
    if not any(item.kind == Kind[kind] for item in matrices):
        block = gguf.GGML_QUANT_SIZES[Kind[kind]][0]
        widths = sorted({item.tensor.shape[-1] for item in matrices})
        fitting = [
            name for name in FILE_TYPES if any(not width % gguf.GGML_QUANT_SIZES[Kind[name]][0] for width in widths)
        ]
        raise ConfigError(
            f"kind = {kind!r}: it stores blocks of {block} values, and no row of a matrix in the layers can be divided "
            f"into them: {matrices[1].name} has rows of {matrices[1].tensor.shape[-1]}. Accepted are "
            f"{', '.join(fitting)}",
            field="kind",
        )
    return planned


def _gguf_name(theirs: str) -> str:
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", theirs):
        return f"blk.{found[1]}.{_GGUF_NAMES[found[2]]}"
    return _GGUF_NAMES[theirs]


def _kind_of(name: str, shape: tuple[int, ...], kind: str, config: ModelConfig) -> Kind:
    """llama.cpp's habits; Q8_0 stands for its Q6_K, which the package cannot write."""
    if len(shape) == 1:
        return Kind.F32
    chosen = Kind[kind]
    is_head = name == _HEAD or (config.tie_word_embeddings and name == _EMBEDDING)
    if kind in _TERNARY and name in (_HEAD, _EMBEDDING):
        chosen = Kind.F16
    elif kind not in (*_FLOATS, "Q8_0") and is_head:
        chosen = Kind.Q8_0
    return Kind.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0] else chosen


def _fallback_notes(planned: list[_Planned], kind: str) -> Iterator[str]:
    block = gguf.GGML_QUANT_SIZES[Kind[kind]][0]
    kept = [item for item in planned if len(item.tensor.shape) > 1 and item.tensor.shape[-1] % block]
    if kept:
        yield (
            f"{len(kept)} matrices are stored as {kept[0].kind.name}, as rows of {kept[0].tensor.shape[-1]} values "
            f"({kept[0].name}) cannot be divided into {kind}'s blocks of {block}"
        )


def _values(flat: Mapping[str, Any], tensor: Tensor, config: ModelConfig) -> np.ndarray:
    """A tensor in Hugging Face's order, float32, on the host."""
    if not tensor.paths:
        return np.zeros(tensor.shape, np.float32)
    leaves = [on_host(flat[path], tensor.layer) for path in tensor.paths]
    return to_theirs(tensor, leaves, config).astype(np.float32, copy=False)


def _stored(flat: Mapping[str, Any], item: _Planned, config: ModelConfig, architecture: str) -> np.ndarray:
    """The bytes of a tensor, uint8 [rows, bytes of a row].

    Raises:
        ConfigError: a value is not finite, or beyond the range of the type.
    """
    values = _values(flat, item.tensor, config)
    suffix = item.name.split(".", 2)[-1]
    if suffix in ARCHITECTURES[architecture].permuted:
        values = interleaved_rows(values, config.num_heads if suffix.startswith("attn_q") else config.num_kv_heads)
    _check_range(values, item)
    rows = values.reshape(-1, values.shape[-1])
    out = np.empty((len(rows), _row_bytes(rows.shape[-1], item.kind)), np.uint8)
    for part in _parts(rows):
        out[part] = _quantise(rows[part], item.kind)
    return out


def _check_range(values: np.ndarray, item: _Planned) -> None:
    if not np.isfinite(values).all():
        raise ConfigError(f"{item.name} ({item.tensor.name}) has values that are not finite: the weights are damaged")
    largest = float(np.abs(values).max())
    if item.kind not in (Kind.F32, Kind.BF16, Kind.MXFP4) and largest > _LARGEST_FLOAT16:
        raise ConfigError(
            f"kind = {item.kind.name!r}: {item.name} has values up to {largest:.3g}, and float16, in which it keeps "
            "values or their scales, ends at 65504; choose BF16 or F32",
            field="kind",
        )


def _quantise(rows: np.ndarray, kind: Kind) -> np.ndarray:
    return np.ascontiguousarray(gguf.quantize(rows, kind)).view(np.uint8)


def _parts(rows: np.ndarray) -> Iterator[slice]:
    step = max(1, _VALUES_AT_A_TIME // rows.shape[-1])
    return (slice(first, first + step) for first in range(0, len(rows), step))


def _row_bytes(width: int, kind: Kind) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return width // block * size


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
