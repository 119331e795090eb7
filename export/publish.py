"""An export is written beside its place, checked, described in its manifest, and then put there."""

import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors

from cpm_jax.checkpoints.weights import Weights
from cpm_jax.common.config import InputError
from cpm_jax.common.files import publish_folder
from export.checks import Checked
from export.folders import check_replaceable
from export.manifest import write_manifest


@dataclass(frozen=True)
class Written:
    """The files of an export, before they are checked.

    Attributes:
        architecture: what a runtime is to load it as.
        types: number of tensors of each stored type.
        parameters: number of values in them.
        left_out: what is not as in the source, in sentences.
        check: reads back what a runtime loads, and compares it with the source.
        file: the file that a runtime loads; "" is the whole folder.
    """

    architecture: str
    types: dict[str, int]
    parameters: int
    left_out: tuple[str, ...]
    check: Callable[[Path], Checked]
    file: str = ""


def publish_export(
    folder: Path, format: str, weights: Weights, write: Callable[[Path], Written], *, check: bool = True
) -> tuple[Written, Checked]:
    """Makes an export, whole or not at all.

    Args:
        folder: its place; an earlier export there is replaced.
        format: for the manifest.
        weights: what it is made of.
        write: writes it into the folder that it is given, which does not exist yet.
        check: whether to read it back and compare it.

    Returns:
        What was written, and what the checks found.

    Raises:
        ExportError: a check fails; nothing is then left, and an earlier export is as it was.
        ConfigError: the format has no place for what the model computes, or the folder holds something else.
        InputError: the folder cannot be written.
    """
    check_replaceable(folder)
    stages = folder.with_name(f".{folder.name}.export")
    shutil.rmtree(stages, ignore_errors=True)
    # A converter is a process of its own, and may outlive ours after a kill: it goes on in no stage but its own.
    stage = stages / uuid.uuid4().hex
    try:
        written = write(stage)
        checked = written.check(stage / written.file) if check else Checked(not_made={"all": "CHECK=False"})
        write_manifest(
            stage,
            format=format,
            architecture=written.architecture,
            types=written.types,
            parameters=written.parameters,
            source=dict(weights.origin),
            left_out=written.left_out,
            checks=checked.passed,
            not_checked=dict(checked.not_made),
            texts=checked.texts,
            tools=checked.tools,
        )
        publish_folder(stage, folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{folder} cannot be written: {error}. An earlier export there is as it was") from error
    finally:
        shutil.rmtree(stages, ignore_errors=True)
    return written, checked
