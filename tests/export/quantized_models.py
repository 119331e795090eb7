"""A small model that is quantised, for the tests of both packings."""

import dataclasses

from cpm_jax.quantization.config import QuantizationConfig
from cpm_jax.quantization.pipeline import QuantizedModel, quantize_model
from tests.export.small_models import PLAIN, random_params

# Wide enough for groups of 128 and Marlin's chunks of 64 outputs.
CONFIG = dataclasses.replace(PLAIN, d_model=128, num_heads=2, num_kv_heads=1, d_ff=256)
ROUNDED = QuantizationConfig(method="rtn", group_size=128)


def rounded_model(quantization: QuantizationConfig = ROUNDED, **changes) -> QuantizedModel:
    """The model with random weights and `changes` to its config, rounded to nearest."""
    config = dataclasses.replace(CONFIG, **changes)
    return quantize_model(random_params(config), config, quantization)
