"""A process on each core: small models' operations lose by being split over several."""

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any


@contextlib.contextmanager
def process_on_each_core() -> Iterator[ProcessPoolExecutor]:
    """A pool of as many processes as this one may use cores, each tied to one of them."""
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    cores = context.Queue()
    for core in os.sched_getaffinity(0):
        cores.put(core)
    with ProcessPoolExecutor(cores.qsize(), context, initializer=_take_core, initargs=(cores,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)  # what fails is said now, and not when all the rest has been done too
            raise


def _take_core(cores: Any) -> None:
    os.sched_setaffinity(0, {cores.get()})
