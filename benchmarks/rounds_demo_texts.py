"""The documents of `make rounds-demo`: what your Python's standard library says, in a heap of what it does.

`python -m benchmarks.rounds_demo_texts FOLDER` writes them as .jsonl files. Documentation strings are prose, the rest
of the sources is code; files are divided among the roles, so that no text has two. Nothing is downloaded.
"""

import argparse
import ast
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from cpm_jax.common.files import write_text

ROLES = ("default", "raw", "raw", "pools", "pools", "held_out")  # of the files, in turn
_MIN_CHARACTERS, _MAX_CHARACTERS = 200, 1500  # of a document
_PASSAGE, _PASSAGES = 400, 100  # characters and number of those held out
_LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "lib2to3", "encodings"}  # others' code, data, little prose


def divide(source: str) -> tuple[list[str], list[str]]:
    """The documentation strings of a program, and pieces of what is left of it.

    Raises:
        SyntaxError: it is no program.
    """
    lines, prose = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                prose.append(text)
                first = node.body[0]
                assert first.end_lineno is not None
                lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return [text[:_MAX_CHARACTERS] for text in prose if len(text) >= _MIN_CHARACTERS], list(pieces("".join(lines)))


def pieces(text: str) -> Iterator[str]:
    """A text in pieces, all of the same length but for the last, which goes if it is too short."""
    for begin in range(0, len(text), _MAX_CHARACTERS):
        if len(piece := text[begin : begin + _MAX_CHARACTERS].strip()) >= _MIN_CHARACTERS:
            yield piece


def read_roles(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Prose and code of each role, each text once in all."""
    found: dict[str, tuple[list[str], list[str]]] = {role: ([], []) for role in ROLES}
    seen: set[str] = set()
    files = [path for path in sorted(folder.rglob("*.py")) if not _LEFT_OUT & set(path.relative_to(folder).parts)]
    for number, path in enumerate(files):
        try:
            divided = divide(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # examples of what is none
            continue
        for texts, more in zip(found[ROLES[number % len(ROLES)]], divided, strict=True):
            new = [text for text in dict.fromkeys(more) if text not in seen]
            texts += new
            seen.update(new)
    return found


def write(folder: Path) -> dict[str, int]:
    """Writes all files, and returns how many documents each has."""
    draw = random.Random(0)
    roles = read_roles(Path(sysconfig.get_path("stdlib")))
    for prose, code in roles.values():
        draw.shuffle(prose)
        draw.shuffle(code)
    prose, code = roles["raw"]
    sets: dict[str, list[dict[str, object]]] = {
        "default": _rows([*roles["default"][0], *roles["default"][1]]),
        "raw": [*_rows(prose, prose=True), *_rows(code[: 2 * len(prose)], prose=False)],
        "docstrings": _rows(roles["pools"][0]),
        "code": _rows(roles["pools"][1][: len(roles["pools"][0])]),
        "held_out": _rows([text[:_PASSAGE] for text in roles["held_out"][0][:_PASSAGES]]),
    }
    for name, rows in sets.items():
        draw.shuffle(rows)
        write_text(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {name: len(rows) for name, rows in sets.items()}


def _rows(texts: Sequence[str], **fields: object) -> list[dict[str, object]]:
    return [{"text": text, **fields} for text in texts]


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the documents and says how many there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    for name, count in write(args.folder).items():
        print(f"{args.folder / name}.jsonl: {count:,} documents")


if __name__ == "__main__":
    main()
