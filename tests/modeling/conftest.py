"""Shared by the tests of the model."""

from collections.abc import Callable

import pytest

from cpm_jax.common.config import config_dataclass
from cpm_jax.common.gin_utils import Settings
from cpm_jax.modeling.config import ModelConfig


@config_dataclass
class Job:
    """What a verb's config would hold."""

    model: ModelConfig


@pytest.fixture
def read_model() -> Callable[[str, str], ModelConfig]:
    """Reads MODEL of an architecture and a size in gin_configs/."""
    return lambda arch, size: (
        Settings([f"arch/{arch}.gin", f"size/{size}.gin"], ["--gin.Job.model=%MODEL"], Job).build().model
    )
