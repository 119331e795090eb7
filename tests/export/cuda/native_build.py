"""Builds the runtime of `export/cuda/` once and runs it.

On the CPU it is built with the sanitizers, and with the CUDA backend in an emulation. CPM_TEST_BACKEND=cuda makes the
same comparisons on a GPU.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

SOURCE = Path(__file__).parents[3] / "export/cuda"
# The source of pytorch-tokenizers, which `make dev` unpacks.
TOKENIZERS = Path(os.environ.get("CPM_TOKENIZERS", Path(sys.prefix) / "pytorch_tokenizers"))
BACKEND = os.environ.get("CPM_TEST_BACKEND", "cpu")
# A GPU's driver does not run with the sanitizers.
OPTIONS = {
    "cpu": ["-DCPM_SANITIZE=ON", "-DCPM_EMULATE_CUDA=ON"],
    # By a flag of nvcc, as CMake itself has `native` from 3.24 on only.
    "cuda": ["-DCPM_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=OFF", "-DCMAKE_CUDA_FLAGS=-arch=native"],
}
ENVIRONMENT = {
    "ASAN_OPTIONS": "allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "OMP_WAIT_POLICY": "passive",  # other tests need the cores
}


def skip_unless_it_builds(folder: Path) -> None:
    """Skips the test where a tool is missing; fails it if REQUIRE_NATIVE_BUILD is set."""
    missing = [tool for tool in ("g++", "cmake") if shutil.which(tool) is None]
    if not missing and not _includes(folder, "nlohmann/json_fwd.hpp"):
        missing = ["nlohmann-json3-dev"]
    _skip(missing)


def skip_without_tokenizers(folder: Path) -> None:
    """Likewise for what the program needs to take text."""
    _skip(_missing_for_text(folder))


def _missing_for_text(folder: Path) -> list[str]:
    needed = {"libre2-dev": "re2/re2.h", "libpcre2-dev": "pcre2.h"}
    missing = [package for package, header in needed.items() if not _includes(folder, header)]
    if shutil.which("pkg-config") is None:
        missing.append("pkg-config")
    if not (TOKENIZERS / "src/hf_tokenizer.cpp").is_file():
        missing.append(f"{TOKENIZERS} (make dev)")
    return missing


def _includes(folder: Path, header: str) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text(f"#define PCRE2_CODE_UNIT_WIDTH 8\n#include <{header}>\n")
    command = ["g++", "-std=c++17", "-fsyntax-only", str(probe)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _skip(missing: Sequence[str]) -> None:
    if missing:
        message = f"not installed: {', '.join(missing)}"
        if os.environ.get("REQUIRE_NATIVE_BUILD"):
            pytest.fail(message)
        pytest.skip(message)


@dataclass(frozen=True)
class Result:
    """What a run of the program left."""

    code: int
    ids: list[int]
    log: str


@dataclass(frozen=True)
class Build:
    """A folder with the program `cpm` and the fuzzer."""

    folder: Path

    def execute(self, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Runs one of the programs."""
        command = [str(self.folder / program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, check=False, text=True, env=os.environ | ENVIRONMENT)

    def run(self, model: Path, *arguments: object) -> Result:
        """Runs `cpm` on an exported folder."""
        done = self.execute("cpm", model, "--backend", BACKEND, "--threads", 2, *arguments)
        return Result(done.returncode, [int(word) for word in done.stdout.split()], done.stderr)

    def logits(self, model: Path, ids: Sequence[int], scratch: Path, *arguments: object) -> tuple[np.ndarray, Result]:
        """Logits after each of the ids [ids, vocabulary], and the run that made them."""
        result = self.run(model, "--ids", ",".join(map(str, ids)), "--logits", scratch / "logits.bin", *arguments)
        assert result.code == 0, result.log
        return np.fromfile(scratch / "logits.bin", np.float32).reshape(len(ids), -1), result


def build(folder: Path) -> Build:
    """Configures and builds everything, with text where what that needs is installed."""
    skip_unless_it_builds(folder)
    # Without a build type only the library is optimised: the programs would take longer to compile than to run.
    text = [] if _missing_for_text(folder) else [f"-DCPM_TOKENIZERS={TOKENIZERS}"]
    options = [*OPTIONS[BACKEND], *text, "-DCPM_TESTS=ON", "-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_BUILD_TYPE=None"]
    configure = ["cmake", "-S", SOURCE, "-B", folder, *options]
    for command in (configure, ["cmake", "--build", folder, "--parallel", "2"]):
        done = subprocess.run(list(map(str, command)), capture_output=True, check=False, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return Build(folder)
