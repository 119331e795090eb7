"""What all exports have in common: where they are written, what they read, and the error of one that is not right."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.common.files import publish_folder

MANIFEST_FILE = "manifest.json"
WHERE_SPARSE = "Hugging Face folders of the layouts minicpm, internlm2 and mimo attend sparsely"


class ExportError(InputError):
    """An export does not give what our model gives, or is not what its manifest says."""


def check_replaceable(folder: Path) -> None:
    """Checks that a folder does not exist, is empty, or holds an earlier export.

    Raises:
        ConfigError: it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    marks = [folder / MANIFEST_FILE, folder / "config.json", *folder.glob("*.gguf")]
    if not any(mark.is_file() for mark in marks):
        raise ConfigError(
            f"folder = {str(folder)!r}: holds files that are no export; give an empty or a new folder", field="folder"
        )


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
