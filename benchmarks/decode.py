"""Tokens a second of greedy decoding beside `transformers`, on the same random weights and the same prompts.

    python -m benchmarks.decode [new_tokens]

The model is arch/minicpm4.gin with size/15m.gin in float32, as a Hugging Face folder for the other side. Both sides
decode the same batches; compilation is left out, reading the prompts is not, and the best of some runs in turn counts.
Both must give the same tokens.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from benchmarks.results import Benchmark
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.decode_loop import NO_TOKEN, extend, start
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, init_params
from export.hf import export_hf

MODEL = ModelConfig(
    vocab_size=8192,
    num_layers=7,
    d_model=384,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    d_ff=1536,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=256,
    initializer_range=0.1,
    dtype="float32",
    scan_layers=False,
)
PROMPT_LENGTHS = {1: [64], 8: [16, 20, 64, 33, 100, 128, 64, 5]}
REPEATS = 3
GREEDY = SamplingConfig(temperature=0.0)

Decode = Callable[[list[list[int]], int], np.ndarray]


def ours(params: Params) -> Decode:
    """Greedy tokens [B, new_tokens] of cpm_jax."""

    def decode(prompts: list[list[int]], new_tokens: int) -> np.ndarray:
        state = start(
            params,
            prompts,
            config=MODEL,
            sampling=GREEDY,
            max_new_tokens=new_tokens,
            seed=0,
            indices=range(len(prompts)),
        )
        no_end = np.array([NO_TOKEN])
        _, tokens = extend(params, state, no_end, num_tokens=new_tokens, config=MODEL, sampling=GREEDY)
        return np.asarray(tokens)

    return decode


def theirs(folder: Path) -> Decode:
    """Greedy tokens [B, new_tokens] of `transformers`, which pads on the left."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def decode(prompts: list[list[int]], new_tokens: int) -> np.ndarray:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0
            )
        return out[:, width:].numpy()

    return decode


def best_times(sides: list[Decode], prompts: list[list[int]], new_tokens: int) -> list[float]:
    """Seconds of the fastest of some runs of each side, taken in turn.

    Raises:
        ValueError: if the sides give different tokens.
    """
    tokens = [decode(prompts, new_tokens) for decode in sides]
    if not all(np.array_equal(tokens[0], other) for other in tokens[1:]):
        raise ValueError("the two sides decode different tokens: their speed says nothing")
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(REPEATS):
        for side, decode in enumerate(sides):
            begin = time.perf_counter()
            decode(prompts, new_tokens)
            times[side].append(time.perf_counter() - begin)
    return [min(side) for side in times]


def measure(new_tokens: int) -> Benchmark:
    """Runs both sides on one prompt and on a batch of eight."""
    params = init_params(MODEL, jax.random.key(0))
    tokenizer = Tokenizer.train(["tokens do not matter here"], vocab_size=261)
    bench = Benchmark("decode")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        export_hf(params, MODEL, tokenizer, Path(folder) / "model")
        sides = [ours(params), theirs(Path(folder) / "model")]
        for batch, lengths in PROMPT_LENGTHS.items():
            prompts = [rng.integers(0, MODEL.vocab_size, length).tolist() for length in lengths]
            our_time, their_time = best_times(sides, prompts, new_tokens)
            bench.add(
                f"greedy decoding, {batch} prompts, {new_tokens} tokens each",
                "tokens/s",
                batch * new_tokens / our_time,
                larger_is_better=True,
                baseline_name=f"transformers {transformers.__version__}, PyTorch {torch.__version__}",
                baseline=batch * new_tokens / their_time,
            )
    return bench


if __name__ == "__main__":
    measure(int(sys.argv[1]) if len(sys.argv) > 1 else 128).write()
