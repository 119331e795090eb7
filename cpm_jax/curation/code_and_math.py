"""Where a text holds code or formulas, which filters neither change nor measure as prose."""

import bisect
import collections
import functools
import re
from collections.abc import Callable, Sequence

# Blocks: fenced code, display maths, LaTeX environments. Each begins a line. What opens and what closes them is looked
# for apart: one expression for both would read on to the end of the text for each that is not closed.
_OPENS = re.compile(
    r"^(?:(?P<fence>`{3,}+|~{3,}+)[^\n`]*+$"
    r"|[ \t]*+(?:(?P<dollars>\$\$)|(?P<brackets>\\\[)|\\begin\{(?P<environment>[a-zA-Z]++\*?)\}))",
    re.MULTILINE,
)
_CLOSES = {
    "dollars": re.compile(r"(\$\$)[ \t]*+[.,;]?[ \t]*+$", re.MULTILINE),
    "brackets": re.compile(r"\\(\])[ \t]*+[.,;]?[ \t]*+$", re.MULTILINE),
    "environment": re.compile(r"\\end\{([a-zA-Z]++\*?)\}"),
}
# Within a line: code between backticks, formulas between dollars (which no blank follows or precedes) or brackets.
# Nothing is tried twice, so that a line takes time in proportion to its length.
_INLINE = re.compile(
    r"(?<!`)(`++)[^`\n]++\1|\$\$[^$\n]++\$\$|\$(?![\s$])[^$\n]++(?<!\s)\$(?!\d)"
    r"|\\\((?:[^\\\n]++|\\[^()\n])++\\\)|\\\[(?:[^\\\n]++|\\[^\[\]\n])++\\\]"
)
_BACKTICKS = re.compile(r"(?<!`)(`++)([^`\n]++)\1")
_MARKS = re.compile(r"[`$~]|\\[(\[b]")


@functools.lru_cache(maxsize=4)
def blocks(text: str) -> tuple[tuple[int, int], ...]:
    """Begin and end of each block of code or formulas."""
    if not _MARKS.search(text):
        return ()
    openings = list(_OPENS.finditer(text))
    if not openings:
        return ()
    closings = _closings(text, openings)
    spans, end = [], 0
    for match in openings:
        if match.start() < end:
            continue  # within a block
        kind, mark = _kind_and_mark(match)
        found = closings[mark]
        at = bisect.bisect_left(found, (match.end() + (kind in ("dollars", "brackets")), 0))  # no formula is empty
        if at < len(found):
            end = found[at][1]
            spans.append((match.start(), end))
    return tuple(spans)


def _kind_and_mark(opening: re.Match[str]) -> tuple[str, str]:
    """The kind of a block, and what its end must have: a fence or a name that is the same."""
    kind = opening.lastgroup or ""
    return kind, "]" if kind == "brackets" else opening[kind]


def _closings(text: str, openings: Sequence[re.Match[str]]) -> dict[str, list[tuple[int, int]]]:
    """Begin and end of all that closes blocks of these kinds, by their marks."""
    found: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)
    for kind in {opening.lastgroup or "" for opening in openings} & _CLOSES.keys():
        for match in _CLOSES[kind].finditer(text):
            found[match[1]].append(match.span())
    for opening in openings:
        kind, mark = _kind_and_mark(opening)
        if kind == "fence" and not opening[0].removeprefix(mark).strip(" \t"):
            found[mark].append(opening.span())
    return found


def in_blocks(text: str) -> Callable[[int, int], bool]:
    """A function of begin and end of a piece of the text: whether some of it lies in a block."""
    spans = blocks(text)
    ends = [end for _, end in spans]

    def lies_in_block(begin: int, end: int) -> bool:
        at = bisect.bisect_right(ends, begin)
        return at < len(ends) and spans[at][0] < end

    return lies_in_block


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
