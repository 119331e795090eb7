"""Programs compiled before they are needed: while a device runs one, processors that are free compile the next."""

import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import jax


class CompileAhead:
    """Compiled programs by key, each compiled once, in as many threads as half the processors. A context manager."""

    def __init__(self) -> None:
        """Holds no program yet."""
        self.threads = max((os.cpu_count() or 1) // 2, 1)
        self._pool = ThreadPoolExecutor(self.threads)
        self._futures: dict[Hashable, Future[Any]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def get(
        self,
        key: Hashable,
        function: Callable[..., Any],
        shapes: Callable[[], tuple[Any, ...]],
        donate: tuple[int, ...] = (),
        precision: str | None = "highest",
    ) -> Future[Any]:
        """The program of a key, begun to be compiled if it is not yet.

        Args:
            key: what the program depends on.
            function: to compile.
            shapes: makes its arguments, or what has their shapes and types; called in the thread.
            donate: numbers of arguments that are gone after a call.
            precision: of products of float32 values; None is the device's usual one, on a GPU 10 bits of each factor.
        """
        if key not in self._futures:
            self._futures[key] = self._pool.submit(_compile, function, shapes, donate, precision)
        return self._futures[key]


def _compile(
    function: Callable[..., Any], shapes: Callable[[], tuple[Any, ...]], donate: tuple[int, ...], precision: str | None
) -> Any:
    with jax.default_matmul_precision(precision):
        return jax.jit(function, donate_argnums=donate).lower(*shapes()).compile()
