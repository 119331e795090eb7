"""The runtime against our decoder: logits of every layout, dense and sparse, however the prompt is cut."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch

from cpm_jax.modeling.config import RopeConfig
from cpm_jax.modeling.rotary import attention_factor, inverse_frequencies
from cpm_jax.quantization.config import QuantizationConfig
from export.gptq import export_gptq
from export.hf import hf_config
from export.torch_runtime import rope
from export.torch_runtime.config import RopeConfig as RuntimeRope
from export.torch_runtime.config import read_config
from export.torch_runtime.generate import SamplingConfig, eager_step, generate, prefill, static_step
from export.torch_runtime.linear import QuantizedLinear
from export.torch_runtime.model import load_model
from tests.export.quantized_models import rounded_model
from tests.export.small_models import LONGROPE, MUP, SPARSE, small_tokenizer
from tests.export.torch_runtime.models import PLAIN, exported, jax_logits, tokens_of


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@torch.inference_mode()
def torch_logits(model, tokens, cache_length, chunk=None):
    """Logits of all positions, read in chunks."""
    cache, ids = model.init_cache(cache_length, len(tokens)), torch.from_numpy(tokens).long()
    hidden = []
    for start in range(0, ids.shape[1], chunk or ids.shape[1]):
        part = ids[:, start : start + (chunk or ids.shape[1])]
        end = start + part.shape[1]
        hidden.append(model(part, torch.arange(start, end), cache, end))
    return model.logits(torch.cat(hidden, dim=1)).numpy()


# Layout, changes to the model, tokens of the prompt, length of the cache.
CASES = {
    "llama with biases, tied, wide heads": (
        "llama",
        {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 32},
        40,
        64,
    ),
    "qwen2": ("qwen2", {"attention_bias": True}, 40, 64),
    "granite": ("granite", MUP, 40, 64),
    "minicpm, short factors": ("minicpm", MUP | {"rope": LONGROPE, "tie_word_embeddings": True}, 40, 64),
    "internlm2": ("internlm2", {"attention_bias": True}, 40, 64),
    "mimo with an MTP layer": ("mimo", {"attention_bias": True, "num_nextn_predict_layers": 1}, 40, 64),
    "sparse, long factors": ("minicpm", MUP | {"sparse_config": SPARSE, "rope": LONGROPE}, 300, 301),
    "sparse, exact normaliser, unrotated": (
        "llama",
        {"sparse_config": dataclasses.replace(SPARSE, use_nope=True, lse_approximation=False, variant="paper")},
        300,
        400,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_our_decoders(case, tokenizer, tmp_path):
    layout, changes, length, cache_length = CASES[case]
    config, params, model = exported(tmp_path / "hf", layout, tokenizer, **changes)
    tokens = tokens_of(length, batch_size=2)
    expected = jax_logits(config, params, tokens, cache_length)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(torch_logits(model, tokens, cache_length), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_a_prompt_in_chunks_and_token_by_token(sparse, tokenizer, tmp_path):
    _, _, model = exported(tmp_path / "hf", "llama", tokenizer, sparse_config=sparse)
    tokens = tokens_of(150, batch_size=2)
    assert model.init_cache(200).sparse == (sparse and model.config.sparse)
    assert model.init_cache(SPARSE.dense_len).sparse is None
    whole = torch_logits(model, tokens, 200)
    for chunk in (37, 149):
        np.testing.assert_allclose(torch_logits(model, tokens, 200, chunk), whole, atol=1e-4, rtol=0)
    ids = torch.from_numpy(tokens).long()
    for make_step in (eager_step, static_step):
        cache = model.init_cache(200, 2)
        first = prefill(model, ids[:, :138], cache, chunk=50)
        np.testing.assert_allclose(first, whole[:, 137], atol=1e-4, rtol=0)
        with torch.inference_mode():
            step = make_step(model, cache)
            steps = [step(ids[:, at : at + 1], torch.tensor([at]))[1][:, 0] for at in range(138, 150)]
        np.testing.assert_allclose(torch.stack(steps, dim=1), whole[:, 138:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_a_step_is_one_graph_that_serves_every_position(sparse, tokenizer, tmp_path):
    _, _, model = exported(tmp_path / "hf", "llama", tokenizer, sparse_config=sparse, num_layers=1)
    tokens = torch.from_numpy(tokens_of(24)).long()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    with torch.inference_mode():
        torch.compiler.reset()
        cache, other = model.init_cache(128), model.init_cache(128)
        step = torch.compile(static_step(model, cache), fullgraph=True, backend=backend)
        expected = static_step(model, other)
        for at in range(24):
            args = tokens[:, at : at + 1], torch.tensor([at])
            torch.testing.assert_close(step(*args), expected(*args), atol=1e-4, rtol=0)
    assert len(graphs) == 1


class Attended(torch.overrides.TorchFunctionMode):
    """Notes of each attention the heads of queries and of keys, and whether cuDNN's may be taken."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.calls.append((args[0].shape[1], args[1].shape[1], torch.backends.cuda.cudnn_sdp_enabled()))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [None, SPARSE], ids=["dense", "sparse"])
def test_attention_needs_no_plan_for_a_length_and_no_memory_for_scores(sparse, dtype, tokenizer, tmp_path):
    """On GPUs cuDNN makes a plan for each length, and in float32 heads that share keys have all scores in memory."""
    exported(tmp_path / "hf", "llama", tokenizer, sparse_config=sparse, num_layers=1)
    model, prompt = load_model(tmp_path / "hf", dtype=dtype), tokens_of(80)[0].tolist()
    with Attended() as attended:
        list(generate(model, prompt, 3, SamplingConfig(temperature=0), chunk=32))
    assert attended.calls
    assert not any(cudnn for *_, cudnn in attended.calls)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    if dtype == torch.float32:
        assert all(heads == kv_heads for heads, kv_heads, _ in attended.calls)


ROPES = {
    "default": RopeConfig(rope_theta=5e5),
    "linear": RopeConfig(scaling="linear", factor=2.0),
    "dynamic": RopeConfig(scaling="dynamic", factor=2.0, original_max_position_embeddings=64),
    "yarn": RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=128),
    "yarn, own factor": RopeConfig(
        scaling="yarn",
        factor=4.0,
        original_max_position_embeddings=128,
        attention_factor=1.1,
        beta_fast=8.0,
        beta_slow=2.0,
        truncate=False,
    ),
    "llama3": RopeConfig(scaling="llama3", factor=8.0, original_max_position_embeddings=32),
    "longrope": LONGROPE,
    "longrope, own factor": dataclasses.replace(LONGROPE, attention_factor=1.3),
}


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embedding_is_our_decoders(kind, tokenizer, tmp_path):
    ours = dataclasses.replace(PLAIN, rope=ROPES[kind])
    (tmp_path / "config.json").write_text(json.dumps(hf_config(ours, tokenizer, "float32")))
    theirs = read_config(tmp_path)
    for length in (64, 65, 200):
        found = rope.inverse_frequencies(theirs.rope, theirs.head_dim, length).numpy()
        np.testing.assert_allclose(found, inverse_frequencies(ours, length), rtol=1e-12)
    assert theirs.rope.attention_factor == pytest.approx(attention_factor(ours), rel=1e-12)


def test_angles_are_exact_far_out():
    table = rope.rotary_table(RuntimeRope(), 16, 131_073, "cpu")
    angle = 131_072 * 10_000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(table[-1].numpy(), [np.cos(angle), np.sin(angle)], atol=1e-7)


@pytest.mark.parametrize(
    ("bits", "group_size", "changes"),
    [(4, 128, {}), (4, 64, {"attention_bias": True, "tie_word_embeddings": True}), (8, -1, MUP), (2, 32, {})],
    ids=["int4", "int4, biases", "int8, granite", "int2"],
)
def test_packed_weights_are_the_dequantised_ones(bits, group_size, changes, tokenizer, tmp_path):
    quantized = rounded_model(QuantizationConfig(method="rtn", bits=bits, group_size=group_size), **changes)
    export_gptq(quantized, tokenizer, tmp_path / "gptq", max_shard_bytes=60_000)
    with torch.device("meta"):  # what PyTorch makes without being told where is not where the weights are
        model = load_model(tmp_path / "gptq", dtype=torch.float32)
    layers = quantized.params["layers"]
    for index, layer in enumerate(model.layers):
        assert isinstance(layer.attention.qkv_proj, QuantizedLinear)
        for linear, names in (
            (layer.attention.qkv_proj, [("self_attn", f"{name}_proj") for name in "qkv"]),
            (layer.mlp.gate_up_proj, [("mlp", "gate_proj"), ("mlp", "up_proj")]),
            (layer.mlp.down_proj, [("mlp", "down_proj")]),
        ):
            kernels = [np.asarray(layers[part][name]["kernel"][index]) for part, name in names]
            np.testing.assert_array_equal(linear.dequantize(torch.float32).numpy(), np.concatenate(kernels, axis=1))
    if not changes or bits != 4:
        return
    tokens = tokens_of(30)

    def stored(path, leaf):
        """All but the quantised kernels is float16 in the folder."""
        kernel = path[0].key == "layers" and path[-1].key == "kernel"
        return leaf if kernel else np.asarray(leaf, np.float16).astype(np.float32)

    expected = jax_logits(quantized.config, jax.tree_util.tree_map_with_path(stored, quantized.params), tokens, 64)
    np.testing.assert_allclose(torch_logits(model, tokens, 64), expected, atol=1e-4, rtol=0)
