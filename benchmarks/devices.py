"""SmolLM2-135M in the runtimes for devices: logits, greedy text, size, memory and speed of each type, beside ours.

    python -m benchmarks.devices [--work FOLDER] [--formats onnx openvino executorch] [--skip_speed]

Everything is converted and run as `export` does it, every runtime in a process of its own with two threads. Float32 is
computed exactly; other types are run as the runtime likes it, which may round activations and the cache. Speed and
memory are those of a prompt and its continuation, with our decoder in turn; they need an idle machine. What is
converted already in the folder of `--work` is taken as it is.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.decode import ask, commands, started
from benchmarks.pretrained import smollm2_path
from benchmarks.results import Benchmark
from cpm_jax.checkpoints.weights import Weights, load_weights
from export.checks import TEXTS, TOLERANCE, exact
from export.devices.checks import Said, compare, other_ids
from export.devices.convert import device_model, export_device
from export.devices.runtimes import RUNTIMES, Job
from export.hf import export_hf

MODEL = "SmolLM2-135M-Instruct"
LICENCE = Path(__file__).resolve().parents[1] / "LICENSE"
GREEDY_TOKENS = 96  # of each text
PROMPT, NEW, REPEATS, THREADS = 512, 128, 3, 2


def compare_case(bench: Benchmark, title: str, folder: Path, runtime: str, dtype: str, weights: Weights) -> None:
    """Adds what the runtime says of texts, held against our decoder."""
    texts, tokenizer = [*TEXTS.values(), LICENCE.read_text("utf-8")[:1200]], weights.tokenizer
    rows = [tokenizer.encode(text) for text in texts]
    exactly = dtype == "float32"
    answer = RUNTIMES[runtime].ask(Job(str(folder), texts, rows, rows, GREEDY_TOKENS, exactly, THREADS))
    said = [
        Said(answer[f"ids_{i}"].tolist(), answer[f"logits_{i}"], answer[f"said_{i}"].tolist())
        for i in range(len(texts))
    ]
    config = exact(device_model(weights.model))
    figures: dict[str, Any] = compare(said, rows, weights.params, config, title, exactly=False).figures
    bench.add(f"{title}: texts with equal token ids", "", len(texts) - other_ids(said, texts, tokenizer),
              larger_is_better=True, baseline_name="texts", baseline=len(texts), goal=1.0)  # fmt: skip
    agreed, _, chosen = figures["greedy_tokens"].partition(" of ")
    bench.add(f"{title}: greedy tokens that are ours", "", int(agreed), larger_is_better=True,
              baseline_name="tokens", baseline=int(chosen), goal=1.0 if exactly else None)  # fmt: skip
    bench.add(f"{title}: largest difference of logits", "", figures["max_error"], larger_is_better=False,
              baseline_name="1e-4 of the largest logit", baseline=TOLERANCE * figures["largest_logit"],
              goal=1.0 if exactly else None)  # fmt: skip
    bench.add(f"{title}: KL divergence", "nats", figures["kl_divergence"], larger_is_better=False)
    bench.add(f"{title}: perplexity", "", figures["perplexity"], larger_is_better=False,
              baseline_name="ours, float32", baseline=figures["perplexity_of_source"])  # fmt: skip


def measure_case(
    bench: Benchmark, title: str, folder: Path, runtime: str, dtype: str, ids: list[int], ours: Any
) -> None:
    """Adds memory and speed, with our decoder's after them."""
    # Each begins with another token, as openvino-genai keeps what it has read of a prompt for the next.
    prompts = [ids[i:] + ids[:i] for i in range(REPEATS + 1)]
    job = Job(str(folder), prompts=prompts, new_tokens=NEW, exact=dtype == "float32", threads=THREADS)
    answer = RUNTIMES[runtime].ask(job)
    found = [ask(ours, {"prompts": [prompt], "new_tokens": NEW}) for prompt in prompts]
    prefill = PROMPT / statistics.median(answer["prefill_seconds"][1:])
    steps = [seconds / (len(answer[f"said_{i}"]) - 1) for i, seconds in enumerate(answer["decode_seconds"]) if i > 0]
    read = statistics.median(one["prefill"] for one in found[1:])
    step = statistics.median(one["decode"] for one in found[1:])
    bench.add(f"{title}: load", "s", float(answer["load_seconds"]), larger_is_better=False)
    bench.add(f"{title}: peak memory", "MB", float(answer["peak_bytes"]) / 1e6, larger_is_better=False,
              baseline_name="ours, float32", baseline=found[-1]["peak_bytes"] / 1e6)  # fmt: skip
    bench.add(f"{title}: prompt of {PROMPT} tokens", "tokens/s", prefill, larger_is_better=True,
              baseline_name="ours, float32", baseline=PROMPT / read)  # fmt: skip
    bench.add(f"{title}: {NEW} tokens after it", "tokens/s", 1 / statistics.median(steps), larger_is_better=True,
              baseline_name="ours, float32", baseline=1 / step)  # fmt: skip


def main() -> int:
    """Converts, compares, measures, and writes results/devices.json."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M in the runtimes for devices.")
    parser.add_argument("--work", type=Path, help="folder that keeps what is converted")
    parser.add_argument("--formats", nargs="*", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--skip_speed", action="store_true", help="compare only")
    args = parser.parse_args()
    for name in args.formats:
        if words := RUNTIMES[name].missing():
            raise SystemExit(words)
    bench = Benchmark("devices", "python -m benchmarks.devices")
    weights = load_weights(smollm2_path())
    ids = weights.tokenizer.encode(LICENCE.read_text("utf-8"))[:PROMPT]
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not args.skip_speed:
            folder = work / "hf"
            export_hf(weights.params, weights.model, weights.tokenizer, folder)
            sides = {"ours": commands(folder, None, None)["ours"]}
            ours = stack.enter_context(started(sides))["ours"]
        for name in args.formats:
            for dtype in RUNTIMES[name].types:
                folder, title = work / f"{name}-{dtype}", f"{MODEL}, {RUNTIMES[name].title}, {dtype}"
                if not folder.exists():
                    export_device(weights.params, weights.model, weights.tokenizer, folder, runtime=name, dtype=dtype)
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                bench.add(f"{title}: size", "MB", size / 1e6, larger_is_better=False)
                compare_case(bench, title, folder, name, dtype, weights)
                if not args.skip_speed:
                    measure_case(bench, title, folder, name, dtype, ids, ours)
    bench.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
