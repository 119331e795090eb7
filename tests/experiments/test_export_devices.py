"""The verb `export` for devices: converted, run by their runtimes with our logits and text, and verified again."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cpm_jax.common import exit_codes
from cpm_jax.data.tokenizer import Tokenizer
from experiments import run
from export.devices.runtimes import RUNTIMES, Job
from export.manifest import read_manifest
from tests.checkpoints.published_folders import CONFIGS, V, write
from tests.experiments.test_convert import TEXT
from tests.export.devices.needs import skip_without

# Both have what a converter does not know: LongRoPE and sparse attention; a linear scaling, and one key/value head.
SOURCES = {
    "minicpm": CONFIGS["minicpm"],
    "llama": CONFIGS["llama with biases"]
    | {
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "num_key_value_heads": 1,
    },
}


def export(workdir: Path, **macros: object) -> int:
    return run.main(["export", f"--workdir={workdir}", *(f"--gin.{name}={value}" for name, value in macros.items())])


CASES = (
    ("onnx", "minicpm", "float32"),
    ("onnx", "llama", "int4"),
    pytest.param(("openvino", "minicpm", "float32"), marks=pytest.mark.slow),
    pytest.param(("executorch", "minicpm", "float32"), marks=pytest.mark.slow),
    pytest.param(("executorch", "llama", "int4"), marks=pytest.mark.slow),
)
PACKAGES = {"onnx": {"transformers", "onnxruntime-genai"}, "openvino": {"transformers", "openvino"}}


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def exported(request, tmp_path_factory):
    """The folder of an export, its source, its type, and what was said on the way."""
    runtime, name, dtype = request.param
    skip_without(runtime)
    source, out = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp("out")
    write(source, SOURCES[name], "bfloat16")
    Tokenizer.train(TEXT, V).save(source)
    assert export(out, SOURCE=source, FORMAT=runtime, TYPE="" if dtype == "float32" else dtype) == exit_codes.OK
    assert not list(out.rglob(".*"))
    return out / f"{runtime}-{dtype}", source, dtype


RUNNER = """
import json, sys
from executorch.extension.llm.custom_ops import custom_ops
from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
folder, asked = sys.argv[1], json.loads(sys.argv[2])
said = []
for prompt, count in asked:
    runner, pieces = TextLLMRunner(f"{folder}/model.pte", f"{folder}/tokenizer.json"), []
    runner.generate(prompt, GenerationConfig(max_new_tokens=count, temperature=0.0, echo=False), pieces.append)
    said.append("".join(pieces))
print()
print(json.dumps(said))
"""


def check_executorch_runner(folder: Path) -> None:
    """Its own runner continues texts as recorded, as far as tokens are whole characters: it passes on no others."""
    tokenizer, asked, expected = Tokenizer.load(folder), [], []
    for text in read_manifest(folder).texts:
        prompt, spelt = tokenizer.decode(list(text.token_ids)), [tokenizer.decode([token]) for token in text.greedy]
        count = next((i for i, piece in enumerate(spelt) if not piece.isascii() or not piece), len(spelt))
        if count and tokenizer.encode(prompt) == list(text.token_ids):
            asked.append((prompt, count))
            expected.append("".join(spelt[:count]))
    assert asked
    command = [str(Path(sys.prefix, "executorch/bin/python")), "-c", RUNNER, str(folder), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_the_runtime_says_what_our_decoder_does(exported):
    folder, _, dtype = exported
    manifest = read_manifest(folder)
    (check,) = manifest.checks
    figures = check.figures
    assert figures["other_ids"] == 0
    if dtype == "float32":
        assert figures["max_error"] <= 1e-5 * figures["largest_logit"]
        assert figures["greedy_tokens"] == f"{sum(len(t.greedy) for t in manifest.texts)} of 48"
    else:
        assert 1e-3 < figures["kl_divergence"] < 1
        assert sum(entry.bytes for name, entry in manifest.files.items() if "model." in name) < 4 * 200_000
    assert manifest.tools.keys() >= PACKAGES.get(folder.name.split("-")[0], {"executorch", "torchao"})
    if folder.name.startswith("executorch"):
        check_executorch_runner(folder)
    assert manifest.source["config_sha256"]
    assert not [name for name in manifest.files if "safetensors" in name or name.startswith("source")]


def test_what_is_left_out_is_said(exported):
    folder, source, _ = exported
    said = " ".join(read_manifest(folder).left_out)
    assert ("docs/torch_runtime.md" in said) == ("the context ends at 64 of 128" in said) == ("minicpm" in source.name)


def test_peak_memory_is_the_runtimes_own(exported):
    """Not that of the process which starts it."""
    folder, *_ = exported
    held = np.ones(3 << 26)  # 1.6 GB
    said = RUNTIMES[folder.name.split("-")[0]].ask(Job(str(folder), prompts=[[1, 2, 3]], new_tokens=2))
    assert 1 << 25 < said["peak_bytes"] < held.nbytes


def test_verify(exported, capsys):
    """Runs it again; a change that its manifest hides is found by what the runtime says."""
    folder, *_ = exported
    assert export(folder.parent / "verified", VERIFY=folder) == exit_codes.OK
    title = RUNTIMES[folder.name.split("-")[0]].title
    assert f"3 texts in {title}: as recorded, logits within" in capsys.readouterr().out
    content = json.loads((folder / "manifest.json").read_text())
    changed = json.loads(json.dumps(content))
    changed["texts"][0]["top_logits"][0] += 0.5 * abs(changed["texts"][0]["top_logits"][0]) + 0.1
    (folder / "manifest.json").write_text(json.dumps(changed))
    assert export(folder.parent / "verified", VERIFY=folder) == exit_codes.BAD_INPUT
    assert "differ by" in capsys.readouterr().err
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("macros", "words"),
    [
        ({"FORMAT": "onnx", "TYPE": "float16"}, "with format 'onnx' accepted are float32, int8, int4"),
        ({"FORMAT": "openvino", "TYPE": "Q8_0"}, "with format 'openvino' accepted are float32, float16, int8, int4"),
    ],
)
def test_refused(macros, words, tmp_path, capsys):
    assert export(tmp_path, SOURCE="/nowhere", **macros) == exit_codes.BAD_CONFIG
    assert words in capsys.readouterr().err
