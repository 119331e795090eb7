"""The verb `convert`: published weights become a checkpoint of ours, and checkpoints become Hugging Face folders."""

import dataclasses
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import safetensors
from jax.experimental import multihost_utils
from pydantic import PositiveInt

from cpm_jax.checkpoints.hf_config import eos_token_ids, find_layout, notes, read_config, without_token_ids
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.manager import (
    CHECKPOINTS_DIR,
    TOKENIZER_DIR,
    CheckpointConfig,
    Checkpointer,
    find_checkpoint,
    find_tokenizer,
    list_steps,
    read_meta,
    restore_params,
)
from cpm_jax.checkpoints.sources import CONFIG_FILE, SourceError, TensorSource, check_tokenizer, open_source
from cpm_jax.common import provenance
from cpm_jax.common.config import ConfigError, InputError, config_dataclass, config_from_dict, config_to_dict
from cpm_jax.common.files import write_text
from cpm_jax.common.progress import Progress
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import DType, ModelConfig
from cpm_jax.modeling.decoder import Params, abstract_params
from cpm_jax.modeling.model_size import count_params

HF_DIR = "hf"  # within a workdir
MODEL_GIN = "model.gin"  # within a workdir: the imported model, for pretrain


@config_dataclass
class ConvertConfig:
    """What to convert, and to what.

    Attributes:
        source: a Hugging Face folder, a .gguf file, or a workdir, checkpoints folder or checkpoint of ours; "" is the
            job's own workdir.
        format: "checkpoint" writes `checkpoints/0`, `tokenizer/` and `model.gin` into the workdir. "hf" writes a
            Hugging Face folder `hf/` there, in the layout that the weights came in or, where they came in none, of a
            class of transformers; the other values choose the layout.
        tokenizer: a tokenizer.json or its folder; "" is the one of the source.
        param_dtype: type that the weights are kept in. "" takes float32 for a checkpoint, which holds every value of
            the three types; for a Hugging Face folder the type that the weights came in.
        dtype: type of activations and matrix products of an imported model.
        max_shard_bytes: size of the files in a Hugging Face folder above which there are several.
        mesh: how the parameters lie on devices meanwhile.
    """

    source: str = ""
    format: Literal["checkpoint", "hf", "llama", "qwen2", "granite", "minicpm", "internlm2", "mimo"] = "checkpoint"
    tokenizer: str = ""
    param_dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    dtype: DType = "float32"
    max_shard_bytes: PositiveInt = 5_000_000_000
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.format == "checkpoint" and self.param_dtype == "float16":
            raise ConfigError(
                "ConvertConfig.param_dtype = 'float16': a checkpoint is kept in float32 (which holds every value of "
                "float16) or bfloat16",
                field="ConvertConfig.param_dtype",
            )


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model in memory.

    Attributes:
        model: what it is.
        params: its parameters.
        tokenizer: its tokenizer.
        imported: where it was imported from ("path"), in which type ("dtype", until it is trained on) and with which
            config.json ("config") and generation_config.json ("generation_config"); empty for a model that began here.
        facts: what its model card says.
    """

    model: ModelConfig
    params: Params
    tokenizer: Tokenizer
    imported: Mapping[str, Any]
    facts: Mapping[str, str]


def run(config: ConvertConfig, workdir: Path) -> None:
    """Converts `config.source` into `workdir`.

    Raises:
        InputError: the source or its tokenizer cannot be read, or our decoder cannot compute it.
        ConfigError: the layout has no place for what the model computes, or the workdir holds something else.
    """
    start = time.monotonic()
    if config.format == "checkpoint":
        check_free(workdir)
    else:
        check_folder(config, workdir)
    weights = load(config, workdir)
    write = write_checkpoint if config.format == "checkpoint" else write_folder
    written = write(config, weights, workdir)
    if jax.process_index() == 0:
        print(f"{written}, in {time.monotonic() - start:.1f} s")


def load(config: ConvertConfig, workdir: Path) -> Weights:
    """Reads the source.

    Raises:
        InputError: it is nothing that can be converted, cannot be read, or does not fit its tokenizer.
        ConfigError: it is converted already, or the mesh does not fit.
    """
    path = Path(config.source or workdir)
    if is_foreign(path):
        return load_foreign(config, open_source(path))
    try:
        checkpoint = find_checkpoint(path)
    except InputError as error:
        raise SourceError(
            f"ConvertConfig.source = {str(path)!r} cannot be converted: no Hugging Face folder (it has no "
            f"{CONFIG_FILE}), no .gguf file, and {error}"
        ) from error
    if config.format == "checkpoint":
        raise ConfigError(
            f"ConvertConfig.format = 'checkpoint': {checkpoint} is one already; choose hf or a layout",
            field="ConvertConfig.format",
        )
    return load_checkpoint(config, checkpoint)


def is_foreign(path: Path) -> bool:
    """Whether a path holds weights of others: a file, or a folder with config.json, which no workdir has."""
    return path.is_file() or path.suffix == ".gguf" or (path / CONFIG_FILE).is_file()


def load_foreign(config: ConvertConfig, source: TensorSource) -> Weights:
    """Reads weights of others, onto the mesh, and says what of them is not computed here."""
    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer else source.tokenizer()
    if tokenizer is None:
        raise SourceError(
            f"{config.source} has no tokenizer.json: give one with TOKENIZER (tokenizer.model and vocab.json are not "
            "read; transformers' AutoTokenizer saves them as tokenizer.json)"
        )
    model = read_config(source.config)
    eos_token_ids(source.config, source.generation_config)  # generation could not read others
    check_tokenizer(tokenizer, model.vocab_size, config.tokenizer or config.source)
    param_dtype: DType = "bfloat16" if config.param_dtype == "bfloat16" else "float32"
    arrays = len(jax.tree.leaves(abstract_params(model)))
    with Progress("convert", arrays, enabled=jax.process_index() == 0) as progress:
        for note in notes(source.config):
            progress.write(note)
        model, params = import_params(source, make_mesh(config.mesh), param_dtype, on_param=progress.update)
    types = {source.dtype(name).name for name in source.names()}
    imported = {
        "path": config.source,
        "dtype": types.pop() if len(types) == 1 else "float32",
        "config": source.config,
        "generation_config": source.generation_config,
    }
    if config.tokenizer:  # the ids of special tokens are then its own
        imported = without_token_ids(imported)
    facts = {"Imported from": Path(config.source).name, "Commit": provenance.git_revision() or "unknown"}
    return Weights(dataclasses.replace(model, dtype=config.dtype), params, tokenizer, imported, facts)


def load_checkpoint(config: ConvertConfig, checkpoint: Path) -> Weights:
    """Reads a checkpoint of ours and the tokenizer that belongs to it."""
    meta = read_meta(checkpoint)
    model = config_from_dict(ModelConfig, meta["model"])
    tokenizer = Tokenizer.load(config.tokenizer or find_tokenizer(checkpoint))
    trained_with = meta.get("fixed", {}).get("tokenizer_sha256", tokenizer.sha256)
    if trained_with != tokenizer.sha256:
        raise InputError(
            f"the tokenizer (sha256 {tokenizer.sha256[:12]}…) is not the one that {checkpoint} was trained with "
            f"(sha256 {trained_with[:12]}…)"
        )
    params, _ = restore_params(checkpoint, abstract_params(model, make_mesh(config.mesh)))
    facts = {
        "Steps": f"{meta.get('step', 0):,}",
        "Tokens": f"{meta.get('tokens_seen', 0):,}",
        "Commit": meta.get("git_revision") or "unknown",
    }
    imported = meta.get("imported", {})
    if imported:
        facts = {"Imported from": Path(imported["path"]).name} | facts
    return Weights(model, params, tokenizer, imported, facts)


def check_free(workdir: Path) -> None:
    """Checks that a workdir has no checkpoints but an imported one, which is replaced.

    Raises:
        ConfigError: it has others.
    """
    checkpoints = workdir / CHECKPOINTS_DIR
    steps = list_steps(checkpoints)
    if not steps:
        return
    try:
        imported = steps == [0] and "imported" in read_meta(checkpoints / "0")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--workdir={workdir} holds a checkpoint of which cannot be told whether it was imported ({error}): remove "
            f"{checkpoints / '0'}, or give convert a folder of its own"
        ) from error
    if not imported:
        raise ConfigError(
            f"--workdir={workdir} holds checkpoints of a run (steps {', '.join(map(str, steps))}): give convert a "
            "folder of its own"
        )


def check_folder(config: ConvertConfig, workdir: Path) -> None:
    """Checks that the folder to write is free, or an earlier export, and not what is read.

    Raises:
        ConfigError: it is not.
    """
    from export.hf import check_replaceable

    folder = workdir / HF_DIR
    if Path(config.source or workdir).resolve() == folder.resolve():
        raise ConfigError(
            f"ConvertConfig.source = {config.source!r}: what is written would replace it; give another --workdir",
            field="ConvertConfig.source",
        )
    check_replaceable(folder)


def model_gin(model: ModelConfig, name: str) -> str:
    """A gin file that describes a model as those of arch/ and size/ together do, for a pretrain that starts from it."""
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    rope = {field.name: getattr(model.rope, field.name) for field in dataclasses.fields(model.rope)}
    lines = [
        f"# {name}: the imported model, in place of files of arch/ and size/; give it to pretrain with INIT_FROM.",
        "from __gin__ import dynamic_registration",
        "",
        "from cpm_jax.modeling import config",
        "",
        "MODEL = @config.ModelConfig()",
        "",
        *(f"config.ModelConfig.{field} = {value!r}" for field, value in fields.items() if field != "rope"),
        "config.ModelConfig.rope = @config.RopeConfig()",
        *(f"config.RopeConfig.{field} = {value!r}" for field, value in rope.items()),
    ]
    return "\n".join(lines) + "\n"


def remove_earlier(checkpoint: Path) -> None:
    """Removes an earlier import; killed meanwhile, it leaves nothing that looks like a checkpoint."""
    old = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if checkpoint.exists():
        checkpoint.rename(old)
        shutil.rmtree(old)


def write_checkpoint(config: ConvertConfig, weights: Weights, workdir: Path) -> str:
    """Writes `checkpoints/0`, `tokenizer/` and `model.gin`, from which other verbs start; says what was written."""
    checkpoints = workdir / CHECKPOINTS_DIR
    if jax.process_index() == 0:
        try:
            remove_earlier(checkpoints / "0")
            shutil.rmtree(workdir / TOKENIZER_DIR, ignore_errors=True)
            weights.tokenizer.save(workdir / TOKENIZER_DIR)
            write_text(workdir / MODEL_GIN, model_gin(weights.model, Path(config.source).name))
        except OSError as error:
            raise ConfigError(f"--workdir={workdir}: {error.strerror or error}: {error.filename}") from error
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("an earlier import is out of the way")
    meta = {
        "model": config_to_dict(weights.model),
        "fixed": {"tokenizer_sha256": weights.tokenizer.sha256},
        "step": 0,
        "tokens_seen": 0,
        "git_revision": provenance.git_revision(),
        "versions": provenance.versions(),
        "imported": weights.imported,
    }
    with Checkpointer(checkpoints, CheckpointConfig(every=1, asynchronous=False)) as checkpointer:
        checkpointer.save(0, {"params": weights.params}, meta)
    model = weights.model
    return (
        f"{checkpoints / '0'}: {find_layout(weights.imported['config']).architecture}, "
        f"{count_params(model).total:,} parameters in {model.param_dtype} (they came in {weights.imported['dtype']}), "
        f"up to {model.max_position_embeddings:,} tokens"
    )


def write_folder(config: ConvertConfig, weights: Weights, workdir: Path) -> str:
    """Writes a Hugging Face folder; says what was written.

    Raises:
        ConfigError: the layout has no place for what the model computes; or several processes hold the parameters.
        InputError: the folder cannot be written.
    """
    from export.hf import export_hf

    if jax.process_count() > 1:
        raise ConfigError(
            f"ConvertConfig.format = {config.format!r}: Hugging Face folders are written by one process; "
            f"{jax.process_count()} run",
            field="ConvertConfig.format",
        )
    layout: str = config.format
    if layout == "hf":
        layout = find_layout(weights.imported["config"]).model_type if weights.imported else ""
    dtype = config.param_dtype or weights.imported.get("dtype") or weights.model.param_dtype
    try:
        result = export_hf(
            weights.params,
            weights.model,
            weights.tokenizer,
            workdir / HF_DIR,
            layout=layout,
            dtype=dtype,
            max_shard_bytes=config.max_shard_bytes,
            facts=weights.facts,
            imported_config=weights.imported.get("config"),
            imported_generation_config=weights.imported.get("generation_config"),
        )
    except ConfigError as error:
        if error.field != "dtype":
            raise
        # The folder's type, which is ours to name: `dtype` is here that of activations.
        raise ConfigError(f"ConvertConfig.param_dtype: {error}", field="ConvertConfig.param_dtype") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{workdir / HF_DIR} cannot be written: {error}. An earlier folder there is as it was"
        ) from error
    if result.left_out:
        print(
            f"{result.left_out:,} parameters of {weights.model.num_nextn_predict_layers} MTP layers are left out: only "
            "the layout mimo has a place for them. The next token's probabilities do not depend on them",
            file=sys.stderr,
        )
    return f"{result.folder}: {result.architecture}, {result.parameters:,} parameters in {dtype}"
