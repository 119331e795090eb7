"""A thread that ends a process which makes no progress: heartbeats between hosts see dead processes, not stuck ones."""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from typing import Self

from cpm_jax.common import exit_codes


class Watchdog:
    """Expects a beat every so many seconds; else writes the stacks of all threads and exits with STUCK.

    Use as a context manager. The exit is immediate: what is stuck could not be unwound either. Committed checkpoints
    are whole, and the same command goes on from the newest.
    """

    def __init__(self, seconds: float, stacks_path: str | os.PathLike[str]):
        """Sets the limit.

        Args:
            seconds: longest time between beats; 0 switches the watchdog off.
            stacks_path: file that the stacks are appended to; they go to stderr too.
        """
        self._seconds = seconds
        self._stacks_path = Path(stacks_path)
        self._doing = "start"
        self._deadline = float("inf")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str, seconds: float = 0.0) -> None:
        """Tells that there was progress.

        Args:
            doing: what comes now, for the message.
            seconds: the time that it may take, where that is more than usual: compiling, restoring.
        """
        self._doing = doing
        self._deadline = time.monotonic() + max(self._seconds, seconds)

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() > self._deadline:
                self._exit()

    def _exit(self) -> None:
        message = f"watchdog: no progress in time ({self._doing}); stacks of all threads follow\n"
        with self._stacks_path.open("a", encoding="utf-8") as file:
            for out in (file, sys.stderr):
                out.write(message)
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
        os._exit(exit_codes.STUCK)

    def __enter__(self) -> Self:
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
