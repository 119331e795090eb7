"""The C++ runtime on SmolLM2-135M: its logits, greedy text and speed beside ours.

`python -m benchmarks.native_runtime`: builds `export/cuda/` with all instructions of this machine, exports the weights
in bfloat16 and float16, and runs both sides on the texts that exports are checked with. Speed is measured by the
program itself, of its own process: the prompt read at once, then token by token, and by trees of drafts. It needs an
idle machine; `--skip_speed` leaves it out.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks.pretrained import smollm2_path
from benchmarks.results import Benchmark
from cpm_jax.checkpoints.weights import load_weights
from export.checks import TEXTS, exact
from export.hf import DTYPES, export_hf
from export.hf_check import logits_of

SOURCE = Path(__file__).resolve().parents[1] / "export/cuda"
CAPACITY, GREEDY_TOKENS, TOLERANCE = 256, 24, 1e-4
TIMED = {"one by one": [], "trees of 16 drafts": ["--draft", "16"]}


def missing() -> str:
    """What is needed to build it and is not installed, and how to get it; "" where it builds."""
    absent = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
    if not absent:
        command = ["g++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
        probe = subprocess.run(command, input=b"#include <nlohmann/json_fwd.hpp>\n", capture_output=True, check=False)
        absent = ["nlohmann-json3-dev"] if probe.returncode else []
    return f"{', '.join(absent)} not installed: apt-get install cmake g++ nlohmann-json3-dev" if absent else ""


def build(folder: Path) -> Path:
    """Builds the program; returns its path."""
    for command in (
        ["cmake", "-S", SOURCE, "-B", folder, "-DCPM_NATIVE=ON", "-DCMAKE_UNITY_BUILD=ON"],
        ["cmake", "--build", folder, "--parallel", "2"],
    ):
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return folder / "cpm"


def run(program: Path, folder: Path, ids: list[int], new: int, *arguments: str) -> tuple[list[int], str]:
    """Generated ids, and what the program said beside them."""
    command = [str(program), str(folder), "--ids", ",".join(map(str, ids)), "--capacity", str(CAPACITY), "--ignore-eos"]
    done = subprocess.run(
        [*command, "--max-new-tokens", str(new), *arguments], capture_output=True, text=True, check=True
    )
    return [int(word) for word in done.stdout.split()], done.stderr


def speed(log: str, what: str) -> float:
    """Tokens per second of a line of the log."""
    found = re.search(rf"{what}: .*, ([\d.]+) tokens/s", log)
    assert found is not None, log
    return float(found.group(1))


def main() -> int:
    """Builds, exports, compares, and writes results/native_runtime.json."""
    parser = argparse.ArgumentParser(description="The C++ runtime on SmolLM2-135M.")
    parser.add_argument("--types", nargs="*", default=["bfloat16", "float16"], help="types in which it is stored")
    parser.add_argument("--skip_speed", action="store_true", help="compare only")
    args = parser.parse_args()
    bench = Benchmark("native_runtime")
    weights = load_weights(smollm2_path())
    config = exact(weights.model)
    with tempfile.TemporaryDirectory() as scratch:
        program = build(Path(scratch) / "build")
        for kind in args.types:
            folder = Path(scratch) / kind
            export_hf(weights.params, weights.model, weights.tokenizer, folder, layout="llama", dtype=kind)
            params = jax.tree.map(
                lambda leaf, kind=kind: np.asarray(leaf).astype(DTYPES[kind]).astype(np.float32), weights.params
            )
            worst, agreed = 0.0, 0
            for text in TEXTS.values():
                ids = weights.tokenizer.encode(text)
                file = Path(scratch) / "logits.bin"
                new, log = run(program, folder, ids, GREEDY_TOKENS, "--logits", str(file))
                ours = logits_of(config, params, ids + new)
                theirs = np.fromfile(file, np.float32).reshape(len(ids), -1)
                worst = max(worst, float(np.abs(ours[: len(ids)] - theirs).max() / np.abs(ours).max()))
                agreed += int(np.sum(ours[len(ids) - 1 : -1].argmax(axis=-1) == new))
            title = f"SmolLM2-135M-Instruct, {kind}"
            bench.add(f"{title}: largest difference of logits, of the largest", "", worst, larger_is_better=False,
                      baseline_name="tolerance", baseline=TOLERANCE, goal=1.0)  # fmt: skip
            bench.add(f"{title}: greedy tokens that are ours", "", agreed, larger_is_better=True,
                      baseline_name="tokens", baseline=GREEDY_TOKENS * len(TEXTS), goal=1.0)  # fmt: skip
            if args.skip_speed:
                continue
            for name, arguments in TIMED.items():
                _, log = run(program, folder, weights.tokenizer.encode(TEXTS["code"]), 64, *arguments)
                bench.add(f"{title}: generated, {name}", "tokens/s", speed(log, "generated"), larger_is_better=True)
            bench.add(f"{title}: prompt", "tokens/s", speed(log, "prompt"), larger_is_better=True)
    bench.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
