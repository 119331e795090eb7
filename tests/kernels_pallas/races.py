"""Whether a Pallas kernel, interpreted with its memories, reads or writes what another part of it is still writing."""

from collections.abc import Callable

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

DETECT_RACES = pltpu.InterpretParams(detect_races=True)


def races(capfd: pytest.CaptureFixture[str], function: Callable[[], object]) -> bool:
    """Runs `function`, whose kernels are interpreted with DETECT_RACES: JAX says on standard output what it finds."""
    capfd.readouterr()  # what was said before
    jax.block_until_ready(function())
    return "RACE DETECTED" in capfd.readouterr().out
