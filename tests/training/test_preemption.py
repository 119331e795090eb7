import signal
import subprocess
import sys

import pytest

from cpm_jax.training.preemption import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested(1)
        signal.raise_signal(number)
        assert stop.requested(2)
    assert signal.getsignal(number) == before


def test_the_second_ends_at_once():
    code = """
import os, signal, time
from cpm_jax.training.preemption import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested(1)
    print("noted", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=50)
    assert done.stdout == "noted\n"
    assert done.returncode == -signal.SIGTERM
