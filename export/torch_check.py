"""Compares a folder with our runtime in PyTorch, which reads packed weights that `transformers` cannot load here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpm_jax.modeling.config import ModelConfig
from export.folders import ExportError
from export.hf_check import greedy, logits_of
from export.manifest import Check
from export.torch_runtime.config import FolderError
from export.torch_runtime.generate import SamplingConfig, generate
from export.torch_runtime.model import load_model


@torch.inference_mode()
def check_torch_runtime(
    folder: Path, config: ModelConfig, params: Any, rows: Sequence[Sequence[int]], greedy_tokens: int, tolerance: float
) -> Check:
    """Compares logits and greedy text, both computed in float32.

    Args:
        folder: which.
        config: its model.
        params: our parameters, as they read back.
        rows: token ids of texts.
        greedy_tokens: how many tokens each is continued by.
        tolerance: largest difference of two logits, as a fraction of the largest, or as it is where none is above 1.

    Raises:
        ExportError: they differ, or the runtime refuses the folder.
    """
    try:
        model = load_model(folder, dtype=torch.float32)
    except FolderError as error:
        raise ExportError(f"{folder} is not run in PyTorch: {error}") from error
    max_error, largest, positions, agreed = 0.0, 0.0, 0, 0
    for ids in rows:
        cache = model.init_cache(len(ids) + greedy_tokens)
        hidden = model(torch.tensor([ids]), torch.arange(len(ids)), cache, len(ids))
        theirs, ours = model.logits(hidden)[0].numpy(), logits_of(config, params, ids)
        max_error = float(np.maximum(max_error, np.abs(ours - theirs).max()))  # Python's max passes over NaN
        largest = max(largest, float(np.abs(theirs).max()))
        said = list(generate(model, ids, greedy_tokens, SamplingConfig(temperature=0)))
        tie = 2 * tolerance * max(1.0, largest)
        if greedy(config, params, ids, len(said), follow=said, tie=tie) != said:
            raise ExportError(f"{folder}: PyTorch continues a text in another way than our decoder")
        positions += len(ids)
        agreed += len(said)
    if not max_error <= tolerance * max(1.0, largest):
        raise ExportError(
            f"{folder}: logits in PyTorch differ from ours by {max_error:.3g}: more than {tolerance:g} of the largest, "
            f"{largest:.3g}"
        )
    figures: dict[str, float | int | str] = {
        "max_error": max_error,
        "largest_logit": largest,
        "positions": positions,
        "greedy_tokens": agreed,
    }
    return Check("torch_runtime", figures)
