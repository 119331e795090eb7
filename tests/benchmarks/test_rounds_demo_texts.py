import json

from benchmarks import rounds_demo_texts

SOURCE = '''"""A module that says what it is for, at such length that it is a document.

{0}
"""
import os


class Thing:
    """Short."""

    def method(self):
        """A method.

        {0}
        """
        return os.sep  # kept {1}
'''


def source(number: int) -> str:
    return SOURCE.format(f"Words about number {number}. " * 12, "x" * 300)


def test_documentation_and_code_are_told_apart():
    prose, code = rounds_demo_texts.divide(source(1))
    assert [text.splitlines()[0] for text in prose] == [
        "A module that says what it is for, at such length that it is a document.",
        "A method.",
    ]
    (left,) = code
    assert "class Thing:" in left
    assert "return os.sep  # kept" in left
    assert "Words about" not in left
    assert "Short." not in left


def test_no_text_has_two_roles(tmp_path, monkeypatch):
    library = tmp_path / "library"
    (library / "test").mkdir(parents=True)
    for number in range(24):
        (library / f"m{number:02d}.py").write_text(source(number))
    (library / "copy.py").write_text(source(3))
    (library / "broken.py").write_text("def (:")
    (library / "test" / "left_out.py").write_text(source(99))
    monkeypatch.setattr(rounds_demo_texts.sysconfig, "get_path", lambda _: str(library))
    counts = rounds_demo_texts.write(tmp_path / "texts")
    texts = {
        name: [json.loads(line)["text"] for line in (tmp_path / "texts" / f"{name}.jsonl").open()] for name in counts
    }
    assert {name: len(found) for name, found in texts.items()} == counts
    said = [text for found in texts.values() for text in found if "Words about" in text]
    assert len(said) == len(set(said))
    assert not any("number 99." in text for text in said)
    marked = [json.loads(line) for line in (tmp_path / "texts" / "raw.jsonl").open()]
    assert all(row["prose"] == ("Words about" in row["text"]) for row in marked)
