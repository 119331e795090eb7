import subprocess
import sys
import time

from cpm_jax.common import exit_codes
from cpm_jax.training.watchdog import Watchdog

STUCK = """
import sys, threading, time
from cpm_jax.training.watchdog import Watchdog

def wait_for_ever():
    time.sleep(100)

with Watchdog(0.3, sys.argv[1]) as watchdog:
    threading.Thread(target=wait_for_ever, daemon=True).start()
    watchdog.beat("a step")
    time.sleep(100)
"""


def test_a_stuck_process_dumps_its_stacks_and_exits(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path / "stacks.txt")],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == exit_codes.STUCK
    for text in (done.stderr, (tmp_path / "stacks.txt").read_text()):
        assert "no progress in time (a step)" in text
        assert "wait_for_ever" in text


def test_beats_and_allowances_keep_it_quiet(tmp_path):
    with Watchdog(0.2, tmp_path / "stacks.txt") as watchdog:
        for _ in range(4):
            watchdog.beat("a step")
            time.sleep(0.1)
        watchdog.beat("compiling", seconds=60)
        time.sleep(0.5)
    assert not (tmp_path / "stacks.txt").exists()


def test_before_the_first_beat_nothing_is_expected(tmp_path):
    with Watchdog(0.1, tmp_path / "stacks.txt"):
        time.sleep(0.3)
    assert not (tmp_path / "stacks.txt").exists()


def test_zero_switches_it_off(tmp_path):
    with Watchdog(0.0, tmp_path / "stacks.txt") as watchdog:
        watchdog.beat("a step")
        time.sleep(0.1)
    assert not (tmp_path / "stacks.txt").exists()
