"""How far a run is: a bar on a terminal, now and then a line in a log."""

import sys
import time
from typing import Self, TextIO

import tqdm

LINE_INTERVAL = 30.0  # seconds between lines where stderr is not a terminal


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


class Progress:
    """Shows steps done, rate, time left and a few figures of a long loop, on stderr.

    Use as a context manager. On a terminal it is a tqdm bar. Elsewhere (a log file, a supervisor's journal) it is a
    line every LINE_INTERVAL seconds and one at the end.
    """

    def __init__(
        self,
        name: str,
        total: int,
        *,
        initial: int = 0,
        tokens_per_step: int = 0,
        unit: str = "step",
        first_compiles: bool = True,
        enabled: bool = True,
        file: TextIO | None = None,
    ):
        """Shows the bar.

        Args:
            name: what runs, for example "pretrain".
            total: steps in all, or whatever `unit` counts.
            initial: steps that were done before.
            tokens_per_step: shows tokens/s where it is positive.
            unit: what is counted; "B" are bytes, shown as kB, MB and so on.
            first_compiles: whether the first update says nothing about the rate, since it compiled first.
            enabled: False shows nothing (processes other than 0).
            file: where to write; None takes stderr.
        """
        self._name, self._total, self._initial = name, total, initial
        self._tokens_per_step, self._unit = tokens_per_step, unit
        self._file = file or sys.stderr
        self._enabled = enabled
        self._start = None if first_compiles else time.monotonic()
        self._last_line = time.monotonic()
        self._step = initial
        self._figures: dict[str, str] = {}
        self._bar = None
        if enabled and self._file.isatty():
            self._bar = tqdm.tqdm(
                total=total,
                initial=initial,
                desc=name,
                unit=unit,
                unit_scale=unit == "B",
                file=self._file,
                dynamic_ncols=True,
            )

    def update(self, step: int, **figures: float) -> None:
        """Tells that `step` steps are done.

        Args:
            step: steps done in all.
            **figures: shown beside the bar, with four significant digits; whole numbers from 10,000.
        """
        if self._start is None:  # the first step compiles: it says nothing about the rate
            self._start, self._initial = time.monotonic(), step
        advance, self._step = step - self._step, step
        self._figures.update({name: _figure(value) for name, value in figures.items()})
        if self._bar is not None:
            rate = self.rate
            shown = {"tokens/s": f"{rate * self._tokens_per_step:,.0f}"} if rate and self._tokens_per_step else {}
            self._bar.set_postfix(shown | self._figures, refresh=False)
            self._bar.update(advance)
        elif self._enabled and time.monotonic() - self._last_line >= LINE_INTERVAL:
            self._line()

    @property
    def rate(self) -> float:
        """Steps a second since the first step was done; 0 before the second."""
        done = self._step - self._initial
        return done / max(time.monotonic() - self._start, 1e-9) if self._start is not None else 0.0

    def _amount(self) -> str:
        if self._unit == "B":
            return "/".join(tqdm.tqdm.format_sizeof(number, "B") for number in (self._step, self._total))
        return f"{self._step}/{self._total} {self._unit}s"

    def _line(self) -> None:
        self._last_line = time.monotonic()
        parts = [f"{self._name}: {self._amount()}"]
        if rate := self.rate:
            if self._tokens_per_step:
                parts.append(f"{rate * self._tokens_per_step:,.0f} tokens/s")
            parts.append(f"ETA {_duration((self._total - self._step) / rate)}")
        parts += [f"{name} {value}" for name, value in self._figures.items()]
        print(", ".join(parts), file=self._file, flush=True)

    def write(self, message: str) -> None:
        """Prints a line without tearing the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(message, file=self._file)
        else:
            print(message, file=self._file, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._enabled:
            self._line()
