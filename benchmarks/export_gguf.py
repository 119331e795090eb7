"""GGUF files that we write, run by llama.cpp itself: token ids, logits, greedy text and perplexity beside ours.

`python -m benchmarks.export_gguf`: SmolLM2-135M-Instruct in several types, and small random models of the other
architectures, with the scalings of the rotary embedding. Both sides read the same file. Ours computes in float32;
llama.cpp attends in float32 here, and rounds what it multiplies by a matrix to fit the matrix's type: to float16 or
bfloat16, and to 8 bits for quantised ones.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.pretrained import smollm2_path
from benchmarks.results import Benchmark
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import open_source
from cpm_jax.checkpoints.weights import load_weights
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig, RopeConfig
from cpm_jax.modeling.decoder import init_params
from export.checks import TEXTS, exact
from export.gguf import export_gguf
from export.hf_check import logits_of

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
HOW_TO_INSTALL = (
    "llama.cpp is needed, which the package cyllama brings ready built: python -m venv llama && "
    "llama/bin/pip install cyllama==0.2.18 numpy, then --llama_python llama/bin/python"
)
MAX_TOKENS, GREEDY_TOKENS = 192, 24
TYPES = ("F16", "BF16", "Q8_0", "Q4_0")
LICENCE = Path(__file__).resolve().parents[1] / "LICENSE"

FACTORS = tuple(1.0 + 0.25 * i for i in range(16))
_LONGROPE = {"short_factor": FACTORS, "long_factor": tuple(4 * f for f in FACTORS)}
_MUP = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 32}
# Rows of MAX_TOKENS lie on both sides of the lengths at which the rotary embeddings of these change.
SMALL: dict[str, dict[str, Any]] = {
    "minicpm, LongRoPE, long": {
        **_MUP,
        "rope": RopeConfig(original_max_position_embeddings=64, **_LONGROPE),  # type: ignore[arg-type]
    },
    "minicpm, LongRoPE, short, tied": {
        **_MUP,
        "tie_word_embeddings": True,
        "rope": RopeConfig(original_max_position_embeddings=512, **_LONGROPE),  # type: ignore[arg-type]
    },
    "llama, YaRN": {"rope": RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=64)},
    "llama, Llama 3's factors": {
        "rope": RopeConfig(scaling="llama3", factor=8.0, original_max_position_embeddings=64),
        "head_dim": 64,
    },
    "llama, linear": {"rope": RopeConfig(scaling="linear", factor=2.0)},
    "qwen2": {"attention_bias": True},
}


def ask_llama_cpp(python: str, folder: Path, job: Mapping[str, Any]) -> Mapping[str, np.ndarray]:
    """Runs a job in llama.cpp.

    Raises:
        SystemExit: the interpreter has no llama.cpp; says how to install it.
        RuntimeError: llama.cpp does not load the file.
    """
    probe = subprocess.run([python, "-c", "import cyllama, numpy"], capture_output=True, text=True, check=False)
    if probe.returncode:
        raise SystemExit(HOW_TO_INSTALL)
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    done = subprocess.run(
        [python, WORKER, folder / "job.json", folder / "out.npz"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp fails on {job['model']}: {done.stderr[-2000:]}")
    return np.load(folder / "out.npz")


def compare(bench: Benchmark, title: str, path: Path, python: str, context: int, texts: list[str]) -> None:
    """Adds the rows of one file."""
    source = open_source(path)
    config, params = import_params(source)
    config, tokenizer = exact(config), source.tokenizer()
    assert tokenizer is not None
    prompts = [text[: len(text) // 3] for text in TEXTS.values()]
    job = {"model": str(path), "texts": texts, "prompts": prompts, "max_tokens": MAX_TOKENS}
    said = ask_llama_cpp(python, path.parent, job | {"greedy_tokens": GREEDY_TOKENS, "context": context})

    equal = sum(said[f"text_ids_{i}"].tolist() == tokenizer.encode(text) for i, text in enumerate(texts))
    errors, largest, losses = [], 0.0, ([], [])  # type: ignore[var-annotated]
    for index in range(len(texts)):
        ids, theirs = said[f"text_ids_{index}"][:MAX_TOKENS].tolist(), said[f"logits_{index}"]
        ours = logits_of(config, params, padded(ids, context))[: len(ids)]
        errors.append(float(np.abs(ours - theirs).max()))
        largest = max(largest, float(np.abs(ours).max()))
        for loss, values in zip(losses, (ours, theirs), strict=True):
            log = np.asarray(jax.nn.log_softmax(values.astype(np.float64)))
            loss.append(-log[np.arange(len(ids) - 1), ids[1:]])
    ours_ppl, theirs_ppl = (float(np.exp(np.concatenate(loss).mean())) for loss in losses)

    agreed, ties = 0, 0
    for index in range(len(prompts)):
        ids, greedy = said[f"prompt_ids_{index}"].tolist(), said[f"greedy_{index}"].tolist()
        row = logits_of(config, params, padded(ids + greedy, context))[len(ids) - 1 : len(ids) - 1 + len(greedy)]
        for logits, token in zip(row, greedy, strict=True):
            # What follows a tie is compared too: both sides go on from llama.cpp's choice.
            agreed += int(logits.argmax()) == token
            ties += 0 < float(logits.max() - logits[token]) <= 2 * max(errors)

    total = len(prompts) * GREEDY_TOKENS
    bench.add(f"{title}: texts with equal token ids", "", equal, larger_is_better=True,
              baseline_name="texts", baseline=len(texts), goal=1.0)  # fmt: skip
    # Only float32 files are computed alike on both sides; of 16 bits the perplexity may differ by half a percent.
    exactly, closely = path.stem.endswith("-F32"), path.stem.endswith(("F32", "F16"))
    bench.add(f"{title}: greedy tokens that are ours", "", agreed, larger_is_better=True,
              baseline_name=f"tokens; of the others {ties} within rounding", baseline=total,
              goal=1.0 if exactly else None)  # fmt: skip
    bench.add(f"{title}: largest difference of logits", "", max(errors), larger_is_better=False,
              baseline_name="1e-4 of the largest logit", baseline=1e-4 * largest,
              goal=1.0 if exactly else None)  # fmt: skip
    bench.add(f"{title}: perplexity in llama.cpp", "", theirs_ppl, larger_is_better=False,
              baseline_name="ours, of the same file", baseline=ours_ppl, goal=0.995 if closely else None)  # fmt: skip


def padded(ids: list[int], length: int) -> list[int]:
    """A row as long as llama.cpp's context, by which both choose between LongRoPE's factors."""
    return ids + [0] * (length - len(ids))


def small_tokenizer() -> Tokenizer:
    """A tokenizer of few tokens, trained on the texts."""
    return Tokenizer.train([*TEXTS.values(), LICENCE.read_text("utf-8")], 600)


def main() -> int:
    """Writes the files, asks both, and writes results/export_gguf.json."""
    parser = argparse.ArgumentParser(description="GGUF files that we write, in llama.cpp.")
    parser.add_argument("--llama_python", default=sys.executable, help="an interpreter that has cyllama")
    parser.add_argument("--types", nargs="*", default=TYPES, help="types in which SmolLM2 is written")
    args = parser.parse_args()
    bench = Benchmark("export_gguf", "python -m benchmarks.export_gguf")
    texts = [*TEXTS.values(), LICENCE.read_text("utf-8")[:1200]]
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in SMALL.items():
            config = ModelConfig(
                vocab_size=640, num_layers=3, d_model=128, num_heads=4, num_kv_heads=2, d_ff=256,
                max_position_embeddings=256, initializer_range=0.15, **changes,
            )  # fmt: skip
            where = Path(folder) / "small"
            params = init_params(config, jax.random.key(0))
            result = export_gguf(params, config, small_tokenizer(), where, kind="F32")
            compare(bench, f"small random model, {name}, F32", where / result.file, args.llama_python, 256, texts)
        weights = load_weights(smollm2_path()) if args.types else None
        for kind in args.types:
            assert weights is not None
            where = Path(folder) / kind
            result = export_gguf(weights.params, weights.model, weights.tokenizer, where, kind=kind)
            compare(bench, f"SmolLM2-135M-Instruct, {kind}", where / result.file, args.llama_python, 256, texts)
    bench.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
