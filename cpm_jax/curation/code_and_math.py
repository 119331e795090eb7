"""Where a text holds code or formulas, which filters neither change nor measure as prose."""

import functools
import re
from collections.abc import Callable

# Blocks: fenced code, display maths, LaTeX environments. Each begins a line.
_BLOCKS = re.compile(
    r"^(?P<fence>`{3,}|~{3,})[^\n`]*\n.*?^(?P=fence)[ \t]*$"
    r"|^[ \t]*\$\$.+?\$\$[ \t]*[.,;]?[ \t]*$"
    r"|^[ \t]*\\\[.+?\\\][ \t]*[.,;]?[ \t]*$"
    r"|^[ \t]*\\begin\{(?P<environment>[a-zA-Z]+\*?)\}.*?\\end\{(?P=environment)\}",
    re.MULTILINE | re.DOTALL,
)
# Within a line: code between backticks, formulas between dollars (which no blank follows or precedes) or brackets.
_INLINE = re.compile(r"(`+)[^`\n]+\1|\$\$[^$\n]+\$\$|\$(?![\s$])[^$\n]+(?<!\s)\$(?!\d)|\\\([^\n]+?\\\)|\\\[[^\n]+?\\\]")
_BACKTICKS = re.compile(r"(`+)([^`\n]+)\1")
_MARKS = re.compile(r"[`$~]|\\[(\[b]")


@functools.lru_cache(maxsize=4)
def blocks(text: str) -> tuple[tuple[int, int], ...]:
    """Begin and end of each block of code or formulas."""
    if not _MARKS.search(text):
        return ()
    return tuple(match.span() for match in _BLOCKS.finditer(text))


@functools.lru_cache(maxsize=4)
def prose(text: str) -> str:
    """The text without its blocks and without backticks; what they enclose is part of a sentence, as formulas are."""
    spans = blocks(text)
    if not spans:
        return _BACKTICKS.sub(r"\2", text)
    ends = [0, *(end for _, end in spans)]
    begins = [*(begin for begin, _ in spans), len(text)]
    parts = [text[end:begin] for end, begin in zip(ends, begins, strict=True)]
    return _BACKTICKS.sub(r"\2", "".join([parts[0], *(part.removeprefix("\n") for part in parts[1:])]))


def change_prose(text: str, change: Callable[[str], str], *, inline: bool = True) -> str:
    """Applies a change to each piece of the text between code and formulas.

    Args:
        text: the text.
        change: what to make of a piece.
        inline: whether code and formulas within lines are left alone, too.
    """
    if not _MARKS.search(text):
        return change(text)
    result, end = [], 0
    for begin, next_end in blocks(text):
        result += [_change_lines(text[end:begin], change, inline), text[begin:next_end]]
        end = next_end
    return "".join([*result, _change_lines(text[end:], change, inline)])


def _change_lines(text: str, change: Callable[[str], str], inline: bool) -> str:
    if not inline:
        return change(text)
    result, end = [], 0
    for match in _INLINE.finditer(text):
        result += [change(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*result, change(text[end:])])


def without_inline(line: str) -> str:
    """A line without the code and formulas in it."""
    return _INLINE.sub("", line)
