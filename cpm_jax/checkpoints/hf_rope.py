"""Rotary embedding in config.json: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of 5."""

import math
from collections.abc import Mapping
from typing import Any

from cpm_jax.checkpoints.sources import SourceError
from cpm_jax.modeling.config import ModelConfig, RopeConfig

Json = Mapping[str, Any]

# The entries that each type reads, under the names that ours have too; those marked False may be left out.
_ENTRIES: dict[str, dict[str, bool]] = {
    "default": {},
    "linear": {"factor": True},
    "dynamic": {"factor": True},
    "yarn": {"factor": False, "attention_factor": False, "beta_fast": False, "beta_slow": False, "truncate": False},
    "longrope": {"short_factor": True, "long_factor": True, "attention_factor": False},
    "llama3": {"factor": True, "low_freq_factor": True, "high_freq_factor": True},
}
# Entries that only change another one of ours, the attention factor.
_DERIVED = {"yarn": {"mscale", "mscale_all_dim"}, "longrope": {"factor"}}

# Of any type: what it is called, what stands elsewhere too, and what says where the numbers came from.
_COMMON = {"rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor", "finetuned"}


def read_rope(hf: Json, max_position_embeddings: int) -> tuple[dict[str, Any], int]:
    """The fields of our `RopeConfig`, and the longest sequence of the model.

    Dynamic NTK reaches beyond the `max_position_embeddings` of config.json, which is the length before it: ours is
    then `factor` times as long.

    Args:
        hf: the content of config.json.
        max_position_embeddings: of config.json, or of its class.

    Raises:
        SourceError: a type that we do not compute, or one without an entry that it needs.
    """
    where = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    entries = hf.get(where) or {}
    if not isinstance(entries, Mapping):
        raise SourceError(f"config.json: {where} = {entries!r}: accepted are an object with a rope_type, and null")
    kind = entries.get("rope_type", entries.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ENTRIES:
        raise SourceError(f"config.json: {where} has the type {kind!r}: accepted are {', '.join(_ENTRIES)}")
    accepted = _COMMON | _ENTRIES[kind].keys() | _DERIVED.get(kind, set())
    if strange := sorted(name for name in entries.keys() - accepted if entries[name] is not None):
        raise SourceError(
            f"config.json: {where} of type {kind!r} has {', '.join(strange)}, which we do not compute: accepted are "
            f"{', '.join(sorted(accepted))}"
        )
    if missing := [name for name, needed in _ENTRIES[kind].items() if needed and entries.get(name) is None]:
        raise SourceError(f"config.json: {where} of type {kind!r} lacks {', '.join(missing)}")
    if entries.get("partial_rotary_factor") not in (None, 1):
        raise SourceError(
            f"config.json: {where}.partial_rotary_factor = {entries['partial_rotary_factor']}: accepted is 1; our "
            "decoder rotates all dimensions of a head"
        )
    theta = entries.get("rope_theta", hf.get("rope_theta"))
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float)):
        raise SourceError(f"config.json: rope_theta = {theta!r}: accepted is a number above 0")
    rope: dict[str, Any] = {} if theta is None else {"rope_theta": float(theta)}
    rope |= {name: entries[name] for name in _ENTRIES[kind] if entries.get(name) is not None}
    if kind == "default":
        return rope, max_position_embeddings
    if kind == "linear":
        return rope | {"scaling": kind}, max_position_embeddings
    if kind == "dynamic":
        rope |= {"scaling": kind, "original_max_position_embeddings": max_position_embeddings}
        return rope, int(max_position_embeddings * rope["factor"])
    original = (
        hf.get("original_max_position_embeddings")
        or entries.get("original_max_position_embeddings")
        or max_position_embeddings
    )
    rope["original_max_position_embeddings"] = original
    if kind == "longrope":
        factor = entries.get("factor")
        if factor is not None and "attention_factor" not in rope:  # else it is max_position_embeddings / original
            rope["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return rope, max_position_embeddings
    rope.setdefault("factor", max_position_embeddings / original)
    mscale, mscale_all_dim = entries.get("mscale"), entries.get("mscale_all_dim")
    if kind == "yarn" and mscale and mscale_all_dim and "attention_factor" not in rope:
        log = 0.1 * math.log(rope["factor"])
        rope["attention_factor"] = (mscale * log + 1) / (mscale_all_dim * log + 1)
    return rope | {"scaling": kind}, max_position_embeddings


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The entries of config.json: `rope_theta` and `rope_scaling`, which transformers 4 and 5 both read."""
    rope: RopeConfig = config.rope
    entries: dict[str, Any] = {"rope_theta": rope.rope_theta, "rope_scaling": None}
    if (kind := rope.rope_type) == "default":
        return entries
    scaling: dict[str, Any] = {"rope_type": kind}
    for name in _ENTRIES[kind]:
        value = getattr(rope, name)
        if value is not None:
            scaling[name] = list(value) if isinstance(value, tuple) else value
    if kind == "dynamic":
        return entries | {
            "max_position_embeddings": rope.original_max_position_embeddings,
            "rope_scaling": scaling,
        }
    if kind != "linear":
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if kind == "longrope":
        entries["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return entries | {"rope_scaling": scaling}
