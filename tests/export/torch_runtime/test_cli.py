"""The command, in a process where JAX cannot be imported, and what it says when something is wrong."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import tokenizers
import torch

from export.torch_runtime import cli
from export.torch_runtime.cache import LengthError
from export.torch_runtime.config import FolderError, read_config
from export.torch_runtime.generate import SamplingConfig, Speed, generate, sample
from export.torch_runtime.model import load_model
from export.torch_runtime.text import Tokenizer
from tests.export.small_models import SPARSE, small_tokenizer
from tests.export.torch_runtime.models import exported

PACKAGE = Path(cli.__file__).parent
# Everything that the package may import beside the standard library and itself.
ALLOWED = {"torch", "safetensors", "tokenizers", "numpy", "jinja2", "triton"}
WITHOUT_JAX = """
import sys
sys.modules |= dict.fromkeys({refused!r})  # importing any of them is a ModuleNotFoundError
from export.torch_runtime.cli import main
raise SystemExit(main(sys.argv[1:]))
"""
REFUSED = ("jax", "jaxlib", "flax", "jaxtyping", "ml_dtypes", "gin", "pydantic", "cpm_jax", "kernels_pallas")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A sparse model's, with the text that it continues by the most probable tokens."""
    place = tmp_path_factory.mktemp("runtime") / "hf"
    exported(place, "minicpm", tokenizer, sparse_config=SPARSE, tie_word_embeddings=True)
    return place


def run(folder, *args):
    return cli.main([str(folder), "--prompt", "def add(a, b):", "--temperature", "0", "--device", "cpu", *args])


def test_it_generates_where_there_is_no_jax(folder, capsys):
    args = [folder, "--prompt", "def add(a, b):", "--temperature", "0", "--max-new-tokens", "70", "--device", "cpu"]
    script = WITHOUT_JAX.format(refused=REFUSED)
    command = [sys.executable, "-X", "utf8", "-c", script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, check=False)
    out, err = done.stdout.decode(), done.stderr.decode()  # line ends as they are
    assert done.returncode == 0, err
    assert run(folder, "--max-new-tokens", "70", "--prefill-chunk", "5") == 0
    here = capsys.readouterr()
    assert out == here.out
    assert len(here.out) > 10
    for said in (err, here.err):
        assert re.search(r"prompt: \d+ tokens, [\d.]+ tokens/s; new: \d+ tokens, [\d.]+ tokens/s; weights: ", said)


def test_it_imports_nothing_of_the_training_code():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                inside = name.startswith("export.torch_runtime")
                assert inside or name.split(".")[0] in ALLOWED | sys.stdlib_module_names, f"{path} imports {name}"


def test_its_own_project_file_asks_for_no_more():
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text("utf-8"))["project"]
    names = {wanted.split(">=")[0] for wanted in project["dependencies"]}
    assert names == ALLOWED - {"triton"}  # which comes with PyTorch's builds for CUDA
    assert project["scripts"] == {"cpm-torch": "export.torch_runtime.cli:main"}


def test_generation_ends_with_a_token_that_ends_a_text(folder, tokenizer):
    model, speed = load_model(folder), Speed()
    prompt = tokenizer.encode_prompt("def add")
    greedy = SamplingConfig(temperature=0)
    config = json.loads((folder / "config.json").read_text())
    assert model.config.eos_token_ids == (config["eos_token_id"],)
    model.config = dataclasses.replace(model.config, eos_token_ids=())
    tokens = list(generate(model, prompt, 20, greedy, speed=speed))
    assert len(tokens) == speed.new_tokens == 20
    assert speed.prompt_tokens == len(prompt)
    assert speed.prefill_rate > 0
    assert speed.decode_rate > 0
    last = tokens[7]
    model.config = dataclasses.replace(model.config, eos_token_ids=(last,))
    assert list(generate(model, prompt, 20, greedy)) == tokens[: tokens.index(last) + 1]


def test_the_tokenizer_is_ours(folder, tokenizer):
    theirs = Tokenizer(folder, load_model(folder).config)
    text = "def add(a, b):\n    学而时习之 🙂"
    ids = tokenizer.encode_prompt(text)
    assert theirs.encode_prompt(text) == ids
    assert "".join(theirs.stream(ids)) == text


def test_bytes_that_are_no_character_do_not_end_the_text(folder, tmp_path):
    """Of a tokenizer with a token for each byte, as MiniCPM's: the library decodes a run of them together."""
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "a"]
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    whole, begun, letter = list("学".encode()), "而".encode()[0], vocabulary["a"]
    tokenizer = Tokenizer(tmp_path, read_config(folder))
    assert "".join(tokenizer.stream([*whole, begun, letter, *whole])) == "学\ufffda学"
    assert "".join(tokenizer.stream([letter, *whole[:2]])) == "a\ufffd"


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)

    def shares(**settings):
        counts = sample(logits, SamplingConfig(**settings), generator).bincount(minlength=4)
        return (counts / len(logits)).tolist()

    assert shares(temperature=1.0, top_p=1.0) == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)
    assert shares(temperature=0.5, top_p=1.0) == pytest.approx([1 / 30, 4 / 30, 9 / 30, 16 / 30], abs=0.02)
    assert shares(temperature=1.0, top_p=1.0, top_k=2) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.02)
    assert shares(temperature=1.0, top_p=0.6) == pytest.approx([0, 0, 3 / 7, 4 / 7], abs=0.02)
    assert shares(temperature=0.0) == [0, 0, 0, 1]


def test_arguments_that_cannot_be_used_are_named(folder, capsys):
    for args, code, said in (
        (["--cache-length", "10"], 2, "in a cache of 10: at most 10 together"),
        (["--cache-length", "1000"], 2, "a cache of 1000 tokens: accepted are 1 to max_position_embeddings = 512"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens = 0: must be at least 1"),
        (["--top-p", "1.5"], 2, "top_p = 1.5: must be above 0 and at most 1"),
        (["--kernels", "triton"], 2, "--kernels triton with --device cpu"),
        (["--device", "nowhere"], 2, "--device nowhere: accepted are cpu, cuda"),
    ):
        assert run(folder, *args) == code
        assert said in capsys.readouterr().err
    assert run(folder / "nowhere") == 3
    assert "nowhere is no folder" in capsys.readouterr().err


def test_too_little_memory_is_named(folder, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr(cli, "load_model", full)
    assert run(folder) == 4
    assert "cpu has too little memory" in (said := capsys.readouterr().err)
    assert "20.00 GiB" in said


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert cli._device("cuda:1") == torch.device("cuda:1")
    assert chosen == [1]  # where Triton launches its kernels
    with pytest.raises(ValueError, match="--device cuda:2: accepted are cuda:0 to cuda:1"):
        cli._device("cuda:2")


def test_an_empty_prompt_is_an_error_before_anything_is_captured(folder):
    with pytest.raises(LengthError, match="a prompt of 0 tokens"):
        next(generate(load_model(folder), [], 1, cuda_graph=True))


def changed(folder, place, **entries):
    """A copy of a folder with other entries in config.json; None takes one away."""
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | entries
    (place / "config.json").unlink()
    content = {name: value for name, value in config.items() if value is not None}
    (place / "config.json").write_text(json.dumps(content))
    return place


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' .*accepted are llama, qwen2, granite, minicpm, internlm2, mimo"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': accepted is 'silu'"),
        ({"hidden_size": None}, "hidden_size is missing: accepted are whole numbers above 0"),
        ({"vocab_size": 321}, r"model.embed_tokens.weight has the shape \[320, 64\], and config.json says \[321, 64\]"),
        ({"num_hidden_layers": 3}, "has no tensor model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "has tensors that are not computed with: model.layers.1"),
        ({"tie_word_embeddings": False}, "has no tensor lm_head.weight"),
        (
            {"sparse_config": {"block_size": 20}},
            "sparse_config.block_size = 20: must be a multiple of kernel_stride = 16",
        ),
        ({"sparse_config": {"topk": "4"}}, "sparse_config.topk = '4': must be of type int"),
        ({"sparse_config": {"blocks": 4}}, "sparse_config has blocks: accepted are kernel_size"),
        ({"rope_scaling": {"rope_type": "su"}}, "rope_scaling has the type 'su': accepted are default, linear"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "of type 'longrope' lacks long_factor"),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quantization_config.quant_method = 'awq': accepted is 'gptq'",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}},
            "has no tensor .*q_proj.qweight",
        ),
        ({"dtype": "float8"}, "dtype = 'float8': accepted are float32, bfloat16 and float16"),
        ({"head_dim": 15}, "head_dim = 15: must be even"),
        ({"sparse_config": [4]}, r"sparse_config = \[4\]: accepted are an object and null"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [0.0] * 8}},
            "long_factor = 0.0: accepted are numbers above 0",
        ),
        (
            {
                "num_attention_heads": 3,
                "num_key_value_heads": 3,
                "head_dim": 20,
                "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64},
            },
            "q_proj has 64 inputs and 60 outputs: accepted are multiples of 8",
        ),
    ],
)
def test_folders_that_cannot_be_run_are_named(entries, said, folder, tmp_path):
    with pytest.raises(FolderError, match=said):
        load_model(changed(folder, tmp_path / "changed", **entries))


def test_files_that_are_missing_or_cut_short_are_named(folder, tmp_path):
    for file, said in (
        ("config.json", "has no config.json: give a folder that `export` wrote"),
        ("model.safetensors", "needs model.safetensors, or shards named in model.safetensors.index.json"),
        ("tokenizer.json", "has no tokenizer.json"),
    ):
        place = changed(folder, tmp_path / file)
        (place / file).unlink()
        with pytest.raises(FolderError, match=said):
            Tokenizer(place, load_model(place).config)
    place = changed(folder, tmp_path / "cut")
    (place / "model.safetensors").unlink()
    (place / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(FolderError, match=r"cannot be read as safetensors: .* cut short"):
        load_model(place)
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"norm": "model-00002.safetensors"}}')
    with pytest.raises(FolderError, match=r"lacks the shard model-00002.safetensors"):
        load_model(place)
