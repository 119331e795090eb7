"""A trace of some steps of a training, by `jax.profiler`."""

import os
from pathlib import Path

import jax

PROFILE_DIR = "profile"  # within a workdir


class Profiler:
    """Traces the steps that are asked for; a context manager."""

    def __init__(self, start: int | None, steps: int, workdir: Path):
        """Traces `steps` steps after step `start`, or nothing where that is None."""
        self._start, self._steps = start, steps
        self._directory = workdir / PROFILE_DIR
        self._tracing = False

    def before(self, step: int) -> None:
        """Begins the trace if it is to begin after `step` steps."""
        if step == self._start:
            jax.profiler.start_trace(os.fspath(self._directory))
            self._tracing = True

    def ends(self, step: int) -> bool:
        """Whether the trace is to end after `step` steps."""
        return self._tracing and self._start is not None and step >= self._start + self._steps

    def stop(self) -> None:
        """Writes the trace."""
        jax.profiler.stop_trace()
        self._tracing = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._tracing:
            self.stop()
