"""Sizes that do not fit are refused with the field, its value and what would do."""

import dataclasses
import math
from typing import Any

import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.modeling.config import ModelConfig, RopeConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "ModelConfig.num_kv_heads = 3: must divide num_heads = 4"),
        ({"d_model": 66}, "ModelConfig.d_model = 66: must be divisible by num_heads = 4, or set head_dim"),
        ({"head_dim": 15}, "ModelConfig.head_dim = 15: rotary embedding needs an even head_dim"),
        ({"num_layers": 0}, "ModelConfig.num_layers = 0: input should be greater than 0"),
        ({"d_ff": 12.5}, "ModelConfig.d_ff = 12.5: input should be a valid integer"),
        ({"remat": "some"}, "ModelConfig.remat = 'some': input should be 'none', 'dots' or 'full'"),
        ({"dtype": "float16"}, "ModelConfig.dtype = 'float16': input should be 'float32' or 'bfloat16'"),
        (
            {"rope": RopeConfig(short_factor=(1.0,), long_factor=(2.0,), original_max_position_embeddings=8)},
            "RopeConfig.short_factor has 1 values: must be head_dim/2 = 8",
        ),
    ],
)
def test_model_config_refuses(tiny_config: ModelConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(tiny_config, **changes)
    assert message in str(caught.value)
    assert caught.value.field in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"short_factor": (1.0,)}, "short_factor has 1 values and RopeConfig.long_factor has 0"),
        ({"short_factor": (1.0,), "long_factor": (1.0,)}, "original_max_position_embeddings = 0: LongRoPE needs"),
        ({"short_factor": (0.0,), "long_factor": (1.0,)}, "short_factor.0 = 0.0: input should be greater than 0"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0: input should be greater than 0"),
        ({"scaling": "ntk"}, "scaling = 'ntk': input should be 'none', 'linear', 'dynamic', 'yarn' or 'llama3'"),
        ({"scaling": "yarn", "factor": 4.0}, "original_max_position_embeddings = 0: scaling 'yarn' needs"),
        ({"scaling": "linear", "factor": 0.5}, "factor = 0.5: must be at least 1"),
        (
            {"scaling": "yarn", "original_max_position_embeddings": 8, "beta_fast": 1.0},
            "beta_fast = 1.0: must be above beta_slow = 1.0",
        ),
        (
            {"scaling": "llama3", "original_max_position_embeddings": 8, "low_freq_factor": 4.0},
            "high_freq_factor = 4.0: must be above low_freq_factor = 4.0",
        ),
        (
            {
                "scaling": "linear",
                "short_factor": (1.0,),
                "long_factor": (1.0,),
                "original_max_position_embeddings": 8,
            },
            "scaling = 'linear': short_factor and long_factor make it LongRoPE",
        ),
    ],
)
def test_rope_config_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RopeConfig(**values)
    assert f"RopeConfig.{message}" in str(caught.value)


def test_multipliers(tiny_config: ModelConfig) -> None:
    assert tiny_config.residual_multiplier == pytest.approx(1.4 / math.sqrt(2))
    assert tiny_config.width_multiplier == 64 / 32
    plain = dataclasses.replace(tiny_config, scale_depth=0.0, dim_model_base=0)
    assert plain.residual_multiplier == plain.width_multiplier == 1.0


def test_heads_may_be_wider_than_the_model(tiny_config: ModelConfig) -> None:
    assert tiny_config.head_size == 16
    assert dataclasses.replace(tiny_config, head_dim=64, d_model=66).head_size == 64
