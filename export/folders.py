"""What all exports have in common: where they are written, what they read, and the error of one that is not right."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cpm_jax.checkpoints.sources import some_names
from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.common.files import publish_folder, restore_folder

MANIFEST_FILE = "manifest.json"
# Stands in model cards, in GGUF's metadata and in the script beside StableHLO programs.
MARK = "written by cpm_jax"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
# What exporters write that were called by themselves, without a manifest: the file with the mark, and those beside it.
_MARKED = {
    "README.md": (
        *("config.json", "generation_config.json", "configuration_*.py", "modeling_*.py", *_TOKENIZER),
        *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "model_gptq.safetensors"),
    ),
    "generate.py": ("prefill.stablehlo", "decode.stablehlo", "model.json", "params.safetensors", *_TOKENIZER),
    "*.gguf": (),
}
_BEGINNING = 1 << 16  # bytes of a file in which the mark stands
WHERE_SPARSE = "Hugging Face folders of the layouts minicpm, internlm2 and mimo attend sparsely"


class ExportError(InputError):
    """An export does not give what our model gives, or is not what its manifest says."""


def check_replaceable(folder: Path) -> None:
    """Checks that a folder does not exist, is empty, or holds an earlier export of ours and nothing else.

    An earlier export that a kill left without its name gets it back: what follows may fail, and leaves it as it is.

    Raises:
        ConfigError: it holds something else.
    """
    restore_folder(folder)
    if not folder.exists():
        return
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    others = there - _written(folder) if folder.is_dir() else {folder.name}
    if others:
        raise ConfigError(
            f"folder = {str(folder)!r}: holds files that are no export of ours ({some_names(sorted(others))}); give an "
            "empty or a new folder",
            field="folder",
        )


def _written(folder: Path) -> set[str]:
    """The files of a folder that we have written: by its manifest; where there is none, by a mark and their names."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text("utf-8"))
        if isinstance(content, dict) and {"architecture", "format", "files"} <= content.keys():
            return {MANIFEST_FILE, *content["files"]}
    except (OSError, ValueError, RecursionError, TypeError):
        pass  # an exporter that was called by itself writes none; a damaged one says nothing
    ours: set[str] = set()
    for pattern, beside in _MARKED.items():
        for file in folder.glob(pattern):
            with file.open("rb") as beginning:
                if MARK.encode() in beginning.read(_BEGINNING):
                    names = (MANIFEST_FILE, *beside)
                    ours |= {file.name, *(path.name for name in names for path in folder.glob(name))}
    return ours


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets its name, in place of an earlier export, when the block ends well.

    Raises:
        ConfigError: as `check_replaceable`.
    """
    check_replaceable(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def on_host(leaf: Any, layer: int | None) -> np.ndarray:
    """One of our parameters, or one layer of it, as an array of numpy; no more of it than that leaves a device."""
    if isinstance(leaf, jax.Array) and {device.platform for device in leaf.devices()} == {"cpu"}:
        leaf = np.asarray(leaf)  # a view: JAX would compile a program for each slice
    return np.asarray(leaf if layer is None else leaf[layer])
