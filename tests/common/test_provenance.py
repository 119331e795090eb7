import os
import re
import socket

import jax
import numpy as np

from cpm_jax.common import provenance


def test_git_revision_is_a_commit():
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", provenance.git_revision())


def test_git_revision_outside_a_checkout(tmp_path, monkeypatch):
    module = tmp_path / "cpm_jax" / "common" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance.git_revision() == ""


def test_versions():
    found = provenance.versions()
    assert found["jax"] == jax.__version__
    assert found["numpy"] == np.__version__


def test_machine_is_described_and_not_named():
    found = provenance.machine()
    assert found["device_count"] == jax.device_count()
    assert found["platform"] == "cpu"
    assert found["cores"] <= os.cpu_count()
    assert found["memory_gib"] > 0
    assert socket.gethostname() not in str(found).split()
