"""Applies a function in other processes, in order and with bounded memory."""

import collections
import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from cpm_jax.data.errors import DataError

Item = TypeVar("Item")

_functions: list[Callable[[Any], Any]] = []  # in a worker: the one function it applies


def _start(make_function: Callable[[], Callable[[Any], Any]]) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()
    # One process per core already; threads within each would only be in the way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _functions.append(make_function())


def _exit_with(parent: Any) -> None:
    # A killed parent cannot tell its pool to stop, and a worker would wait for the next task for ever.
    multiprocessing.connection.wait([parent])
    os._exit(1)


def _call(argument: Any) -> Any:
    return _functions[0](argument)


def ordered_map(
    make_function: Callable[[], Callable[[Any], Any]],
    items: Iterable[tuple[Item, Any]],
    num_workers: int,
) -> Iterator[tuple[Item, Any]]:
    """Applies a function to the second part of each item.

    Args:
        make_function: makes the function, once in each process; must be picklable.
        items: pairs of something that stays in this process and the picklable argument; with the argument None
            the function is not called and the result is None.
        num_workers: number of processes; with 0 the function runs in this one.

    Yields:
        (first part of the item, result), in the order of `items`.

    Raises:
        DataError: a worker process was killed.
    """
    if num_workers == 0:
        function = make_function()
        for item, argument in items:
            yield item, None if argument is None else function(argument)
        return
    # Not fork: the calling process may have started threads (JAX does), which a forked child cannot use.
    context = multiprocessing.get_context("spawn")
    pending: collections.deque[tuple[Item, concurrent.futures.Future[Any] | None]] = collections.deque()
    pool = concurrent.futures.ProcessPoolExecutor(num_workers, context, _start, (make_function,))
    try:
        for item, argument in items:
            pending.append((item, None if argument is None else pool.submit(_call, argument)))
            while len(pending) > 2 * num_workers or (pending and pending[0][1] is None):
                first, future = pending.popleft()
                yield first, None if future is None else future.result()
        while pending:
            first, future = pending.popleft()
            yield first, None if future is None else future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps for want of memory; run the same command again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
