"""What a runtime for devices says of a model: run by an interpreter that has that runtime, and nothing of ours.

`python benchmarks/device_worker.py JOB OUT`: JOB is JSON with `runtime`, `folder`, `prompts` (token ids), `texts`,
`new_tokens` and `threads`; OUT gets JSON with the continuations, the token ids of the texts, seconds to load, tokens per
second of decoding, and the most memory that the process held.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


def onnxruntime_genai(job: dict[str, Any]) -> dict[str, Any]:
    """ONNX Runtime GenAI, from a folder that its builder wrote."""
    import onnxruntime_genai as og

    begin = time.perf_counter()
    model = og.Model(job["folder"])
    tokenizer = og.Tokenizer(model)
    loaded = time.perf_counter() - begin
    greedy, decoded, seconds = [], 0, 0.0
    for ids in job["prompts"]:
        params = og.GeneratorParams(model)
        total = len(ids) + job["new_tokens"]
        params.set_search_options(max_length=total, min_length=total, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens([ids])
        new: list[int] = []
        while len(new) < job["new_tokens"]:
            if len(new) == 1:
                begin = time.perf_counter()
            generator.generate_next_token()
            new.append(int(generator.get_next_tokens()[0]))
        seconds, decoded = seconds + time.perf_counter() - begin, decoded + len(new) - 1
        greedy.append(new)
    texts = [[int(token) for token in tokenizer.encode(text)] for text in job["texts"]]
    return {"load_seconds": loaded, "tokens_per_second": decoded / seconds, "greedy": greedy, "text_ids": texts}


def openvino_genai(job: dict[str, Any]) -> dict[str, Any]:
    """OpenVINO GenAI, from a folder that optimum-intel wrote."""
    import numpy as np
    import openvino
    import openvino_genai as ov

    begin = time.perf_counter()
    # Its CPU plugin would round to what the processor multiplies fastest.
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "INFERENCE_NUM_THREADS": job["threads"]}
    pipeline = ov.LLMPipeline(job["folder"], "CPU", **options)
    loaded = time.perf_counter() - begin
    config = ov.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = job["new_tokens"]
    config.ignore_eos, config.do_sample = True, False
    greedy, milliseconds = [], []
    for ids in job["prompts"]:
        array = np.asarray([ids], np.int64)
        inputs = ov.TokenizedInputs(openvino.Tensor(array), openvino.Tensor(np.ones_like(array)))
        result = pipeline.generate(inputs, config)
        greedy.append([int(token) for token in result.tokens[0]])
        milliseconds.append(result.perf_metrics.get_tpot().mean)
    tokenizer = pipeline.get_tokenizer()
    texts = [tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist() for text in job["texts"]]
    speed = 1000 * len(milliseconds) / sum(milliseconds)
    return {"load_seconds": loaded, "tokens_per_second": speed, "greedy": greedy, "text_ids": texts}


RUNTIMES = {"onnxruntime-genai": onnxruntime_genai, "openvino-genai": openvino_genai}


def main() -> None:
    """Runs one job."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    os.environ["OMP_NUM_THREADS"] = str(job["threads"])
    found = RUNTIMES[job["runtime"]](job)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(sys.argv[2]).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
