"""What ONNX Runtime says of a model: run by an interpreter that has onnxruntime and onnxruntime-genai.

`python onnx_worker.py JOB OUT`: JOB is `export.devices.runtimes.Job` as JSON; OUT (.npz) gets `versions` (JSON), for
each text its `ids_<i>`, for each row its `logits_<i>` [T, V], for each prompt its continuation `said_<i>`, and, where
there are prompts, `load_seconds`, `prefill_seconds` and `decode_seconds` (of each prompt) and `peak_bytes`, the most
memory that the process held (0 on other systems than Linux). Logits are computed by onnxruntime alone, text by
onnxruntime-genai.
"""

import importlib.metadata
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxruntime_genai as genai

PACKAGES = ("onnx", "onnxruntime", "onnxruntime-genai", "torch", "transformers")


def logits(folder: str, rows: Sequence[Sequence[int]], threads: int) -> Iterator[np.ndarray]:
    """Logits [T, V] of each row, with an empty cache."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    sizes = json.loads(Path(folder, "genai_config.json").read_text("utf-8"))["model"]["decoder"]
    cache = np.zeros((1, sizes["num_key_value_heads"], 0, sizes["head_size"]), np.float32)
    for ids in rows:
        given = {
            "input_ids": np.asarray([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
        }
        names = [entry.name for entry in session.get_inputs()]
        yield session.run(["logits"], {name: given.get(name, cache) for name in names})[0][0]


def say(job: dict[str, Any]) -> dict[str, Any]:
    """What onnxruntime-genai makes of texts and prompts."""
    begin = time.perf_counter()
    config = genai.Config(job["folder"])
    if job["threads"]:
        options = {"session_options": {"intra_op_num_threads": job["threads"]}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
    model = genai.Model(config)
    tokenizer = genai.Tokenizer(model)
    out: dict[str, Any] = {"load_seconds": time.perf_counter() - begin}
    for index, text in enumerate(job["texts"]):
        out[f"ids_{index}"] = np.asarray(tokenizer.encode(text))
    prefill, decode = [], []
    for index, ids in enumerate(job["prompts"]):
        settings = genai.GeneratorParams(model)
        # What a model was published with may punish repetition.
        settings.set_search_options(
            max_length=len(ids) + job["new_tokens"], do_sample=False, repetition_penalty=1.0, no_repeat_ngram_size=0
        )
        generator = genai.Generator(model, settings)
        begin = time.perf_counter()
        generator.append_tokens(np.asarray(ids, np.int32))
        generator.generate_next_token()
        prefill.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        decode.append(time.perf_counter() - begin)
        out[f"said_{index}"] = np.asarray(generator.get_sequence(0))[len(ids) :]
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
    for index, values in enumerate(logits(job["folder"], job["rows"], job["threads"]) if job["rows"] else ()):
        out[f"logits_{index}"] = values
    np.savez(sys.argv[2], **out)


if __name__ == "__main__":
    main()
