"""Shared by all tests: CPU only, a small model, and a compilation cache for the processes that tests start."""

import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One for each run, which the workers of a run inherit: a program that another processor compiled adds in another order.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="cpm_jax_test_cache_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

from cpm_jax.modeling.config import ModelConfig

# Programs that a test starts share compiled code; the test process itself compiles anew. Reading large CPU programs
# back (`deserialize_executable`) has crashed a test process, and with it all that the process had yet to run.
jax.config.update("jax_enable_compilation_cache", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: of two processes neither waits at the end for the other's last file."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


# `make test-latest` runs where no small build of PyTorch exists: files that compare with it are then left out, and the
# header of the run says which.
_NEEDS_TORCH = re.compile(r"^\s*((import|from) (torch|transformers)\b|from benchmarks import decode\b)", re.MULTILINE)
collect_ignore = (
    []
    if importlib.util.find_spec("torch")
    else [str(path) for path in Path(__file__).parent.rglob("test_*.py") if _NEEDS_TORCH.search(path.read_text())]
)


def pytest_report_header() -> str:
    """Says what was left out."""
    names = ", ".join(sorted(Path(path).name for path in collect_ignore))
    return f"PyTorch is not installed; left out: {names}" if names else "PyTorch is installed: nothing is left out"


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Lets compiled programs go between files once they hold half of the memory maps that a process may have.

    A program takes three maps; at Linux's limit of 65,530 the next compilation ends the process by a fault.
    """
    yield
    with open("/proc/self/maps") as maps:
        if sum(1 for _ in maps) > 30_000:
            jax.clear_caches()
            gc.collect()


@pytest.fixture
def tiny_config() -> ModelConfig:
    """A MiniCPM4-shaped model that compiles in a second: GQA, µP multipliers, tied embedding, f32."""
    return ModelConfig(
        vocab_size=128,
        num_layers=2,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        d_ff=128,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        scale_emb=12.0,
        scale_depth=1.4,
        dim_model_base=32,
        initializer_range=0.1,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def pool_texts() -> dict[str, list[str]]:
    """Prose and code of the standard library.

    Its own process reads them: Python 3.11 keeps the depth of `ast.parse` once for all threads, so a thread of the test
    process that formats a traceback at that moment makes it a SystemError.
    """
    script = Path(__file__).parent / "standard_library_pools.py"
    return json.loads(subprocess.run([sys.executable, str(script)], check=True, capture_output=True).stdout)


@pytest.fixture(scope="session")
def pool_files(pool_texts, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pools")
    for name, texts in pool_texts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {name: str(folder / f"{name}.jsonl") for name in pool_texts}
