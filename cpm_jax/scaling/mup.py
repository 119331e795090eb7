"""Families of models over width, and which of them µP's transfer speaks of.

µP says that what was tuned on a narrow model holds for a wide one if nothing but the width differs: heads, and the
feed-forward layer grow in proportion, and a head stays as wide as it is. docs/mup.md has the rules by tensor.
"""

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from pydantic import PositiveInt

from cpm_jax.common.config import ConfigError, config_function
from cpm_jax.modeling.config import ModelConfig

KvHeads = Literal["fixed", "grow"]

# Fields that grow with the width, and those that may differ: of depth, and of how the arithmetic is done. Heads are
# compared by their real width.
_GROWS = ("d_model", "num_heads", "num_kv_heads", "d_ff")
_FREE = ("num_layers", "param_dtype", "dtype", "remat", "scan_layers", "fp8", "ternary", "head_dim")


@config_function
def at_width(model: ModelConfig, d_model: PositiveInt, kv_heads: KvHeads = "fixed") -> ModelConfig:
    """The member of a model's family that is `d_model` wide; heads are as wide as the model's.

    Args:
        model: any member.
        d_model: width of the residual stream.
        kv_heads: whether key and value heads keep their number, as in MiniCPM4, or grow with the query heads.

    Raises:
        ConfigError: the width does not give whole heads or a whole feed-forward width.
    """
    ratio = Fraction(d_model, model.d_model)
    grown = {name: ratio * getattr(model, name) for name in ("num_heads", "d_ff")}
    if kv_heads == "grow":
        grown["num_kv_heads"] = ratio * model.num_kv_heads
    for name, value in grown.items():
        if value.denominator != 1:
            raise ConfigError(
                f"at_width.d_model = {d_model}: ModelConfig.{name} = {getattr(model, name)} at width {model.d_model} "
                f"would be {float(value):g}; must be a width at which it is whole",
                field="at_width.d_model",
            )
    whole: dict[str, Any] = {name: int(value) for name, value in grown.items()}
    return dataclasses.replace(model, d_model=d_model, head_dim=model.head_size, **whole)


def standard(model: ModelConfig) -> ModelConfig:
    """The model under standard parametrisation: every width starts and learns as the base width does under µP.

    At the base width the two are the same training, so that what differs elsewhere is µP's doing.

    Raises:
        ConfigError: the model has no base width.
    """
    if not model.dim_model_base:
        raise ConfigError(
            "ModelConfig.dim_model_base = 0: this is standard parametrisation already; must be the base width of a "
            "model under µP",
            field="ModelConfig.dim_model_base",
        )
    return dataclasses.replace(model, dim_model_base=0)


def check_family(models: Sequence[ModelConfig]) -> None:
    """Refuses models between which µP promises no transfer: they differ in more than width and depth.

    Args:
        models: at least two, of different widths or depths.

    Raises:
        ConfigError: naming the field, its values and what would be accepted.
    """
    sizes = {(model.d_model, model.num_layers) for model in models}
    if len(sizes) < 2:
        raise ConfigError(
            f"ModelConfig.d_model: {len(models)} models of {len(sizes)} size; a transfer needs two widths or depths",
            field="ModelConfig.d_model",
        )
    first = models[0]
    for other in models[1:]:
        for name in (field.name for field in dataclasses.fields(first)):
            if name in _GROWS or name in _FREE:
                continue
            ours, theirs = getattr(first, name), getattr(other, name)
            if ours != theirs:
                raise ConfigError(
                    f"ModelConfig.{name} = {ours!r} at width {first.d_model} and {theirs!r} at width {other.d_model}: "
                    "must be the same in a family; only widths and depth may differ",
                    field=f"ModelConfig.{name}",
                )
        if first.head_size != other.head_size:
            raise ConfigError(
                f"ModelConfig.head_dim = {first.head_size} at width {first.d_model} and {other.head_size} at width "
                f"{other.d_model}: must be the same, as scores are divided by its square root, and more heads make a "
                "model wider (Tensor Programs V divides by head_dim itself where heads widen)",
                field="ModelConfig.head_dim",
            )
        for name in ("num_heads", "d_ff"):
            if getattr(first, name) * other.d_model != getattr(other, name) * first.d_model:
                raise ConfigError(
                    f"ModelConfig.{name} = {getattr(first, name)} at width {first.d_model} and {getattr(other, name)} "
                    f"at width {other.d_model}: must be in proportion to d_model, by which µP scales all matrices",
                    field=f"ModelConfig.{name}",
                )
