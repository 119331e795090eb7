"""What counts as code and formulas."""

from cpm_jax.curation.code_and_math import blocks, change_prose, prose

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
