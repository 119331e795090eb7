"""Prints two pools of texts, as JSON: documentation strings of the standard library, and pieces of its code."""

import ast
import json
import sysconfig
from pathlib import Path


def docstrings(path: Path) -> list[str]:
    """The longer documentation strings of a Python file."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
    return [text for text in found if len(text) > 200]


def pools() -> dict[str, list[str]]:
    """Documentation strings, and pieces of code without any."""
    pools: dict[str, list[str]] = {"prose": [], "code": []}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]:
        pools["prose"] += docstrings(path)
        text = path.read_text("utf-8")
        pools["code"] += [
            text[i : i + 1000] for i in range(2000, len(text) - 1000, 4000) if '"""' not in text[i:][:1000]
        ]
    return {name: list(dict.fromkeys(texts))[:300] for name, texts in pools.items()}


if __name__ == "__main__":
    print(json.dumps(pools()))
