"""Being asked to stop: SIGTERM and SIGINT let a run save and leave."""

import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether the run was asked to stop. A context manager that replaces the signal handlers.

    In a single process, the first SIGTERM or SIGINT is noted and the second ends the process at once. Among many
    processes, JAX's coordination service takes SIGTERM, on whichever host it arrives, and all processes agree on the
    step at which they stop; SIGINT ends a process as usual.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self._signal = signal.Signals(number)
        print(f"\n{self._signal.name}: saving, then leaving; once more ends at once", file=sys.stderr, flush=True)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process asks once a step, and all get the same answer."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._signal is not None

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only; elsewhere (a notebook's worker) signals do as they did.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
