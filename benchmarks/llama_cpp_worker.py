"""What llama.cpp says of GGUF files: run by an interpreter that has the package cyllama, which brings it ready built.

`python benchmarks/llama_cpp_worker.py JOB OUT`: JOB is JSON with `model`, `texts`, `prompts` and `greedy_tokens`; OUT
(.npz) gets for each text its ids and logits, and for each prompt its ids and the greedy continuation.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cyllama.llama import llama_cpp


class Model(llama_cpp.LlamaModel):
    """Its context asks for this, and the class does not have it."""

    @property
    def n_vocab(self) -> int:
        """Number of logits of a position."""
        return self.get_vocab().n_vocab


class Session:
    """A file with one sequence under way; float32 wherever llama.cpp does not round by the types of the weights."""

    def __init__(self, file: str, length: int):
        """Loads a file for sequences of up to `length` tokens."""
        llama_cpp.disable_logging()
        model = Model(file, llama_cpp.LlamaModelParams())
        self.vocab, settings = model.get_vocab(), llama_cpp.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = length
        settings.type_k = settings.type_v = 0  # keys and values in float32, and no flash attention, which is float16
        settings.flash_attn_type = 0
        # One thread: where other programs want the cores too, several wait for each other most of the time.
        settings.n_threads = settings.n_threads_batch = 1
        self._context = llama_cpp.LlamaContext(model, settings)

    def clear(self) -> None:
        """Forgets all tokens."""
        self._context.kv_cache_clear()

    def logits(self, ids: list[int], first: int) -> np.ndarray:
        """Feeds tokens from position `first` on; their logits, float32 [T, V]."""
        batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for place, token in enumerate(ids):
            batch.add(token, first + place, [0], True)
        self._context.decode(batch)
        return np.stack([np.asarray(self._context.get_logits_ith(i), np.float32) for i in range(len(ids))])


def main() -> None:
    """Runs one job."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    session = Session(job["model"], job["context"])
    out: dict[str, Any] = {}
    for index, text in enumerate(job["texts"]):
        ids = session.vocab.tokenize(text, False, True)
        out[f"text_ids_{index}"] = np.asarray(ids)
        session.clear()
        out[f"logits_{index}"] = session.logits(ids[: job["max_tokens"]], 0)
    for index, prompt in enumerate(job["prompts"]):
        ids = session.vocab.tokenize(prompt, False, True)
        session.clear()
        said = [int(session.logits(ids, 0)[-1].argmax())]
        while len(said) < job["greedy_tokens"]:
            said.append(int(session.logits(said[-1:], len(ids) + len(said) - 1)[-1].argmax()))
        out[f"prompt_ids_{index}"], out[f"greedy_{index}"] = np.asarray(ids), np.asarray(said)
    np.savez(sys.argv[2], **out)


if __name__ == "__main__":
    main()
