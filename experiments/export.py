"""The verb `export`: a model becomes what other programs run, from Hugging Face's to a device's; or one is verified."""

import re
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
from pydantic import PositiveInt

from cpm_jax.checkpoints.hf_config import eos_token_ids, find_layout
from cpm_jax.checkpoints.weights import Weights, load_weights
from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.common.sharding import MeshConfig, make_mesh
from export.checks import Checked, check_export, describe, verify_export
from export.devices.runtimes import RUNTIMES
from export.folders import ExportError, check_replaceable
from export.hf import DTYPES
from export.publish import Written, publish_export
from export.stablehlo import DTYPES as STABLEHLO_DTYPES

# Where a format has other names or types than the weights, those that lose nothing.
_LOSSLESS = {
    "gguf": {"float32": "F32", "bfloat16": "BF16", "float16": "F16"},
    "stablehlo": {"float16": "float32"},
    **{name: {"bfloat16": "float32", "float16": "float32"} for name in RUNTIMES},
}
# Exports of different types stand side by side.
_BY_TYPE = ("gguf", *RUNTIMES)


@config_dataclass
class ExportConfig:
    """What to export, and as what.

    Attributes:
        source: a workdir, checkpoints folder or checkpoint of ours, a Hugging Face folder, or a .gguf file; "" is the
            job's own workdir.
        format: "hf" writes a Hugging Face folder in the layout that the weights came in or, where they came in none, of
            a class of transformers; "gguf" a GGUF file for llama.cpp; "stablehlo" programs that run with JAX alone;
            "onnx", "openvino" and "executorch" a model for that runtime; the other values choose the layout.
        type: type of the stored weights: one of GGUF's ("Q8_0", …) in GGUF; "float32", "int8", "int4" for devices, and
            "float16" in OpenVINO; else "float32", "bfloat16" or "float16"; programs compute in it too. "" is the one
            that loses nothing.
        tokenizer: a tokenizer.json or its folder; "" is the one of the source.
        name: of the model, in GGUF and in the name of its file; "" is that of the source.
        max_shard_bytes: size of the files in a Hugging Face folder above which there are several.
        check: whether to read the export back and compare it before it gets its name.
        verify: an export to verify, instead of writing one.
        mesh: how the parameters lie on devices meanwhile.
    """

    source: str = ""
    format: Literal[
        "hf", "llama", "qwen2", "granite", "minicpm", "internlm2", "mimo",
        "gguf", "stablehlo", "onnx", "openvino", "executorch",
    ] = "hf"  # fmt: skip
    type: str = ""
    tokenizer: str = ""
    name: str = ""
    max_shard_bytes: PositiveInt = 5_000_000_000
    check: bool = True
    verify: str = ""
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        of_programs = {name: runtime.types for name, runtime in RUNTIMES.items()} | {"stablehlo": STABLEHLO_DTYPES}
        accepted = of_programs.get(self.format, DTYPES)
        if self.format != "gguf" and self.type not in ("", *accepted):
            raise ConfigError(
                f"ExportConfig.type = {self.type!r}: with format {self.format!r} accepted are {', '.join(accepted)}; "
                "GGUF's types need FORMAT=gguf",
                field="ExportConfig.type",
            )
        if set(self.name) & set("/\\"):
            raise ConfigError(
                f"ExportConfig.name = {self.name!r}: it is part of a file's name, without slashes",
                field="ExportConfig.name",
            )


def run(config: ExportConfig, workdir: Path) -> None:
    """Exports `config.source` into a folder in `workdir`, or verifies `config.verify`.

    Raises:
        InputError: the source cannot be read, or the export is not what it should be.
        ConfigError: the format has no place for what the model computes, or the folder holds something else.
    """
    if config.verify:
        print("\n".join(verify_export(Path(config.verify))))
        return
    if config.format in RUNTIMES and (words := RUNTIMES[config.format].missing()):
        raise ExportError(f"FORMAT={config.format}: {words}")
    start = time.monotonic()
    if jax.process_count() > 1:
        raise ConfigError(
            f"ExportConfig.format = {config.format!r}: exports are written by one process; {jax.process_count()} run",
            field="ExportConfig.format",
        )
    path = Path(config.source or workdir)
    if config.format == "gguf" and config.type:
        from export.gguf import check_kind  # needs the extra `gguf`

        named(config, lambda: check_kind(config.type))
    # The type may follow from the weights: what can be said before they are read is said now.
    if config.type or config.format not in _BY_TYPE:
        check_target(config, path, workdir / folder_name(config, config.type))
    weights = load_weights(path, config.tokenizer, mesh=make_mesh(config.mesh))
    dtype = config.type or _LOSSLESS.get(config.format, {}).get(weights.dtype, weights.dtype)
    folder = workdir / folder_name(config, dtype)
    check_target(config, path, folder)
    print(f"{write(config, weights, dtype, folder)}, in {time.monotonic() - start:.1f} s")


def folder_name(config: ExportConfig, dtype: str) -> str:
    """The folder of an export within a workdir."""
    if config.format in _BY_TYPE:
        return f"{config.format}-{dtype}"
    return "stablehlo" if config.format == "stablehlo" else "hf"


def check_target(config: ExportConfig, source: Path, folder: Path) -> None:
    """Checks that the folder to write is free, or an earlier export, and not what is read.

    Raises:
        ConfigError: it is not.
    """
    if folder.resolve() in (source.resolve(), *source.resolve().parents):
        raise ConfigError(
            f"ExportConfig.source = {config.source!r}: what is written would replace it; give another --workdir",
            field="ExportConfig.source",
        )
    check_replaceable(folder)


def write(config: ExportConfig, weights: Weights, dtype: str, folder: Path) -> str:
    """Writes, checks and describes an export beside its place, and puts it there; says what was written.

    Raises:
        ExportError: a check fails; nothing is then left, and an earlier export is as it was.
        ConfigError: the format has no place for what the model computes.
        InputError: the folder cannot be written.
    """
    write_format = {
        "gguf": write_gguf,
        "stablehlo": write_stablehlo,
        **dict.fromkeys(RUNTIMES, write_device),
    }.get(config.format, write_hf)
    written, checked = publish_export(
        folder,
        config.format if config.format in ("stablehlo", *_BY_TYPE) else "hf",
        weights,
        lambda stage: named(config, lambda: write_format(config, weights, dtype, stage)),
        check=config.check,
    )
    tell(written, checked)
    return f"{folder / written.file}: {written.architecture}, {written.parameters:,} parameters in {dtype}"


def tell(written: Written, checked: Checked) -> None:
    """Says what an export does not have, and what its checks found."""
    for note in written.left_out:
        print(note, file=sys.stderr)
    for passed in checked.passed:
        print(f"check {passed.name}: {describe(passed)}")
    for name, reason in checked.not_made.items():
        print(f"not checked, {name}: {reason}")


def named(config: ExportConfig, action: Any) -> Any:
    """Does something; a complaint about a type is one about `ExportConfig.type`, which has another name there."""
    try:
        return action()
    except ConfigError as error:
        if error.field not in ("dtype", "kind"):
            raise
        raise ConfigError(f"ExportConfig.type: {error}", field="ExportConfig.type") from error


def write_hf(config: ExportConfig, weights: Weights, dtype: str, folder: Path) -> Written:
    """Writes a Hugging Face folder."""
    from export import hf

    layout: str = config.format
    if layout == "hf":
        layout = find_layout(weights.imported["config"]).model_type if weights.imported else ""
    result = hf.export_hf(
        weights.params,
        weights.model,
        weights.tokenizer,
        folder,
        layout=layout,
        dtype=dtype,
        max_shard_bytes=config.max_shard_bytes,
        facts=weights.facts,
        imported_config=weights.imported.get("config"),
        imported_generation_config=weights.imported.get("generation_config"),
    )
    return Written(
        architecture=result.architecture,
        types={dtype: result.tensors},
        parameters=result.parameters,
        left_out=hf.left_out_notes(weights.model, result),
        check=lambda path: check_export(
            path, weights, lambda: hf.check_read_back(path, weights.params, weights.model, layout, dtype)
        ),
    )


def write_gguf(config: ExportConfig, weights: Weights, dtype: str, folder: Path) -> Written:
    """Writes a folder with a GGUF file."""
    from export import gguf

    name = config.name or model_name(str(weights.origin["name"]))
    result = gguf.export_gguf(
        weights.params,
        weights.model,
        weights.tokenizer,
        folder,
        kind=dtype,
        name=name,
        ternary=weights.ternary,
        eos_token_ids=_ends(weights),
    )
    return Written(
        architecture=result.architecture,
        types=dict(result.types),
        parameters=result.parameters,
        left_out=result.notes,
        check=lambda path: check_export(
            path, weights, lambda: gguf.check_read_back(path, weights.params, weights.model, dtype)
        ),
        file=result.file,
    )


def write_stablehlo(config: ExportConfig, weights: Weights, dtype: str, folder: Path) -> Written:
    """Writes a folder with StableHLO programs."""
    from export import stablehlo

    result = stablehlo.export_stablehlo(
        weights.params, weights.model, weights.tokenizer, folder, dtype=dtype, eos_token_ids=_ends(weights)
    )
    return Written(
        architecture="StableHLO",
        types={dtype: result.tensors},
        parameters=result.parameters,
        left_out=result.notes,
        check=lambda path: check_export(path, weights, lambda: stablehlo.check_read_back(path, weights.params, dtype)),
    )


def _ends(weights: Weights) -> tuple[int, ...]:
    """The tokens that end a text, by what the weights were published with."""
    return eos_token_ids(weights.imported.get("config", {}), weights.imported.get("generation_config", {}))


def write_device(config: ExportConfig, weights: Weights, dtype: str, folder: Path) -> Written:
    """Writes a folder for a device's runtime."""
    from export.devices import checks, convert

    result = convert.export_device(
        weights.params,
        weights.model,
        weights.tokenizer,
        folder,
        runtime=config.format,
        dtype=dtype,
        imported_config=weights.imported.get("config"),
        imported_generation_config=weights.imported.get("generation_config"),
    )
    return Written(
        architecture=result.architecture,
        types={dtype: result.tensors},
        parameters=result.parameters,
        left_out=result.notes,
        check=lambda path: checks.check_device(path, config.format, dtype, weights),
    )


def model_name(source: str) -> str:
    """The name of a source without what says how it was stored: "SmolLM2-135M.Q4_1.gguf" is "SmolLM2-135M"."""
    name = source.partition("/")[0].removesuffix(".gguf")
    return re.sub(r"[-.](F32|F16|BF16|MXFP4|I?T?Q\d_\w+)$", "", name, flags=re.IGNORECASE) or "model"
