"""Proof that an export is configured as its source, also in what only shows beyond the lengths of compared texts."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.rotary import attention_factor, inverse_frequencies
from export.folders import ExportError

# What changes the next token's probabilities. Multipliers are compared as they are applied, since layouts keep them in
# different forms.
_COMPUTED = (
    "vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_size", "d_ff", "max_position_embeddings",
    "rms_norm_eps", "attention_bias", "scale_emb", "residual_multiplier", "width_multiplier",
)  # fmt: skip
_TOLERANCE = 1e-5  # relative: GGUF keeps float32, and quotients in place of what they were computed from
_MOST_NAMED = 4


def check_config(path: Path, found: ModelConfig, source: ModelConfig, *, sparse: bool) -> None:
    """Compares the configuration of an export with its source's, field by field.

    Args:
        path: of the export.
        found: its configuration, read back.
        source: that of the model that it was made of.
        sparse: whether the export has a place for sparse attention.

    Raises:
        ExportError: a field differs; names it and both values.
    """
    theirs, ours = ({f"ModelConfig.{name}": getattr(config, name) for name in _COMPUTED} for config in (found, source))
    if source.rope.scaling == "dynamic":  # folders then hold the length before it, and a factor
        ours["ModelConfig.max_position_embeddings"] = theirs["ModelConfig.max_position_embeddings"]
    differing = _differing(theirs, ours)
    if not _rotate_alike(found, source):
        rope = (dataclasses.replace(it.rope, attention_factor=attention_factor(it)) for it in (found, source))
        named = _differing(*map(_entries, rope))
        differing |= named or {"ModelConfig.rope": (found.rope, source.rope)}
    if sparse:
        differing |= _differing(*(_entries(config.sparse_config) for config in (found, source)))
    if differing:
        listed = [f"{name} = {there} where the source has {here}" for name, (there, here) in differing.items()]
        others = f", and {len(listed) - _MOST_NAMED} other fields" if len(listed) > _MOST_NAMED else ""
        raise ExportError(f"{path}: its configuration reads back with {', '.join(listed[:_MOST_NAMED])}{others}")


def _rotate_alike(found: ModelConfig, source: ModelConfig) -> bool:
    """Whether positions are rotated alike at all lengths: one kind of scaling may be written as another."""
    longest = source.max_position_embeddings
    switches = {switch for config in (found, source) if (switch := config.rope.switch_length)}
    lengths = {longest, *switches, *(switch + 1 for switch in switches)}
    return (
        found.head_size == source.head_size
        and math.isclose(attention_factor(found), attention_factor(source), rel_tol=_TOLERANCE)
        and all(
            np.allclose(inverse_frequencies(found, length), inverse_frequencies(source, length), _TOLERANCE, 0)
            for length in lengths
        )
    )


def _entries(part: Any) -> dict[str, Any]:
    """The fields of a part of the configuration by their names, values of tuples one by one; none without it."""
    if part is None:
        return {}
    entries: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        name, value = f"{type(part).__name__}.{field.name}", getattr(part, field.name)
        entries |= {f"{name}[{i}]": item for i, item in enumerate(value)} if type(value) is tuple else {name: value}
    return entries


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    def same(there: Any, here: Any) -> bool:
        if isinstance(there, float) and isinstance(here, int | float):
            return math.isclose(there, here, rel_tol=_TOLERANCE)
        return there == here

    pairs = {name: (theirs.get(name), ours.get(name)) for name in (*theirs, *ours)}
    return {name: pair for name, pair in pairs.items() if not same(*pair)}
