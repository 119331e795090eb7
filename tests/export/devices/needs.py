"""Whether the runtimes for devices are installed."""

import os

import pytest

from export.devices.runtimes import RUNTIMES


def skip_without(runtime: str) -> None:
    """Skips the test where a runtime is missing; fails it if REQUIRE_DEVICE_RUNTIMES is set."""
    if words := RUNTIMES[runtime].missing():
        if os.environ.get("REQUIRE_DEVICE_RUNTIMES"):
            pytest.fail(words)
        pytest.skip(words)
