"""Greedy decoding and prompt reading of SmolLM2-135M in float32 beside `transformers` and llama.cpp.

    python -m benchmarks.decode [new_tokens] [Python with llama-cpp-python]

Every side is a process of its own (`benchmarks.decode_side`) with two threads; they take turns on the same prompts, and
the median of the repeats counts. Compilation is left out. All must give the same tokens. llama.cpp takes ten minutes to
build, so it is optional: its rows are there if a Python that has it is named.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from benchmarks.pretrained import smollm2_path
from benchmarks.results import Benchmark
from cpm_jax.inference.load import load_model
from export.hf import export_hf

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 5
# Prompt lengths of the decoding cases by batch size; and of the prompt that is only read.
DECODE_LENGTHS = {1: [64], 8: [16, 20, 64, 33, 100, 128, 64, 5]}
PREFILL_LENGTH = 2048
GOALS = {("decode", "transformers"): 1.5, ("decode", "llama.cpp"): 0.8, ("prefill", "transformers"): 1.0}
THREADS = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}

Answers = dict[str, list[dict[str, Any]]]


def to_f32_gguf(source: Path, target: Path) -> None:
    """Writes a GGUF file again with every tensor in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    left_out = ("general.architecture", "general.file_type", "general.quantization_version")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in left_out:
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, field.contents())
        else:
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def commands(folder: Path, llama_file: Path | None, llama_python: str | None) -> dict[str, list[str]]:
    """How each side is started."""
    sides = {
        side: [sys.executable, "-m", "benchmarks.decode_side", side, str(folder)] for side in ("ours", "transformers")
    }
    if llama_python:
        sides["llama.cpp"] = [llama_python, str(ROOT / "benchmarks/decode_side.py"), "llama.cpp", str(llama_file)]
    return sides


@contextlib.contextmanager
def started(sides: dict[str, list[str]]) -> Iterator[dict[str, subprocess.Popen]]:
    """The processes, which end with the block."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for side, command in sides.items():
            workers[side] = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | THREADS,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(workers[side].wait)
            stack.callback(workers[side].stdin.close)  # type: ignore[union-attr]
        yield workers


def ask(worker: subprocess.Popen, request: dict[str, Any]) -> dict[str, Any]:
    """One request to one side.

    Raises:
        RuntimeError: the process has ended.
    """
    worker.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
    worker.stdin.flush()  # type: ignore[union-attr]
    line = worker.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise RuntimeError(f"{worker.args!r} has ended: its error is above")
    return json.loads(line)


def take_turns(workers: dict[str, Any], prompts: Sequence[Sequence[int]], new_tokens: int) -> Answers:
    """Answers of all sides to the same request, in turn, without the first, in which some compile.

    Raises:
        ValueError: if the sides give different tokens.
    """
    request = {"prompts": prompts, "new_tokens": new_tokens}
    rounds = [{side: ask(worker, request) for side, worker in workers.items()} for _ in range(REPEATS + 1)]
    tokens = {side: answer["tokens"] for side, answer in rounds[0].items()}
    for side in tokens:
        if tokens[side] != tokens["ours"]:
            raise ValueError(f"ours and {side} decode different tokens: their speed says nothing")
    return {side: [answers[side] for answers in rounds[1:]] for side in workers}


def add_rows(bench: Benchmark, answers: Answers, phase: str, metric: str, tokens: int) -> None:
    """Tokens a second of `phase`, in whose seconds `tokens` are read or made, ours against each other side."""
    seconds = {side: statistics.median(answer[phase] for answer in given) for side, given in answers.items()}
    for side in seconds:
        if side != "ours":
            bench.add(
                metric,
                "tokens/s",
                tokens / seconds["ours"],
                larger_is_better=True,
                baseline_name=side,
                baseline=tokens / seconds[side],
                goal=GOALS.get((phase, side)),
            )


def measure(workers: dict[str, Any], ids: Sequence[int], new_tokens: int) -> Benchmark:
    """Asks all sides for all cases; prompts are cut from `ids`."""
    bench = Benchmark("decode")
    for batch, lengths in DECODE_LENGTHS.items():
        prompts = [list(ids[100 * row :][:length]) for row, length in enumerate(lengths)]
        answers = take_turns(workers, prompts, new_tokens)
        add_rows(bench, answers, "decode", f"decode, {batch} sequences, {new_tokens} tokens", batch)
        if batch == 1:
            _add_memory(bench, answers, "decode, 1 sequence")
    answers = take_turns(workers, [list(ids[:PREFILL_LENGTH])], 1)
    add_rows(bench, answers, "prefill", f"prefill, {PREFILL_LENGTH:,} tokens", PREFILL_LENGTH)
    _add_memory(bench, answers, "all cases")
    return bench


def _add_memory(bench: Benchmark, answers: Answers, case: str) -> None:
    peaks = {side: given[-1]["peak_bytes"] / 2**20 for side, given in answers.items()}
    for side in peaks:
        if side != "ours":
            bench.add(
                f"peak memory of the process, {case}",
                "MiB",
                peaks["ours"],
                larger_is_better=False,
                baseline_name=side,
                baseline=peaks[side],
            )


def main(new_tokens: int = 128, llama_python: str | None = None) -> None:
    """Prepares the weights for each side, measures, and writes the results."""
    model = load_model(smollm2_path())
    ids = model.tokenizer.encode((ROOT / "LICENSE").read_text("utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        export_hf(model.params, model.config, model.tokenizer, Path(folder) / "model")
        del model
        llama_file = Path(folder) / "model.gguf" if llama_python else None
        if llama_file:
            to_f32_gguf(smollm2_path(), llama_file)
        with started(commands(Path(folder) / "model", llama_file, llama_python)) as workers:
            bench = measure(workers, ids, new_tokens)
    # Where that Python lies says nothing.
    bench.command = f"python -m benchmarks.decode {new_tokens}" + (" LLAMA_PYTHON" if llama_python else "")
    bench.write()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 128, sys.argv[2] if len(sys.argv) > 2 else None)
