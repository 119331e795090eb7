"""Writes Hugging Face folders: any layout of `cpm_jax/checkpoints/hf_config.py`, by its table of names.

By default it is a class that `transformers` loads without remote code. Two of its classes hold any model of ours:
`LlamaForCausalLM`, and, where µP multipliers are on, `GraniteForCausalLM`, which has the same multipliers of
embeddings, residual branches, attention and logits under other names. Biases on q, k and v (MiMo, Qwen2) become
`attention_bias` with a zero bias on o. Folders of layouts that transformers has no class for carry one of ours
(`hf_code.py`).

MTP layers have a place in the layout of MiMo only; elsewhere they are left out, as model card and result say.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors.numpy

from cpm_jax.checkpoints.hf_config import LAYOUTS, Layout, default_layout, write_config
from cpm_jax.checkpoints.hf_layouts import Tensor, flatten, tensors, to_theirs
from cpm_jax.checkpoints.sources import CONFIG_FILE, GENERATION_CONFIG_FILE, HfSource
from cpm_jax.common.config import ConfigError
from cpm_jax.common.files import write_json, write_text
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from export.folders import MARK, WHERE_SPARSE, ExportError, on_host, whole_folder
from export.hf_code import auto_map, code_of

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclass(frozen=True)
class HfExport:
    """What was written.

    Attributes:
        folder: where.
        architecture: class that its config.json names.
        parameters: number of values in the tensors.
        left_out: number of values that the class has no place for (MTP layers).
        files: names of the weight files.
        tensors: number of tensors in them.
    """

    folder: Path
    architecture: str
    parameters: int
    left_out: int
    files: tuple[str, ...]
    tensors: int


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


# What an imported config.json says of other things than the new folder: code that lies elsewhere, the type of the
# weights; and what is written anew: rotary embedding, lengths, sparse attention.
_NOT_KEPT = re.compile(
    r"auto_map|sparse_config|_name_or_path|transformers_version|(torch_)?dtype|rope_.*|.*max_position_embeddings"
)


def hf_config(
    config: ModelConfig,
    tokenizer: Tokenizer,
    dtype: str,
    layout: Layout | None = None,
    imported_config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        config: our model.
        tokenizer: gives the ids of special tokens, where `imported_config` does not.
        dtype: type of the stored weights.
        layout: of the folder; None takes `default_layout(config)`.
        imported_config: as in `export_hf`.

    Raises:
        ConfigError: the layout has no place for something that the model computes.
    """
    layout, imported = layout or default_layout(config), imported_config or {}
    kept = {name: value for name, value in imported.items() if not _NOT_KEPT.fullmatch(name)}
    ids = _token_ids(tokenizer) | {name: kept[name] for name in _token_ids(tokenizer) if kept.get(name) is not None}
    if imported.get("model_type") != layout.model_type:
        kept = {}
    usual = {"attention_dropout": 0.0, "use_cache": True}
    return usual | kept | write_config(config, layout) | {"dtype": dtype} | ids


class StoredTensor(NamedTuple):
    """A tensor of a weight file.

    Attributes:
        name: in the file.
        num_bytes: as it is stored.
        read: gives its values.
    """

    name: str
    num_bytes: int
    read: Callable[[], np.ndarray]


def _shards(parts: Sequence[StoredTensor], limit: int) -> list[list[StoredTensor]]:
    """Splits the tensors, in order, into files of at most `limit` bytes; a larger tensor has a file of its own."""
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.num_bytes
    return shards


def _read_tensor(flat: Mapping[str, Any], tensor: Tensor, config: ModelConfig, dtype: str) -> np.ndarray:
    """The values of one Hugging Face tensor, on the host.

    Raises:
        ConfigError: some are beyond the range of `dtype`.
    """
    if not tensor.paths:
        return np.zeros(tensor.shape, DTYPES[dtype])
    values = [on_host(flat[path], tensor.layer) for path in tensor.paths]
    theirs = to_theirs(tensor, values, config)
    with np.errstate(over="ignore"):
        stored = theirs.astype(DTYPES[dtype])
    if dtype == "float16" and np.any(np.isinf(stored) & np.isfinite(theirs)):
        raise ConfigError(
            f"dtype = 'float16': {tensor.name} has values up to {np.abs(theirs).max():.3g}, and float16 ends at 65504; "
            "choose bfloat16 or float32",
            field="dtype",
        )
    return stored


def stored(flat: Mapping[str, Any], parts: Sequence[Tensor], config: ModelConfig, dtype: str) -> Iterator[StoredTensor]:
    """Hugging Face tensors of a type, each read when its file is written."""
    for part in parts:
        num_bytes = math.prod(part.shape) * DTYPES[dtype].itemsize
        yield StoredTensor(part.name, num_bytes, functools.partial(_read_tensor, flat, part, config, dtype))


def write_weights(parts: Sequence[StoredTensor], folder: Path, max_shard_bytes: int) -> Iterator[str]:
    """Writes the weight files one after another, so that only one is held in memory; yields their names."""
    shards = _shards(parts, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for index, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        arrays = {part.name: part.read() for part in shard}
        safetensors.numpy.save_file(arrays, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        total += sum(array.nbytes for array in arrays.values())
        yield name
    if len(shards) > 1:
        index_content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index_content)


def _model_card(config: ModelConfig, layout: Layout, result: HfExport, facts: Mapping[str, str]) -> str:
    size = (
        f"{result.parameters:,} parameters, {config.num_layers} layers of width {config.d_model}, "
        f"{config.num_heads} query and {config.num_kv_heads} key-value heads, vocabulary {config.vocab_size:,}, "
        f"up to {config.max_position_embeddings:,} tokens."
    )
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""]
    lines += [f"# A decoder {MARK}", "", size, ""]
    code = "" if layout.in_transformers else ", trust_remote_code=True"
    lines += [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{code})',
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{code})  # {result.architecture}',
        'inputs = tokenizer("import ", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        "```",
    ]
    if code:
        lines += [
            "",
            f"transformers has no such class: it is in `modeling_{layout.model_type}.py`, beside the weights.",
        ]
    if result.left_out:
        lines += [
            "",
            f"{config.num_nextn_predict_layers} multi-token layers ({result.left_out:,} parameters) are left "
            f"out: {result.architecture} has no place for them. They do not change what the model predicts next.",
        ]
    if config.sparse_config is not None and layout.in_transformers:
        lines += [
            "",
            f"It may attend sparsely beyond {max(config.sparse_config.dense_len, 0):,} tokens (InfLLM v2). "
            f"{result.architecture} attends densely, with the same weights.",
        ]
    return "\n".join(lines + facts_table(facts)) + "\n"


def facts_table(facts: Mapping[str, str]) -> list[str]:
    """The lines of a model card that say how the model was trained; none without facts."""
    if not facts:
        return []
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()]
    return ["", "## Training", "", "| | |", "|---|---|", *rows]


def left_out_notes(config: ModelConfig, result: HfExport) -> tuple[str, ...]:
    """What a folder does not have, in sentences."""
    notes = []
    if result.left_out:
        notes.append(
            f"{result.left_out:,} parameters of {config.num_nextn_predict_layers} MTP layers are left out: only the "
            "layout mimo has a place for them. The next token's probabilities do not depend on them"
        )
    layout = next(layout for layout in LAYOUTS.values() if layout.architecture == result.architecture)
    if config.sparse_config is not None and layout.in_transformers:
        notes.append(
            f"sparse attention (InfLLM v2) is left out: {result.architecture} attends densely, with the same weights; "
            f"{WHERE_SPARSE}"
        )
    return tuple(notes)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def choose_layout(layout: str, config: ModelConfig, tokenizer: Tokenizer) -> Layout:
    """The layout of that name, or that of a class of transformers for "".

    Raises:
        ConfigError: there is none, or the tokenizer has more tokens than the model.
    """
    if layout and layout not in LAYOUTS:
        raise ConfigError(f"layout = {layout!r}: accepted are {', '.join(LAYOUTS)}", field="layout")
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"ModelConfig.vocab_size = {config.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens, so it is "
            "not the one that this model was trained with",
            field="ModelConfig.vocab_size",
        )
    return LAYOUTS[layout] if layout else default_layout(config)


def write_companions(
    folder: Path,
    content: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    imported_generation_config: Mapping[str, Any] | None,
) -> None:
    """Writes what lies beside the weights: config.json, generation_config.json and the tokenizer."""
    write_json(folder / CONFIG_FILE, content)
    generation = {name: content[name] for name in _token_ids(tokenizer)}
    generation |= {
        name: value for name, value in (imported_generation_config or {}).items() if name != "transformers_version"
    }
    write_json(folder / GENERATION_CONFIG_FILE, generation)
    tokenizer.save(folder)
    _complete_tokenizer_config(folder / "tokenizer_config.json", config)


def export_hf(
    params: dict[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    layout: str = "",
    dtype: str = "float32",
    max_shard_bytes: int = 5_000_000_000,
    facts: Mapping[str, str] | None = None,
    imported_config: Mapping[str, Any] | None = None,
    imported_generation_config: Mapping[str, Any] | None = None,
) -> HfExport:
    """Writes a Hugging Face folder, whole or not at all.

    Args:
        params: our tree of arrays.
        config: the model that it belongs to.
        tokenizer: what the model was trained with.
        folder: where to write; an earlier export there is replaced.
        layout: architecture of the folder, a key of `hf_config.LAYOUTS`; "" takes a class that transformers has.
        dtype: type to store the weights in, a key of `DTYPES`.
        max_shard_bytes: larger models are split into several weight files, with an index.
        facts: lines for the model card, for example steps and losses.
        imported_config: the config.json that the weights once came with. What it says beyond our config (several ids
            that end a text, the kind of dropout) goes into a folder of the same layout again.
        imported_generation_config: the same of generation_config.json, for any layout.

    Returns:
        What was written.

    Raises:
        ConfigError: the layout has no place for something that the model computes, the tokenizer has more tokens than
            the model, values are beyond the range of `dtype`, or `folder` holds something else than an export.
    """
    chosen = choose_layout(layout, config, tokenizer)
    content = hf_config(config, tokenizer, dtype, chosen, imported_config)
    if not chosen.in_transformers:
        content["auto_map"] = auto_map(chosen)
    folder = Path(folder)
    with whole_folder(folder) as partial:
        flat, parts = flatten(params), tensors(chosen.names, config)
        held = {path for part in parts for path in part.paths}
        result = HfExport(
            folder=folder,
            architecture=chosen.architecture,
            parameters=sum(math.prod(part.shape) for part in parts),
            left_out=sum(math.prod(leaf.shape) for path, leaf in flat.items() if path not in held),
            files=tuple(write_weights(list(stored(flat, parts, config, dtype)), partial, max_shard_bytes)),
            tensors=len(parts),
        )
        write_companions(partial, content, config, tokenizer, imported_generation_config)
        if not chosen.in_transformers:
            for name, text in code_of(chosen).items():
                write_text(partial / name, text)
        write_text(partial / "README.md", _model_card(config, chosen, result, facts or {}))
    return result


def _complete_tokenizer_config(path: Path, config: ModelConfig) -> None:
    """Tells `transformers` which class reads a bare tokenizer.json, and how long its texts may be.

    A class that `auto_map` names (InternLM2's) is code that does not come along; tokenizer.json does all that it does.
    """
    settings = json.loads(path.read_text("utf-8"))
    if settings.pop("auto_map", None):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    settings["model_max_length"] = config.max_position_embeddings
    write_json(path, settings)


def check_read_back(folder: Path, params: dict[str, Any], config: ModelConfig, layout: str, dtype: str) -> int:
    """Reads every tensor of a folder back: it must be the model's, after the rounding of the type, bit for bit.

    Args:
        folder: written by `export_hf`.
        params: our tree of arrays.
        config: its model.
        layout: as for `export_hf`.
        dtype: as for `export_hf`.

    Returns:
        The number of values compared.

    Raises:
        ExportError: a value differs, or tensors are missing.
    """
    chosen, source, flat = LAYOUTS[layout] if layout else default_layout(config), HfSource(folder), flatten(params)
    parts = tensors(chosen.names, config)
    if differing := {part.name for part in parts} ^ set(source.names()):
        raise ExportError(f"{folder} and the model differ in the tensors {', '.join(sorted(differing))}")
    for part in parts:
        if source.read(part.name).tobytes() != _read_tensor(flat, part, config, dtype).tobytes():
            raise ExportError(f"{folder}: {part.name} reads back with other values than it had")
    return sum(math.prod(part.shape) for part in parts)
