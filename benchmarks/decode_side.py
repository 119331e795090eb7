"""One side of `benchmarks.decode`, in a process of its own: requests come and answers go as JSON lines.

    python -m benchmarks.decode_side ours|transformers FOLDER
    python benchmarks/decode_side.py llama.cpp FILE.gguf          (any Python that has llama-cpp-python and numpy)

A request is `{"prompts": [[ids]], "new_tokens": n}`. The answer has the greedy tokens, the seconds of reading the
prompts ("prefill"), of a step for all sequences after that ("decode"), and the process's peak memory in bytes so far.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
_KEPT: list[object] = []  # what C code calls for as long as the process lives
# Tokens; when the prompts were read and when the last token was there, on `time.perf_counter`; steps between the two.
Timed = tuple[list[list[int]], float, float, int]
Decode = Callable[[list[list[int]], int], Timed]


def ours(folder: str) -> Decode:
    """cpm_jax, as `generate` runs it."""
    import jax
    import numpy as np

    from cpm_jax.inference.decode_loop import NO_TOKEN, extend, start
    from cpm_jax.inference.generate import decoding_params, unstack_on_cpu
    from cpm_jax.inference.load import load_model
    from cpm_jax.inference.sampling import SamplingConfig

    config, params, *_ = load_model(folder)
    params = unstack_on_cpu(decoding_params(config, params))
    greedy = SamplingConfig(temperature=0.0)

    def decode(prompts: list[list[int]], new_tokens: int) -> Timed:
        state = start(
            params,
            prompts,
            config=config,
            sampling=greedy,
            max_new_tokens=new_tokens,
            seed=0,
            indices=range(len(prompts)),
        )
        jax.block_until_ready(state.cache)
        read = time.perf_counter()
        no_end = np.array([NO_TOKEN])
        _, tokens = extend(params, state, no_end, num_tokens=new_tokens, config=config, sampling=greedy)
        rows, done = np.asarray(tokens).tolist(), time.perf_counter()
        # The last token of the prompt is read by the step that makes the first new one.
        return rows, done if new_tokens == 1 else read, done, new_tokens

    return decode


class _Clock:
    """A streamer for `transformers`: notes when the first and the last new tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_side(folder: str) -> Decode:
    """`generate` of transformers, which pads on the left."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def decode(prompts: list[list[int]], new_tokens: int) -> Timed:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        clock = _Clock()
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
                streamer=clock,
            )
        # The first thing put is the prompt.
        return out[:, width:].tolist(), clock.times[1], clock.times[-1], new_tokens - 1

    return decode


def llama_cpp(path: str) -> Decode:
    """llama.cpp by its batch interface, with keys and values in float32: all sequences in every call."""
    import llama_cpp as llama
    import numpy as np

    @llama.llama_log_callback
    def silence(*_: object) -> None:
        pass

    _KEPT.append(silence)
    llama.llama_log_set(silence, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def decode(prompts: list[list[int]], new_tokens: int) -> Timed:
        settings = llama.llama_context_default_params()
        longest = max(map(len, prompts)) + new_tokens
        settings.n_ctx = -(-longest // 256) * 256 * len(prompts)
        settings.n_batch, settings.n_ubatch, settings.n_seq_max = 2048, 512, len(prompts)
        settings.n_threads = settings.n_threads_batch = THREADS
        settings.type_k = settings.type_v = llama.GGML_TYPE_F32
        context = llama.llama_init_from_model(model, settings)
        batch = llama.llama_batch_init(settings.n_batch, 0, 1)
        rows: list[list[int]] = [[] for _ in prompts]

        def step(entries: list[tuple[int, int, int, bool]]) -> None:
            batch.n_tokens = len(entries)
            for place, (token, position, sequence, wanted) in enumerate(entries):
                batch.token[place], batch.pos[place], batch.logits[place] = token, position, wanted
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            if llama.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            for place, (_, _, sequence, wanted) in enumerate(entries):
                if wanted:
                    logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, place), (vocab_size,))
                    rows[sequence].append(int(np.argmax(logits)))

        begun = time.perf_counter()
        step(
            [
                (token, position, sequence, position == len(prompt) - 1)
                for sequence, prompt in enumerate(prompts)
                for position, token in enumerate(prompt)
            ]
        )
        read = time.perf_counter()
        for made in range(new_tokens - 1):
            step([(rows[i][-1], len(prompt) + made, i, True) for i, prompt in enumerate(prompts)])
        done = time.perf_counter()
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        decode.began = begun  # type: ignore[attr-defined]
        return rows, read, done, new_tokens - 1

    return decode


SIDES = {"ours": ours, "transformers": transformers_side, "llama.cpp": llama_cpp}


def answer(decode: Decode, request: dict[str, Any]) -> dict[str, Any]:
    """Serves one request."""
    begin = time.perf_counter()
    tokens, read, done, steps = decode(request["prompts"], request["new_tokens"])
    begin = getattr(decode, "began", begin)  # llama.cpp makes its context anew for each shape: not counted
    # Not ru_maxrss, which begins at the size of the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return {"tokens": tokens, "prefill": read - begin, "decode": (done - read) / max(steps, 1), "peak_bytes": peak}


def main() -> None:
    """Answers requests until there are no more."""
    decode = SIDES[sys.argv[1]](sys.argv[2])
    for line in sys.stdin:
        print(json.dumps(answer(decode, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
