"""Import of SmolLM2-135M from its GGUF file: time and peak memory, beside transformers' `gguf_file=`.

`python -m benchmarks.import_gguf`: each import in a process of its own, in turns. Time begins when the libraries
are imported, and ends when every parameter is in memory in float32.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.pretrained import smollm2_path
from benchmarks.results import Benchmark

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 3

# Linux counts VmHWM, the most that was resident at once, file pages that were mapped included.
_MEASURE = """
import json, sys, time

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

{imports}
before, begin = resident("VmRSS"), time.perf_counter()
{load}
seconds = time.perf_counter() - begin
print(json.dumps({{"seconds": seconds, "peak": resident("VmHWM"), "before": before, "values": count}}))
"""
OURS = _MEASURE.format(
    imports="""
import jax
from cpm_jax.checkpoints import gguf
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import open_source
jax.devices()""",
    load="""
config, params = import_params(open_source(sys.argv[1]))
jax.block_until_ready(params)
count = sum(leaf.size for leaf in jax.tree.leaves(params))""",
)
THEIRS = _MEASURE.format(
    imports="""
from pathlib import Path
import gguf, torch
from transformers import LlamaForCausalLM""",
    load="""
path = Path(sys.argv[1])
model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
count = sum(parameter.numel() for parameter in model.parameters())""",
)


def measure(program: str, path: Path) -> dict[str, float]:
    """Runs one import in a process of its own; seconds, and bytes before and at the peak."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Measures and writes results/import_gguf.json."""
    path = smollm2_path()
    runs = [(measure(OURS, path), measure(THEIRS, path)) for _ in range(REPEATS)]
    values = {run["values"] for pair in runs for run in pair}
    if len(values) != 1:
        raise RuntimeError(f"the two sides imported different numbers of values: {values}")
    ours, theirs = zip(*runs, strict=True)

    def median(side: tuple[dict[str, float], ...], figure: str) -> float:
        return statistics.median(run[figure] for run in side)

    def above(side: tuple[dict[str, float], ...]) -> float:
        return statistics.median(run["peak"] - run["before"] for run in side)

    bench, name = Benchmark("import_gguf"), "transformers gguf_file="
    title = f"SmolLM2-135M from GGUF ({values.pop():,.0f} values)"
    bench.add(
        f"{title}, time",
        "s",
        median(ours, "seconds"),
        larger_is_better=False,
        baseline_name=name,
        baseline=median(theirs, "seconds"),
    )
    for what, our_bytes, their_bytes in (
        ("peak memory of the process", median(ours, "peak"), median(theirs, "peak")),
        ("peak memory beyond the imported libraries", above(ours), above(theirs)),
    ):
        bench.add(
            f"{title}, {what}",
            "MB",
            our_bytes / 1e6,
            larger_is_better=False,
            baseline_name=name,
            baseline=their_bytes / 1e6,
        )
    bench.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
