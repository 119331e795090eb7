"""Compiling for 8 devices is most of the time here; what is divided and summed does not depend on the level."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Leaves out most optimizations, in this process."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
