"""Writes a model for a device's runtime: our Hugging Face folder, converted by the runtime's own converter.

A converter knows fewer models than we have. It gets one that attends densely, without MTP layers, with one set of
rotary frequencies; MiniCPM's multipliers are in the layout `granite`, which all converters know. ExecuTorch's compiler
takes PyTorch's programs: it gets our PyTorch runtime's.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cpm_jax.common.config import ConfigError
from cpm_jax.common.extras import import_extra
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig, RopeConfig
from cpm_jax.modeling.decoder import Params
from cpm_jax.modeling.rotary import attention_factor, rotation
from export.devices.runtimes import RUNTIMES, Runtime
from export.folders import ExportError, whole_folder
from export.hf import export_hf


@dataclass(frozen=True)
class DeviceExport:
    """What was written.

    Attributes:
        architecture: class of the folder that was converted.
        tensors: number of tensors in it.
        parameters: number of values in them.
        notes: what is not as in the model, in sentences.
    """

    architecture: str
    tensors: int
    parameters: int
    notes: tuple[str, ...]


def device_model(config: ModelConfig, longest: int = 0) -> ModelConfig:
    """The model that a device computes, with a context of at most `longest` tokens, if that is not 0.

    Where rotary embeddings have other frequencies beyond some length (LongRoPE, dynamic NTK), the context ends there:
    keys that are in the cache already would have to be rotated anew.
    """
    rope = config.rope
    context = min(filter(None, (config.max_position_embeddings, rope.switch_length, longest)))
    if rope.scaling == "dynamic":
        rope = RopeConfig(rope_theta=rope.rope_theta)
    elif rope.is_longrope:
        rope = dataclasses.replace(rope, attention_factor=attention_factor(config))
    return dataclasses.replace(
        config,
        max_position_embeddings=context,
        rope=rope,
        sparse_config=None,
        num_nextn_predict_layers=0,
        fp8=False,
        remat="none",
    )


def _notes(config: ModelConfig, runtime: Runtime) -> tuple[str, ...]:
    notes, title = [], runtime.title
    if config.num_nextn_predict_layers:
        notes.append("MTP layers are left out: the next token's probabilities do not depend on them")
    if config.sparse_config is not None:
        notes.append(
            f"sparse attention (InfLLM v2) is left out: {title} attends densely, with the same weights. What "
            "FORMAT=minicpm writes is run sparsely by the runtimes of docs/torch_runtime.md and docs/cuda.md"
        )
    context = device_model(config, runtime.longest).max_position_embeddings
    if context < config.max_position_embeddings:
        why = "beyond, rotary embeddings have other frequencies"
        if context == runtime.longest:
            why = f"so long is the cache of {title}'s program"
        notes.append(
            f"the context ends at {context:,} of {config.max_position_embeddings:,} tokens: {why} (FORMAT=hf has them "
            "all)"
        )
    return tuple(notes)


def export_device(
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    runtime: str,
    dtype: str = "float32",
    imported_config: Mapping[str, Any] | None = None,
    imported_generation_config: Mapping[str, Any] | None = None,
) -> DeviceExport:
    """Writes a folder for a runtime, whole or not at all.

    Args:
        params: of the model.
        config: the model.
        tokenizer: its tokenizer.
        folder: a new folder, or an earlier export.
        runtime: a key of `RUNTIMES`.
        dtype: of the stored weights, one of the runtime's types.
        imported_config: as for `export_hf`.
        imported_generation_config: as for `export_hf`.

    Raises:
        ConfigError: the runtime has no such type, or the folder holds something else.
        ExportError: the converter is not installed, or fails.
    """
    chosen = RUNTIMES[runtime]
    device = device_model(config, chosen.longest)
    if dtype not in chosen.types:
        raise ConfigError(f"dtype = {dtype!r}: {chosen.title} takes {', '.join(chosen.types)}", field="dtype")
    if words := chosen.missing():
        raise ExportError(words)
    with whole_folder(folder) as partial:
        source = partial / "source"
        written = export_hf(
            params,
            # The builder of ONNX Runtime passes over most scalings without a word: it gets none, and our tables after.
            dataclasses.replace(device, rope=RopeConfig(rope_theta=device.rope.rope_theta))
            if runtime == "onnx"
            else device,
            tokenizer,
            source,
            imported_config=imported_config,
            imported_generation_config=imported_generation_config,
        )
        chosen.convert(source, partial, dtype)
        shutil.rmtree(source)
        if not (partial / chosen.model_file).is_file():
            raise ExportError(f"{chosen.converter} ended well, and wrote no {chosen.model_file}")
        if runtime == "onnx":
            write_rotary_tables(partial / chosen.model_file, device)
    return DeviceExport(written.architecture, written.tensors, written.parameters, _notes(config, chosen))


def write_rotary_tables(path: Path, config: ModelConfig) -> None:
    """Puts our cosines and sines, float32 [context, H/2], in place of those in an ONNX file, whatever their scaling.

    They are also nearer to the truth: the builder multiplies positions by frequencies in float32.

    Raises:
        ExportError: the file has no such tables, or of another size or type.
    """
    onnx = import_extra("onnx", "onnx", ExportError)
    model = onnx.load(path, load_external_data=False)
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    length = config.max_position_embeddings
    tables = rotation(config, jnp.arange(length)[None], length)
    for name, table in (("cos_cache", tables.cos), ("sin_cache", tables.sin)):
        values = np.asarray(table[0], "<f4")
        tensor = found.get(name)
        if tensor is None or tuple(tensor.dims) != values.shape or tensor.data_type != onnx.TensorProto.FLOAT:
            described = "none" if tensor is None else f"{list(tensor.dims)} of type {tensor.data_type}"
            raise ExportError(f"{path} should have a table {name}, float32 {list(values.shape)}: it has {described}")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            with open(path.with_name(place["location"]), "r+b") as file:
                file.seek(int(place.get("offset", 0)))
                file.write(values.tobytes())
        else:
            tensor.raw_data = values.tobytes()
    onnx.save(model, path)
