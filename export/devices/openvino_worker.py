"""What OpenVINO says of a model: run by an interpreter that has openvino and openvino-genai.

`python openvino_worker.py JOB OUT`: both are those of `onnx_worker.py`. Logits are computed by openvino alone, text by
openvino-genai.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

PACKAGES = ("openvino", "openvino-genai", "optimum-intel", "nncf", "torch", "transformers")
# By default it computes in bfloat16 where the processor can, keeps keys and values in 8 bits, and rounds what it
# multiplies by a quantised matrix to 8 bits.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def properties(job: dict[str, Any]) -> dict[str, Any]:
    """How the model is to be compiled."""
    threads = {"INFERENCE_NUM_THREADS": job["threads"]} if job["threads"] else {}
    return threads | (EXACT if job["exact"] else {})


def logits(folder: str, rows: Sequence[Sequence[int]], settings: dict[str, Any]) -> Iterator[np.ndarray]:
    """Logits [T, V] of each row, with an empty cache."""
    model = openvino.Core().compile_model(f"{folder}/openvino_model.xml", "CPU", settings)
    names = {name for entry in model.inputs for name in entry.names}
    request = model.create_infer_request()
    for ids in rows:
        request.reset_state()
        given = {
            "input_ids": np.asarray([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({name: value for name, value in given.items() if name in names})
        yield np.array(request.get_tensor("logits").data[0])


def say(job: dict[str, Any]) -> dict[str, Any]:
    """What openvino-genai makes of texts and prompts."""
    begin = time.perf_counter()
    pipeline = genai.LLMPipeline(job["folder"], "CPU", **properties(job))
    out: dict[str, Any] = {"load_seconds": time.perf_counter() - begin}
    tokenizer = pipeline.get_tokenizer()
    for index, text in enumerate(job["texts"]):
        out[f"ids_{index}"] = np.array(tokenizer.encode(text, add_special_tokens=False).input_ids.data[0])
    settings = genai.GenerationConfig(
        max_new_tokens=job["new_tokens"], eos_token_id=pipeline.get_generation_config().eos_token_id
    )
    settings.stop_token_ids = pipeline.get_generation_config().stop_token_ids
    prefill, decode = [], []
    for index, ids in enumerate(job["prompts"]):
        result = pipeline.generate(openvino.Tensor(np.asarray([ids], np.int64)), settings)
        said = np.asarray(result.tokens[0])
        first = result.perf_metrics.get_ttft().mean / 1e3  # milliseconds
        prefill.append(first)
        decode.append(result.perf_metrics.get_generate_duration().mean / 1e3 - first)
        out[f"said_{index}"] = said
    # Not ru_maxrss, which begins at the size of the process that started this one.
    status = Path("/proc/self/status")
    peak = int(status.read_text("utf-8").split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else 0
    return out | {"prefill_seconds": prefill, "decode_seconds": decode, "peak_bytes": peak}


def main() -> None:
    """Runs one job."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    out: dict[str, Any] = {"versions": json.dumps({name: importlib.metadata.version(name) for name in PACKAGES})}
    if job["texts"] or job["prompts"]:
        out |= say(job)
    for index, values in enumerate(logits(job["folder"], job["rows"], properties(job)) if job["rows"] else ()):
        out[f"logits_{index}"] = values
    np.savez(sys.argv[2], **out)


if __name__ == "__main__":
    main()
