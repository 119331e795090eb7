"""The C++ runtime on folders that our exporters wrote: the judge is our JAX model, and for bad files the sanitizers."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig, RopeConfig, SparseConfig
from cpm_jax.modeling.decoder import bind
from export.gptq import export_gptq
from export.hf import DTYPES, export_hf
from export.marlin import export_marlin
from tests.export import small_models
from tests.export.cuda.native_build import BACKEND, SOURCE, build
from tests.export.quantized_models import rounded_model
from tests.export.small_models import MUP

pytestmark = pytest.mark.slow  # all need the build

HEADER = SOURCE / "include/cpm.h"
PROMPT, NEW = 40, 24  # tokens
LENGTH = PROMPT + NEW
PLAIN = dataclasses.replace(small_models.PLAIN, max_position_embeddings=128)
LONGROPE = dataclasses.replace(small_models.LONGROPE, original_max_position_embeddings=48)
YARN = RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=32)
LLAMA3 = RopeConfig(scaling="llama3", factor=8.0, original_max_position_embeddings=32)
DYNAMIC = RopeConfig(scaling="dynamic", factor=2.0, original_max_position_embeddings=48)
# Sixteen blocks, of which a query sees six.
SPARSE = SparseConfig(
    kernel_size=4, kernel_stride=2, block_size=4, window_size=8, topk=4, dense_len=16, variant="huggingface"
)
CASES = {
    "llama tied, wide heads": ("llama", "float32", {"tie_word_embeddings": True, "head_dim": 24, "rope": LLAMA3}),
    "qwen2 biases": ("qwen2", "bfloat16", {"attention_bias": True, "rope": YARN}),
    "granite biases": ("granite", "float16", {"attention_bias": True, "rope": DYNAMIC} | MUP),
    "minicpm": ("minicpm", "float32", {"rope": LONGROPE, "tie_word_embeddings": True} | MUP),
    "minicpm sparse": ("minicpm", "float32", {"rope": LONGROPE, "sparse_config": SPARSE} | MUP),
    "minicpm sparse, paper": (
        "minicpm",
        "bfloat16",
        {"sparse_config": dataclasses.replace(SPARSE, use_nope=True, lse_approximation=False, variant="paper")} | MUP,
    ),
}


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    return build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def add(a, b):\n    return a + b\n"] * 3, 300)


@functools.cache
def random_params(config: ModelConfig):
    return small_models.random_params(config)


@functools.partial(jax.jit, static_argnums=0)
def compute_logits(config: ModelConfig, params, tokens):
    model, positions = bind(config, params), jnp.arange(tokens.shape[1])[None]
    return model.logits(model(tokens, positions, jnp.ones_like(tokens)))


def jax_logits(config: ModelConfig, params, ids) -> np.ndarray:
    """Logits of our model after each id [ids, V]."""
    return np.asarray(compute_logits(config, params, jnp.asarray([ids]))[0])


def random_ids(number: int = PROMPT) -> list[int]:
    return np.random.default_rng(0).integers(0, 320, number).tolist()


def check_against_jax(runtime, folder, scratch, config: ModelConfig, params) -> np.ndarray:
    """Logits of the prompt within 1e-4 of the largest, and every generated token ours; returns the former."""
    prompt = random_ids()
    logits, result = runtime.logits(
        folder, prompt, scratch, "--capacity", LENGTH, "--max-new-tokens", NEW, "--ignore-eos"
    )
    expected = jax_logits(config, params, prompt + result.ids)
    np.testing.assert_allclose(logits, expected[:PROMPT], rtol=0, atol=1e-4 * np.abs(expected).max())
    assert len(result.ids) == NEW
    assert result.ids == expected[PROMPT - 1 : -1].argmax(axis=-1).tolist()
    return logits


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """Gives the folder of one of CASES, its model, and the parameters as they are stored."""

    @functools.cache
    def export(name):
        layout, dtype, changes = CASES[name]
        config = dataclasses.replace(PLAIN, **changes)
        params = random_params(config)
        folder = tmp_path_factory.mktemp("exported") / "hf"
        export_hf(params, config, tokenizer, folder, layout=layout, dtype=dtype, max_shard_bytes=100_000)
        stored = jax.tree.map(lambda leaf: np.asarray(leaf).astype(DTYPES[dtype]).astype(np.float32), params)
        return folder, config, stored

    return export


def test_the_header_is_c():
    command = ["gcc", "-x", "c", "-std=c99", "-pedantic", "-Wall", "-Werror", "-fsyntax-only", str(HEADER)]
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_those_of_jax(name, runtime, exported, tmp_path):
    folder, config, params = exported(name)
    logits = check_against_jax(runtime, folder, tmp_path, config, params)
    chunked, result = runtime.logits(folder, random_ids(), tmp_path, "--capacity", LENGTH, "--chunk", 7)
    np.testing.assert_array_equal(chunked, logits)
    assert ("sparse attention" in result.log) == (config.sparse_config is not None)


def test_sparse_attention_is_not_dense(runtime, exported, tmp_path):
    """What the cases above compare is a choice of blocks: the same weights, attending densely, say something else."""
    folder = shutil.copytree(exported("minicpm sparse")[0], tmp_path / "dense")
    content = json.loads((folder / "config.json").read_text())
    del content["sparse_config"]
    (folder / "config.json").write_text(json.dumps(content))
    dense, _ = runtime.logits(folder, random_ids(), tmp_path, "--capacity", LENGTH)
    sparse, _ = runtime.logits(exported("minicpm sparse")[0], random_ids(), tmp_path, "--capacity", LENGTH)
    difference = np.abs(sparse - dense).max(axis=1) / np.abs(dense).max()
    assert difference[: 6 * SPARSE.block_size].max() < 1e-5  # these have no more than the six blocks that they see
    assert difference[-1] > 0.01


@pytest.mark.parametrize("name", ["qwen2 biases", "minicpm sparse", "minicpm sparse, paper"])
def test_a_tree_is_verified_as_if_token_by_token(name, runtime, exported):
    """Random trees around the greedy text: tokens that are accepted, logits, and what is kept in the cache."""
    folder, *_ = exported(name)
    done = runtime.execute("verify_trees", folder, 40, BACKEND)
    assert done.returncode == 0, done.stderr
    accepted, difference = re.fullmatch(r"accepted (\d+), largest difference (.*)\n", done.stdout).groups()
    assert int(accepted) > 40
    assert float(difference) < 1e-5


@pytest.mark.parametrize("name", ["llama tied, wide heads", "minicpm sparse"])
def test_drafts_do_not_change_the_text(name, runtime, exported):
    folder, *_ = exported(name)
    prompt = ",".join(map(str, random_ids(12) * 3))
    arguments = ["--ids", prompt, "--capacity", LENGTH, "--max-new-tokens", NEW, "--ignore-eos"]
    plain, drafted = runtime.run(folder, *arguments), runtime.run(folder, *arguments, "--draft", 24)
    assert plain.code == drafted.code == 0, drafted.log
    assert len(plain.ids) == NEW
    assert drafted.ids == plain.ids
    assert re.search(r"drafts: \d+ tokens accepted in \d+ passes", drafted.log)


@pytest.fixture(scope="module")
def quantised():
    return rounded_model(num_heads=4, head_dim=32, num_kv_heads=1)


@pytest.mark.parametrize("write", [export_gptq, export_marlin])
def test_packed_weights_are_the_fake_quantised_ones(write, quantised, runtime, tokenizer, tmp_path):
    model = quantised
    write(model, tokenizer, tmp_path / "packed")
    halves = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float16).astype(np.float32), model.params)
    params = jax.tree_util.tree_map_with_path(
        lambda path, whole, half: np.asarray(whole) if "_proj" in str(path) else half, model.params, halves
    )
    check_against_jax(runtime, tmp_path / "packed", tmp_path, model.config, params)


@pytest.mark.skipif(BACKEND != "cpu", reason="a GPU has all weights in its pool")
def test_the_memory_plan_is_stated(runtime, tokenizer, tmp_path):
    export_hf(random_params(PLAIN), PLAIN, tokenizer, tmp_path / "hf", layout="llama")
    size = sum(leaf.size for leaf in jax.tree.leaves(random_params(PLAIN)))
    norms = (2 * PLAIN.num_layers + 1) * PLAIN.d_model
    result = runtime.run(tmp_path / "hf", "--capacity", 1000)
    cache = 2 * PLAIN.num_layers * 1000 * 2 * 16 * 4 / 1e6
    assert f"weights mapped {4 * (size - norms) / 1e6:.2f} MB; pool " in result.log
    assert f" + KV cache {cache:.2f}, for 1000 tokens, dense attention" in result.log
    assert "for 128 tokens" in runtime.run(tmp_path / "hf").log  # max_position_embeddings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ids", "1,2,3", "--capacity", 2], "3 more tokens: the cache has a capacity of 2 and holds 0"),
        (["--ids", "1,320"], "token 320: accepted are 0 to 319"),
        (["--ids", "1", "--backend", "tpu"], "backend = tpu: accepted "),
        (["--ids", "1,x"], "--ids = x: accepted are whole numbers"),
        (["--capacity", 2**30], "capacity = 1073741824: accepted are 1 to 16777216 tokens"),
        (["--chunk"], "--chunk needs a value"),
    ],
)
def test_what_a_caller_may_not_ask(arguments, message, runtime, plain_folder):
    result = runtime.run(plain_folder, *arguments)
    assert result.code in (1, 2)
    assert message in result.log


@pytest.fixture(scope="module")
def plain_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "hf"
    export_hf(random_params(PLAIN), PLAIN, tokenizer, folder, layout="llama")
    return folder


def _config(**changes):
    return lambda config, tensors: (config | changes, tensors)


def _tensors(change):
    def damage(config, tensors):
        tensors = dict(tensors)
        change(tensors)
        return config, tensors

    return damage


NORM = "model.layers.1.input_layernorm.weight"
DAMAGES = {
    "config.json: hidden_size = 0: accepted is a whole number from 1": _config(hidden_size=0),
    'config.json: hidden_act = "gelu": accepted is silu': _config(hidden_act="gelu"),
    "config.json: num_key_value_heads = 3: accepted is a divisor of": _config(num_key_value_heads=3),
    'config.json: model_type = "mamba": accepted is llama': _config(model_type="mamba"),
    "config.json lacks vocab_size": _config(vocab_size=None),
    "num_hidden_layers = 2000000000: the weights have only": _config(num_hidden_layers=2_000_000_000),
    "model.embed_tokens.weight has the shape [320, 64]: config.json asks for [320, 128]": _config(hidden_size=128),
    "rope_scaling: short_factor has 3 values: accepted are head_dim/2 = 8": _config(
        rope_scaling={"rope_type": "longrope", "short_factor": [1, 1, 1], "long_factor": [1, 1, 1]}
    ),
    "sparse_config: block_size = 5: accepted is a multiple of kernel_stride = 2": _config(
        sparse_config={"kernel_stride": 2, "kernel_size": 4, "block_size": 5}
    ),
    "quantization_config: bits = 8: accepted is a whole number from 4 to 4": _config(
        quantization_config={"quant_method": "gptq", "bits": 8, "group_size": 128}
    ),
    "the weights lack lm_head.weight": _tensors(lambda tensors: tensors.pop("lm_head.weight")),
    f"{NORM} has the type I32: accepted are BF16, F16, F32": _tensors(
        lambda tensors: tensors.update({NORM: np.zeros(64, np.int32)})
    ),
    "the weights have model.norm.bias, for which the model of config.json has no place": _tensors(
        lambda tensors: tensors.update({"model.norm.bias": np.zeros(64, np.float32)})
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_folder_that_does_not_fit_is_an_error_with_the_field(message, runtime, plain_folder, tmp_path):
    config = json.loads((plain_folder / "config.json").read_text())
    config, tensors = DAMAGES[message](config, safetensors.numpy.load_file(plain_folder / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    result = runtime.run(tmp_path, "--ids", "1")
    assert result.code == 1
    assert message in result.log


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file[:-1], "model.safetensors: header: model.norm.weight: data_offsets = "),
        (lambda file: file + b"x", "bytes of data: its tensors take"),
        (lambda file: file[:5], "model.safetensors has 5 bytes: no safetensors file is so short"),
        (
            lambda file: b"\xff" * 8 + file[8:],
            "model.safetensors begins with 18446744073709551615 as the length of its header",
        ),
        (
            lambda file: file.replace(b'"shape":[320,64]', b'"shape":[640,32]', 1),
            "lm_head.weight has the shape [640, 32]: config.json asks for [320, 64]",
        ),
        (lambda file: file.replace(b'"F32"', b'"F16"', 1), "lm_head.weight: data_offsets = "),
        (lambda file: file.replace(b'"F32"', b'"F33"', 1), 'dtype = "F33": accepted is F32, F16'),
    ],
)
def test_a_damaged_file_is_an_error(damage, message, runtime, plain_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((plain_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(damage((plain_folder / "model.safetensors").read_bytes()))
    result = runtime.run(tmp_path, "--ids", "1")
    assert result.code == 1
    assert message in result.log


def test_no_damage_is_a_crash(runtime, tokenizer, tmp_path):
    config = dataclasses.replace(
        PLAIN, d_model=16, d_ff=16, num_layers=1, sparse_config=SPARSE, rope=RopeConfig(scaling="yarn", factor=2.0,
        original_max_position_embeddings=64), tie_word_embeddings=True,
    )  # fmt: skip
    export_hf(random_params(config), config, tokenizer, tmp_path / "hf", layout="llama")
    (tmp_path / "scratch").mkdir()
    done = runtime.execute("fuzz_files", tmp_path / "hf", tmp_path / "scratch", 2500)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [int(number) for number in re.findall(r"\d+", done.stdout)]
    assert len(counts) == 4  # files and folders, accepted and refused
    assert min(counts) > 20
