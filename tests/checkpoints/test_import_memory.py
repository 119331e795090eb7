"""Importing takes the parameters and about one tensor more, whatever their type and however many layers are stacked."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints.published_folders import CONFIGS, write

MIB = 2**20
SIZES = {
    "vocab_size": 16_384,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "rope_scaling": None,
}
IMPORT = """
import re, sys
import jax
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import open_source
jax.block_until_ready(jax.jit(lambda x: x + 1)(jax.numpy.ones(8)))
source = open_source(sys.argv[1])
# Not ru_maxrss: that one begins at the size of the process that started this one, and may never grow.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
_, params = import_params(source, param_dtype=sys.argv[2])
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.parametrize(("layout", "dtype", "size"), [("llama", "float32", 4), ("internlm2", "bfloat16", 2)])
def test_peak_memory(layout: str, dtype: str, size: int, tmp_path: Path) -> None:
    """The largest tensor is 16 MiB in its file; the largest stack of layers is 96 MiB in float32, 48 in bfloat16."""
    tensors = write(tmp_path, CONFIGS[layout] | SIZES, "bfloat16", shards=3)
    assert max(tensor.nbytes for tensor in tensors.values()) == 16 * MIB
    del tensors
    command = [sys.executable, "-c", IMPORT, str(tmp_path), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    grown, params = map(int, done.stdout.split())
    assert params > 100 * MIB * size
    assert grown > 0.9 * params
    assert grown - params < 40 * MIB, f"{grown / MIB:.0f} MiB for {params / MIB:.0f} MiB of {dtype}"
