"""A process on each core."""

import os
import time

import pytest

from benchmarks.cores import process_on_each_core


def test_each_process_has_a_core_of_its_own():
    with process_on_each_core() as pool:
        waiting = [pool.submit(time.sleep, 0.5) for _ in os.sched_getaffinity(0)]
        cores = [pool.submit(os.sched_getaffinity, 0).result() for _ in waiting]
    assert all(len(own) == 1 for own in cores)


def test_what_fails_ends_the_rest():
    others = []

    def fail() -> None:
        with process_on_each_core() as pool:
            failing = pool.submit(int, "no number")
            others.extend(pool.submit(time.sleep, 1) for _ in range(50))
            failing.result()

    with pytest.raises(ValueError, match="invalid literal"):
        fail()
    assert sum(other.cancelled() for other in others) >= 40
