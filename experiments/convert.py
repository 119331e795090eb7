"""The verb `convert`: published weights become a checkpoint of ours. `export` is the other direction."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from cpm_jax.checkpoints.hf_config import find_layout
from cpm_jax.checkpoints.manager import (
    CHECKPOINTS_DIR,
    TOKENIZER_DIR,
    CheckpointConfig,
    Checkpointer,
    find_checkpoint,
    list_steps,
    read_meta,
)
from cpm_jax.checkpoints.weights import Weights, is_foreign, load_weights
from cpm_jax.common import provenance
from cpm_jax.common.config import ConfigError, InputError, config_dataclass, config_to_dict
from cpm_jax.common.files import publish_folder, restore_folder, write_text
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.modeling.config import DType, ModelConfig
from cpm_jax.modeling.model_size import count_params

MODEL_GIN = "model.gin"  # within a workdir: the imported model, for pretrain


@config_dataclass
class ConvertConfig:
    """What to import.

    Attributes:
        source: a Hugging Face folder or a .gguf file.
        tokenizer: a tokenizer.json or its folder; "" is the one of the source.
        param_dtype: type that the weights are kept in; float32 holds every value of float16 and bfloat16.
        dtype: type of activations and matrix products of the model.
        mesh: how the parameters lie on devices meanwhile.
    """

    source: str
    tokenizer: str = ""
    param_dtype: DType = "float32"
    dtype: DType = "float32"
    mesh: MeshConfig = MeshConfig()


def run(config: ConvertConfig, workdir: Path) -> None:
    """Makes a checkpoint of `config.source` in `workdir`.

    Raises:
        InputError: the source or its tokenizer cannot be read, or our decoder cannot compute it.
        ConfigError: the source is a checkpoint of ours, or the workdir holds something else.
    """
    start = time.monotonic()
    check_free(workdir)
    path = Path(config.source)
    if not is_foreign(path) and path.is_dir() and has_checkpoint(path):
        raise ConfigError(
            f"ConvertConfig.source = {config.source!r}: is a checkpoint of ours already; the verb export writes it in "
            "the formats of others",
            field="ConvertConfig.source",
        )
    weights = load_weights(
        path, config.tokenizer, param_dtype=config.param_dtype, dtype=config.dtype, mesh=make_mesh(config.mesh)
    )
    model = weights.model
    write_checkpoint(weights, workdir, {MODEL_GIN: model_gin(model, path.name)})
    if jax.process_index() == 0:
        print(
            f"{workdir / CHECKPOINTS_DIR / '0'}: {find_layout(weights.imported['config']).architecture}, "
            f"{count_params(model).total:,} parameters in {model.param_dtype} (they came in "
            f"{weights.imported['dtype']}), up to {model.max_position_embeddings:,} tokens, in "
            f"{time.monotonic() - start:.1f} s"
        )


def has_checkpoint(path: Path) -> bool:
    """Whether a folder is, or has, a checkpoint of ours."""
    try:
        find_checkpoint(path)
    except InputError:
        return False
    return True


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
            f"{checkpoints / '0'}, or give another --workdir"
        ) from error
    if not imported:
        raise ConfigError(
            f"--workdir={workdir} holds checkpoints of a run (steps {', '.join(map(str, steps))}): give another "
            "--workdir"
        )


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


@contextlib.contextmanager
def _naming(workdir: Path) -> Iterator[None]:
    """An error of the disk in the block says that it is one of the workdir."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--workdir={workdir}: {error.strerror or error}: {error.filename}") from error


def _synchronize(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def write_checkpoint(
    weights: Weights, workdir: Path, files: Mapping[str, str], more: Mapping[str, Any] | None = None
) -> None:
    """Writes `checkpoints/0`, `tokenizer/` and further files, from which other verbs start.

    All is written beside its place first, so a full disk leaves an earlier import as it was.

    Args:
        weights: what is saved; an earlier import in the workdir is replaced.
        workdir: where to.
        files: texts beside it, by name.
        more: of the checkpoint's metadata.

    Raises:
        ConfigError: the workdir cannot be written.
        CheckpointError: the checkpoint cannot be saved.
    """
    checkpoint, tokenizer, stage = workdir / CHECKPOINTS_DIR / "0", workdir / TOKENIZER_DIR, workdir / ".import"
    first = jax.process_index() == 0
    meta = {
        "model": config_to_dict(weights.model),
        "fixed": {"tokenizer_sha256": weights.tokenizer.sha256},
        "step": 0,
        "tokens_seen": 0,
        "git_revision": provenance.git_revision(),
        "versions": provenance.versions(),
        "imported": weights.imported,
    }
    try:
        if first:
            with _naming(workdir):
                for folder in (checkpoint, tokenizer):
                    restore_folder(folder)
                shutil.rmtree(stage, ignore_errors=True)
                tokenizer.mkdir(parents=True, exist_ok=True)  # fails now where the name is not free
                weights.tokenizer.save(stage / TOKENIZER_DIR)
        _synchronize("what an earlier import left over is removed")
        with Checkpointer(stage / CHECKPOINTS_DIR, CheckpointConfig(every=1, asynchronous=False)) as checkpointer:
            checkpointer.save(0, {"params": weights.params}, meta | dict(more or {}))
        if first:
            with _naming(workdir):
                for name, text in files.items():
                    write_text(workdir / name, text)
                checkpoint.parent.mkdir(exist_ok=True)
                # Killed between the two, readers say that the tokenizer is another, if it is.
                publish_folder(stage / TOKENIZER_DIR, tokenizer)
                publish_folder(stage / CHECKPOINTS_DIR / "0", checkpoint)
        _synchronize("the import has its name")
    finally:
        if first:
            shutil.rmtree(stage, ignore_errors=True)
