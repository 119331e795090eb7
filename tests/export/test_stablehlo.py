"""Programs of StableHLO against the decoder's forward pass, and run where our code cannot be imported."""

import dataclasses
import json
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from export.folders import ExportError
from export.hf_check import greedy, logits_of
from export.stablehlo import (
    PLATFORMS,
    PROGRAMS,
    Programs,
    cache_limit,
    check_read_back,
    compare_programs,
    export_stablehlo,
)
from tests.export.small_models import LONGROPE, MUP, PLAIN, random_params

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Tree:\n    pass  # 树\n"
CASES = {
    "biases, unrolled": {"attention_bias": True, "scan_layers": False},
    "minicpm4": {
        **MUP,
        "rope": dataclasses.replace(LONGROPE, original_max_position_embeddings=1100),
        "num_nextn_predict_layers": 1,
        "sparse_config": SparseConfig(topk=8, dense_len=100),
    },
    "tied, a short context": {"tie_word_embeddings": True, "max_position_embeddings": 300},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT, "import os\nfor x in range(10): print(x)\n"] * 3, 300)


@pytest.fixture(scope="module", params=CASES)
def exported(request, tokenizer, tmp_path_factory):
    """Model, parameters and folder of each case."""
    config = dataclasses.replace(PLAIN, **{"max_position_embeddings": 2048} | CASES[request.param])
    params = random_params(config)
    folder = tmp_path_factory.mktemp("export") / "stablehlo"
    return config, params, folder, export_stablehlo(params, config, tokenizer, folder)


def test_they_compute_what_the_decoder_does(exported, tokenizer):
    config, params, folder, result = exported
    ids = tokenizer.encode(TEXT)
    programs = Programs(folder)
    expected = logits_of(dataclasses.replace(config, sparse_config=None), params, ids)
    for prefill in (len(ids), len(ids) - 3, 1):
        np.testing.assert_allclose(programs.logits(ids, prefill), expected, atol=1e-4 * np.abs(expected).max())
    assert check_read_back(folder, params, "float32") == result.parameters
    figures = compare_programs(folder, [ids, ids[:1]]).figures
    assert figures["positions"] == len(ids) + 1


def test_batch_prompt_and_cache_have_any_length(exported, tokenizer):
    config, params, folder, _ = exported
    program = jax.export.deserialize(bytearray((folder / PROGRAMS["prefill"]).read_bytes()))
    assert program.platforms == PLATFORMS
    block = min(512, cache_limit(config))
    assert cache_limit(config) == (
        300 if config.max_position_embeddings == 300 else 1024 if config.rope.is_longrope else 2048
    )
    rng = np.random.default_rng(0)
    for rows, length, blocks in ((1, 2, 1), (3, 7, cache_limit(config) // block)):
        tokens = rng.integers(0, 300, (rows, length)).astype(np.int32)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        cache = jnp.zeros((2, rows, 2, blocks * block, 16))
        logits, *_ = program.call(dict(Programs(folder).params), tokens, positions, cache, cache)
        dense = dataclasses.replace(config, sparse_config=None)
        for row in range(rows):
            expected = logits_of(dense, params, tokens[row].tolist())
            np.testing.assert_allclose(logits[row], expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(ValueError, match="shape"):  # one slot too few for a block
        program.call(dict(Programs(folder).params), tokens, positions, cache[:, :, :, 1:], cache[:, :, :, 1:])


BLOCKED = """
import runpy, sys
for name in ("cpm_jax", "export", "flax.nnx"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_folder_runs_without_our_code(exported, tokenizer):
    config, params, folder, _ = exported
    about = json.loads((folder / "model.json").read_text())
    about["eos_token_ids"] = []
    (folder / "model.json").write_text(json.dumps(about))
    prompt = "class Tree:"
    said = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(folder / "generate.py"), prompt, "--max_tokens", "6"],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    dense = dataclasses.replace(config, sparse_config=None)
    expected = greedy(dense, params, tokenizer.encode_prompt(prompt), 6)
    assert said.stdout.startswith(prompt + tokenizer.decode(expected))
    assert "tokens/s" in said.stdout


def test_what_is_left_out_is_said(exported):
    config, _, _, result = exported
    said = " ".join(result.notes)
    assert ("MTP" in said) == ("InfLLM v2" in said) == bool(config.num_nextn_predict_layers)
    assert ("at most 1,024 slots of the context's 2,048" in said) == config.rope.is_longrope


def test_too_long_a_prompt_is_refused(exported, monkeypatch, capsys):
    config, _, folder, _ = exported
    monkeypatch.setattr(sys, "argv", ["generate.py", "class", "--max_tokens", "5000"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(folder / "generate.py"), run_name="__main__")
    assert f"at most {cache_limit(config)} fit" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small(tokenizer):
    config = ModelConfig(
        vocab_size=320, num_layers=1, d_model=32, num_heads=2, num_kv_heads=1, d_ff=48, max_position_embeddings=512
    )
    return config, random_params(config)


def test_bfloat16_is_as_near_to_the_truth_as_our_own(small, tokenizer, tmp_path):
    config, params = small
    export_stablehlo(params, config, tokenizer, tmp_path / "out", dtype="bfloat16")
    assert 0 < compare_programs(tmp_path / "out", [tokenizer.encode(TEXT)]).figures["max_error"] < 0.1
    check_read_back(tmp_path / "out", params, "bfloat16")


def test_what_is_damaged_is_named(small, tokenizer, tmp_path):
    config, params = small
    folder = tmp_path / "out"
    export_stablehlo(params, config, tokenizer, folder)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    with pytest.raises(ExportError, match="is not what was written"):
        check_read_back(folder, other, "float32")
    with pytest.raises(ConfigError, match="dtype = 'float16': accepted are float32, bfloat16"):
        export_stablehlo(params, config, tokenizer, folder, dtype="float16")
    program = folder / PROGRAMS["decode"]
    whole = program.read_bytes()
    program.write_bytes(whole[:100])
    with pytest.raises(ExportError, match=r"decode\.stablehlo cannot be read"):
        Programs(folder)
    program.write_bytes(whole)
    (folder / "params.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ExportError, match="cannot be read"):
        Programs(folder)
    (folder / "params.safetensors").unlink()
    with pytest.raises(ExportError, match="cannot be read"):
        Programs(folder)
