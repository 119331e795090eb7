"""Finding stop strings in text that arrives piece by piece."""

from collections.abc import Sequence


class StopStringFilter:
    """Passes text on until a stop string occurs in it, and never a character of the stop string.

    Text that may be the beginning of a stop string is held back until the next piece decides. Of several stop strings
    the first to be complete counts (the longest of those that end together), so it does not matter how the text was
    cut into pieces.

    Attributes:
        stopped: whether a stop string has occurred; nothing is passed on afterwards.
    """

    def __init__(self, stop: Sequence[str]):
        self.stopped = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> str:
        """Takes the next piece of text and returns what may be shown now."""
        if self.stopped:
            return ""
        self._held += text
        starts = [(stop, self._held.find(stop)) for stop in self._stop]
        ends = [(start + len(stop), start) for stop, start in starts if start >= 0]
        if ends:
            self.stopped = True
            shown, self._held = self._held[: min(ends)[1]], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """Returns the text held back, at the end of the output."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next(size for size in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:size]))
