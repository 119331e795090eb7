"""Writes a Hugging Face folder that `transformers` loads without remote code.

Two of its classes have our layout: `LlamaForCausalLM`, and, where µP multipliers are on, `GraniteForCausalLM`, which
has the same multipliers of embeddings, residual branches, attention and logits under other names. Biases on q, k and
v (MiMo, Qwen2) become `attention_bias` with a zero bias on o. The class that has just these biases,
`Qwen2ForCausalLM`, is not used: for its model type transformers 5 puts Qwen's own rules for splitting text in place
of those in `tokenizer.json`.

MTP layers have no place in them and are left out, which the model card and the result say.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors.numpy

from cpm_jax.checkpoints.hf_layout import MTP, Slice, flatten, hf_slices, read_slice
from cpm_jax.common.config import ConfigError
from cpm_jax.common.files import write_json, write_text
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class HfExport:
    """What was written.

    Attributes:
        folder: where.
        architecture: class of `transformers` that loads it.
        parameters: number of values in the tensors.
        left_out: number of values that the class has no place for (MTP layers).
        files: names of the weight files.
    """

    folder: Path
    architecture: str
    parameters: int
    left_out: int
    files: tuple[str, ...]


def architecture(config: ModelConfig) -> str:
    """Name of the `transformers` class that computes what our decoder does."""
    if config.scale_emb != 1 or config.scale_depth or config.dim_model_base:
        return "GraniteForCausalLM"
    return "LlamaForCausalLM"


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def hf_config(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        config: our model.
        tokenizer: gives the ids of special tokens.
        dtype: type of the stored weights.
    """
    name = architecture(config)
    rope = config.rope
    content: dict[str, Any] = {
        "architectures": [name],
        "model_type": name.removesuffix("ForCausalLM").lower(),
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "use_cache": True,
        # transformers 4 and 5 both read these two; 5 itself writes them as one `rope_parameters`.
        "rope_theta": rope.rope_theta,
        "rope_scaling": None,
        **_token_ids(tokenizer),
    }
    if rope.is_longrope:
        content["original_max_position_embeddings"] = rope.original_max_position_embeddings
        content["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
        if rope.attention_factor is not None:
            content["rope_scaling"]["attention_factor"] = rope.attention_factor
    if name == "GraniteForCausalLM":
        content |= {
            "embedding_multiplier": config.scale_emb,
            "residual_multiplier": config.residual_multiplier,
            "attention_multiplier": config.head_size**-0.5,
            "logits_scaling": config.width_multiplier,
        }
    return content


def _tensors(params: dict[str, Any], config: ModelConfig) -> list[Slice]:
    parts = list(hf_slices(params))
    if config.attention_bias:
        # Their switch adds a bias to o_proj too, which ours does not have: zeros.
        parts += [
            Slice(f"model.layers.{layer}.self_attn.o_proj.bias", "", layer, False, (config.d_model,))
            for layer in range(config.num_layers)
        ]
    return parts


def _shards(parts: Sequence[Slice], itemsize: int, limit: int) -> list[list[Slice]]:
    """Splits the tensors, in order, into files of at most `limit` bytes; a larger tensor has a file of its own."""
    shards: list[list[Slice]] = [[]]
    size = 0
    for part in parts:
        num_bytes = int(np.prod(part.shape)) * itemsize
        if shards[-1] and size + num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += num_bytes
    return shards


def _write_weights(
    params: dict[str, Any], config: ModelConfig, folder: Path, dtype: str, max_shard_bytes: int
) -> Iterator[str]:
    """Writes the weight files one after another, so that only one is held in memory; yields their names."""
    flat, kind = flatten(params), DTYPES[dtype]
    shards = _shards(_tensors(params, config), kind.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for index, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        arrays = {
            part.name: read_slice(flat, part).astype(kind) if part.path else np.zeros(part.shape, kind)
            for part in shard
        }
        safetensors.numpy.save_file(arrays, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, name)
        total += sum(array.nbytes for array in arrays.values())
        yield name
    if len(shards) > 1:
        index_content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index_content)


def _model_card(config: ModelConfig, result: HfExport, facts: Mapping[str, str]) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        "# A decoder trained with cpm_jax",
        "",
        f"{result.parameters:,} parameters, {config.num_layers} layers of width {config.d_model}, "
        f"{config.num_heads} query and {config.num_kv_heads} key-value heads, vocabulary {config.vocab_size:,}, "
        f"up to {config.max_position_embeddings:,} tokens.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")  # {result.architecture}',
        'inputs = tokenizer("import ", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
        "```",
    ]
    if result.left_out:
        lines += [
            "",
            f"{config.num_nextn_predict_layers} multi-token layers ({result.left_out:,} parameters) are left "
            f"out: {result.architecture} has no place for them. They do not change what the model predicts next.",
        ]
    if facts:
        lines += ["", "## Training", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def export_hf(
    params: dict[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_bytes: int = 5_000_000_000,
    facts: Mapping[str, str] | None = None,
) -> HfExport:
    """Writes a Hugging Face folder, whole or not at all.

    Args:
        params: our tree of arrays.
        config: the model that it belongs to.
        tokenizer: what the model was trained with.
        folder: where to write; an earlier export there is replaced.
        dtype: type to store the weights in.
        max_shard_bytes: larger models are split into several weight files, with an index.
        facts: lines for the model card, for example steps and losses.

    Returns:
        What was written.

    Raises:
        ConfigError: the tokenizer has more tokens than the model, or `folder` holds something else than an export.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"ModelConfig.vocab_size = {config.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens, so it is "
            "not the one that this model was trained with",
            field="ModelConfig.vocab_size",
        )
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(
            f"folder = {str(folder)!r}: holds files that are no Hugging Face export; give an empty or a new folder",
            field="folder",
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    left_out = sum(int(np.prod(leaf.shape)) for path, leaf in flatten(params).items() if path.startswith(f"{MTP}/"))
    result = HfExport(
        folder=folder,
        architecture=architecture(config),
        parameters=sum(int(np.prod(part.shape)) for part in _tensors(params, config)),
        left_out=left_out,
        files=tuple(_write_weights(params, config, partial, dtype, max_shard_bytes)),
    )
    write_json(partial / "config.json", hf_config(config, tokenizer, dtype))
    write_json(partial / "generation_config.json", _token_ids(tokenizer))
    tokenizer.save(partial)
    _complete_tokenizer_config(partial / "tokenizer_config.json", config)
    write_text(partial / "README.md", _model_card(config, result, facts or {}))
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return result


def _complete_tokenizer_config(path: Path, config: ModelConfig) -> None:
    """Tells `transformers` which class reads a bare tokenizer.json, and how long its texts may be."""
    settings = json.loads(path.read_text("utf-8"))
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    settings["model_max_length"] = config.max_position_embeddings
    write_json(path, settings)
