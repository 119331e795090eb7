"""By what the folder of an evaluation is known again: the model that was measured, and the settings."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cpm_jax.common.config import config_differences, config_to_dict
from cpm_jax.common.files import write_json
from cpm_jax.evaluation.errors import ResumeError
from cpm_jax.evaluation.results import ITEMS_DIR
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params

IDENTITY_FILE = "evaluation.json"


def model_identity(config: ModelConfig, params: Params, tokenizer_sha256: str) -> dict[str, Any]:
    """By what a model is known again, wherever it lies: its weights' hash, its tokenizer's, and its config."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.ascontiguousarray(np.asarray(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
        digest.update(value.reshape(-1).view(np.uint8).data)
    return {
        "weights_sha256": digest.hexdigest(),
        "tokenizer_sha256": tokenizer_sha256,
        "config": config_to_dict(config),
    }


def claim(folder: Path, model: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Makes a folder that of an evaluation, or checks that it is that of this one.

    Raises:
        ResumeError: it holds items of another model or of other settings; says what differs.
    """
    path, wanted = folder / IDENTITY_FILE, {"model": dict(model), "settings": dict(settings)}
    has_items = any(items.stat().st_size for items in (folder / ITEMS_DIR).glob("*.jsonl"))
    if not has_items:
        write_json(path, wanted)
        return
    try:
        found = json.loads(path.read_text("utf-8"))
        differences = config_differences(found, wanted)
    except (OSError, ValueError, AttributeError) as error:
        raise ResumeError(f"{path} does not say what the items in {folder} are of: {error}") from error
    if differences:
        changes = "\n".join(f"  {name}: {old!r} there, {new!r} now" for name, (old, new) in differences.items())
        raise ResumeError(
            f"{folder} holds results of another evaluation:\n{changes}\nGive this one a folder of its own."
        )
