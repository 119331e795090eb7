"""The runtime, built once for all files that test it."""

import fcntl
import os

import pytest

from tests.export.cuda.native_build import Build, build


@pytest.fixture(scope="session")
def runtime(tmp_path_factory) -> Build:
    """Of several test processes the first builds, and the others find that nothing is left to do."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    (shared / "native").mkdir(exist_ok=True)
    with open(shared / "native.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(shared / "native")
