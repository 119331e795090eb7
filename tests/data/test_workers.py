"""Processes that apply a function, in order."""

import functools
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from cpm_jax.data.errors import DataError
from cpm_jax.data.workers import ordered_map


def square_slowly(number):
    """The earlier, the slower: results come back in another order than they are asked for."""
    time.sleep(0.05 if number < 3 else 0)
    return number * number


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(number):
    raise ValueError(f"no square of {number}")


def what_is_imported(_):
    return "jax" in sys.modules, os.environ["TOKENIZERS_PARALLELISM"]


def make(function):
    return function


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_order_and_skipped_items(num_workers):
    items = [(f"item {i}", None if i % 4 == 1 else i) for i in range(12)]
    found = list(ordered_map(functools.partial(make, square_slowly), items, num_workers))
    assert found == [(f"item {i}", None if i % 4 == 1 else i * i) for i in range(12)]


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i, i

    results = ordered_map(functools.partial(make, square_slowly), items(), 1)
    next(results)
    assert len(taken) <= 4
    results.close()


def test_errors_come_through():
    with pytest.raises(ValueError, match="no square of 7"):
        list(ordered_map(functools.partial(make, fail), [(0, 7)], 1))
    with pytest.raises(DataError, match="a worker process was killed"):
        list(ordered_map(functools.partial(make, die), [(0, 7)], 1))


def test_workers_are_lean():
    """They import no jax, and leave the cores to each other."""
    assert list(ordered_map(functools.partial(make, what_is_imported), [(0, 0)], 1)) == [(0, (False, "false"))]


def test_workers_end_with_their_parent(tmp_path):
    """Also when it is killed and cannot tell them."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import functools, os, time
            from cpm_jax.data.workers import ordered_map

            def pid_then_wait(wait):
                time.sleep(wait)
                return os.getpid()

            def make():
                return pid_then_wait

            if __name__ == "__main__":
                for _, pid in ordered_map(make, [(0, 0), (1, 600), (2, 600), (3, 600)], 1):
                    print(pid, flush=True)
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)  # raises if it does not live
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _lives(worker):
        time.sleep(0.05)
    assert not _lives(worker)


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
