"""Pools of real text: Python's standard library, its code against its documentation strings."""

import ast
import json
import sysconfig
from pathlib import Path

import pytest


def _strings(path: Path) -> list[str]:
    tree = ast.parse(path.read_text("utf-8"))
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, nodes)]
    return [text for text in found if len(text) > 200]


def _pools() -> dict[str, list[str]]:
    """Documentation strings, and pieces of code without any."""
    pools: dict[str, list[str]] = {"prose": [], "code": []}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]:
        pools["prose"] += _strings(path)
        text = path.read_text("utf-8")
        pools["code"] += [
            text[i : i + 1000] for i in range(2000, len(text) - 1000, 4000) if '"""' not in text[i:][:1000]
        ]
    return {name: list(dict.fromkeys(texts))[:300] for name, texts in pools.items()}


@pytest.fixture(scope="session")
def pool_texts() -> dict[str, list[str]]:
    return _pools()


@pytest.fixture(scope="session")
def pool_files(pool_texts, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pools")
    for name, texts in pool_texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {name: str(folder / f"{name}.jsonl") for name in pool_texts}
