"""What ExecuTorch says of a model: run by an interpreter that has executorch and tokenizers.

`python executorch_worker.py JOB OUT`: both are those of `onnx_worker.py`. Float32 is always exact here, and activations
are always rounded where weights are integers: `exact` changes nothing.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 (registers attention over a cache)
from executorch.extension.pybindings import portable_lib
from executorch.kernels import quantized  # noqa: F401 (registers what packed weights are multiplied by)
from executorch.runtime import Runtime

PACKAGES = ("executorch", "torch", "torchao", "tokenizers")


class Model:
    """A program, loaded."""

    def __init__(self, folder: str):
        program = Runtime.get().load_program(Path(folder, "model.pte"))
        self._forward = program.load_method("forward")
        self.ends = program.load_method("get_eos_ids").execute([])
        self._chunk = program.load_method("get_max_seq_len").execute([])[0]

    def __call__(self, tokens: Sequence[int], begin: int) -> np.ndarray:
        """Logits [T, V] of tokens at the positions from `begin` on; those before are in the cache."""
        logits = []
        for first in range(0, len(tokens), self._chunk):
            chunk = torch.tensor([tokens[first : first + self._chunk]])
            positions = begin + first + torch.arange(chunk.shape[1])
            # A copy, as the program's next step writes to the same memory.
            logits.append(self._forward.execute([chunk, positions])[0][0].numpy().copy())
        return np.concatenate(logits)


def say(model: Model, job: dict[str, Any]) -> dict[str, Any]:
    """Greedy text, token by token."""
    out: dict[str, Any] = {}
    prefill, decode = [], []
    for index, prompt in enumerate(job["prompts"]):
        begin = time.perf_counter()
        said = [int(model(prompt, 0)[-1].argmax())]
        prefill.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        while len(said) < job["new_tokens"] and said[-1] not in model.ends:
            said.append(int(model(said[-1:], len(prompt) + len(said) - 1)[-1].argmax()))
        decode.append(time.perf_counter() - begin)
        out[f"said_{index}"] = np.asarray(said)
    # Not ru_maxrss, which begins at the size of the process that started this one.
    status = Path("/proc/self/status")
    peak = int(status.read_text("utf-8").split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else 0
    return out | {"prefill_seconds": prefill, "decode_seconds": decode, "peak_bytes": peak}


def main() -> None:
    """Runs one job."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    out: dict[str, Any] = {"versions": json.dumps({name: importlib.metadata.version(name) for name in PACKAGES})}
    tokenizer = tokenizers.Tokenizer.from_file(f"{job['folder']}/tokenizer.json")
    for index, text in enumerate(job["texts"]):
        out[f"ids_{index}"] = np.asarray(tokenizer.encode(text, add_special_tokens=False).ids)
    if job["threads"]:
        portable_lib._unsafe_reset_threadpool(job["threads"])  # safe where nothing runs yet
    begin = time.perf_counter()
    model = Model(job["folder"])
    out["load_seconds"] = time.perf_counter() - begin
    if job["prompts"]:
        out |= say(model, job)
    for index, row in enumerate(job["rows"]):
        out[f"logits_{index}"] = model(row, 0)
    np.savez(sys.argv[2], **out)


if __name__ == "__main__":
    main()
