"""What counts as code and formulas."""

import time

import pytest

from cpm_jax.curation.cleaning import RemoveBoilerplate
from cpm_jax.curation.code_and_math import blocks, change_prose, in_blocks, prose, without_inline
from cpm_jax.curation.dedup import paragraphs
from cpm_jax.curation.document import Document
from cpm_jax.curation.words import count_sentences, split_words

TEXT = """Some words.

```python
x = {"a": 1}

y = 2
```
Between $a_{1} + b$ and `code {x}` here.
$$
E = mc^2
$$
\\begin{align}
a &= b
\\end{align}
It costs $5 or 10$, the end."""


def test_blocks_are_fences_display_maths_and_environments():
    found = [TEXT[begin:end].split("\n")[0] for begin, end in blocks(TEXT)]
    assert found == ["```python", "$$", "\\begin{align}"]
    assert blocks("no code, $5 or $6, a ` alone") == ()


def test_prose_is_what_remains():
    assert prose(TEXT) == ("Some words.\n\nBetween $a_{1} + b$ and code {x} here.\nIt costs $5 or 10$, the end.")
    assert prose("```\nonly code\n```") == ""
    assert prose("an unclosed ```\nfence") == "an unclosed ```\nfence"


def test_changes_touch_prose_alone():
    changed = change_prose(TEXT, str.upper)
    for kept in ('x = {"a": 1}\n\ny = 2', "$a_{1} + b$", "`code {x}`", "E = mc^2", "a &= b"):
        assert kept in changed
    assert changed.startswith("SOME WORDS.")
    assert "BETWEEN $a" in changed
    assert "THE END." in changed
    assert change_prose(TEXT, lambda piece: piece) == TEXT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("~~~\n```\na\n```\n~~~\nb", ["~~~\n```\na\n```\n~~~"]),
        ("```\na\n````\n```  \nb", ["```\na\n````\n```  "]),
        ("$$\n$$ a $$.\nb", ["$$\n$$ a $$."]),
        ("$$$$\n$$ a $$,", ["$$$$\n$$ a $$,"]),
        ("\\[ a\n\\] b\n c \\] \nd", ["\\[ a\n\\] b\n c \\] "]),
        ("\\begin{a}\\begin{b}\\end{a} x\\end{b}", ["\\begin{a}\\begin{b}\\end{a}"]),
        ("\\begin{a}\n$$\n\\begin{b*} x\n\\end{b*} y\n$$ z", ["\\begin{b*} x\n\\end{b*}"]),
        ("a ```\nb\n```\nc", []),
    ],
)
def test_a_block_ends_at_the_first_mark_that_closes_it(text, expected):
    assert [text[begin:end] for begin, end in blocks(text)] == expected


def test_pieces_that_touch_a_block():
    text = "ab\n$$x$$\ncd\n$$y$$\nef"
    touched = in_blocks(text)
    inside = {place for begin, end in blocks(text) for place in range(begin, end)}
    for begin in range(len(text)):
        for end in range(begin + 1, len(text) + 1):
            assert touched(begin, end) == bool(inside & set(range(begin, end)))


def test_code_and_formulas_within_a_line():
    for inside in ("``a``", "`a`", "$a$", "$$a$$", "\\(a\\)", "\\[a \\\\[2pt] b\\]", "\\(\\frac{a}{b}\\)"):
        assert without_inline(f"x {inside} y") == "x  y"
    for outside in ("$5 and $6", "`a", "\\(a", "\\[a", "$ a $"):
        assert without_inline(f"x {outside} y") == f"x {outside} y"


ODD = {
    "blanks": " ",
    "a blank line and a word": "x" + " " * 50 + "\n",
    "environments": "\\begin{a}\n",
    "brackets": "\\[\n",
    "dollars": "$$ a\n",
    "blanks after dollars": "$$" + " " * 60,
    "fences": "```a\n",
    "brackets in a line": "\\(",
    "square brackets in a line": "\\[",
    "backticks": "`",
    "underscores": "_",
    "dots": ".",
    "dots and dashes": ".-",
    "encoded": "a+",
    "lines and blocks": "```\nx\n```\n\na line of text that is long enough\n",
}
FUNCTIONS = {
    "blocks": lambda text: prose.__wrapped__(text) and blocks.__wrapped__(text),
    "inline": without_inline,
    "paragraphs": lambda text: paragraphs(text, 20),
    "words": split_words.__wrapped__,
    "sentences": count_sentences,
    "boilerplate": lambda text: RemoveBoilerplate()(Document(text, "1")),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_time_grows_with_the_length_and_not_with_its_square(name):
    """A text of 32 times the length: in proportion 32 times the time, squared 1,024 times."""

    def seconds(text):
        begin = time.process_time()
        FUNCTIONS[name](text)
        return time.process_time() - begin

    for kind, piece in ODD.items():
        short, long = ((piece * (size // len(piece) + 1))[:size] + "x" for size in (1 << 12, 1 << 17))
        least = min(seconds(f"{short}{number}") for number in range(3))
        limit = max(0.1, 200 * least)
        assert any(seconds(f"{long}{number}") < limit for number in range(3)), kind
