"""Models written as llama.cpp writes them: tensors as they were before, and as transformers reads them."""

import dataclasses

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from cpm_jax.checkpoints.gguf import GgufSource
from cpm_jax.checkpoints.gguf_file import GgufError
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import open_source
from cpm_jax.modeling.decoder import bind

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 16, 3
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}
VALUES = {
    "vocab_size": 96,
    "context_length": 128,
    "embedding_length": 64,
    "block_count": LAYERS,
    "feed_forward_length": 96,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50_000.0,
}


def hf_model(kind: str, tied: bool):
    """A small random model of transformers; MiniCPM's class is not in it, but has the tensors of Llama."""
    config_class = transformers.Qwen2Config if kind == "qwen2" else transformers.LlamaConfig
    model_class = transformers.Qwen2ForCausalLM if kind == "qwen2" else transformers.LlamaForCausalLM
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, rope_theta=50_000.0, tie_word_embeddings=tied))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf_tensors(model, kind: str) -> dict[str, np.ndarray]:
    tensors = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        value = value.numpy()
        if kind != "qwen2" and ".q_proj." in name:
            value = permute(value, HEADS)
        if kind != "qwen2" and ".k_proj." in name:
            value = permute(value, KV_HEADS)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        tensors[name] = np.ascontiguousarray(value)
    return tensors


def write(path, kind: str, tensors, values=VALUES, **more):
    writer = gguf.GGUFWriter(path, kind)
    for key, value in (values | more).items():
        key = key if key.startswith(("split.", "tokenizer.")) else f"{kind}.{key}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_float32(key, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MUP = {"embedding_scale": 12.0, "residual_scale": 1.4 / LAYERS**0.5, "logit_scale": 64 / 16}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "minicpm"])
def test_tensors_are_those_that_were_converted(tmp_path, kind, tied):
    model = hf_model(kind, tied)
    more = MUP if kind == "minicpm" else {}
    source = GgufSource(write(tmp_path / "model.gguf", kind, gguf_tensors(model, kind), **more))
    expected = {name: value.numpy() for name, value in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert set(source.names()) == set(expected)
    for name, value in expected.items():
        assert source.shape(name) == value.shape
        np.testing.assert_array_equal(source.read(name), value)
        part = (slice(3, 21), slice(8, 40))[: value.ndim]
        np.testing.assert_array_equal(source.read(name, part), value[part])
    for key, value in SIZES.items():
        assert source.config[key] == value
    assert source.config["tie_word_embeddings"] == tied
    assert source.config["attention_bias"] == (kind == "qwen2")
    assert source.config["rope_theta"] == 50_000.0
    assert source.config["rope_scaling"] is None


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_tensors_are_those_that_transformers_reads(tmp_path, kind):
    path = write(tmp_path / "model.gguf", kind, gguf_tensors(hf_model(kind, False), kind))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    source = GgufSource(path)
    read = theirs.state_dict()
    assert set(source.names()) == set(read)
    for name in source.names():
        np.testing.assert_array_equal(source.read(name), read[name].numpy())
    # The tensors say what the class is; what it computes with stands in its config.
    assert source.config["architectures"] == [type(theirs).__name__]
    assert source.config["model_type"] == theirs.config.model_type
    assert source.config["rope_theta"] == theirs.config.rope_parameters["rope_theta"]


def logits(config, params, tokens):
    decoder = bind(dataclasses.replace(config, dtype="float32"), params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(decoder.logits(decoder(tokens, positions, jnp.ones_like(tokens))))


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        ("llama", {}),
        ("qwen2", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        (
            "llama",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
        ),
    ],
    ids=["llama", "qwen2 linear", "llama yarn"],
)
def test_the_imported_model_computes_what_transformers_does(tmp_path, kind, scaling):
    theirs = hf_model(kind, tied=False)
    if scaling:
        entries = {name.removeprefix("rope.scaling."): value for name, value in scaling.items()}
        entries["rope_type"] = entries.pop("type")
        if "original_context_length" in entries:
            entries["original_max_position_embeddings"] = entries.pop("original_context_length")
        settings = theirs.config.to_dict() | {"rope_parameters": {"rope_theta": 50_000.0, **entries}}
        rescaled = type(theirs)(type(theirs.config).from_dict(settings))
        rescaled.load_state_dict(theirs.state_dict())
        theirs = rescaled
    source = open_source(write(tmp_path / "model.gguf", kind, gguf_tensors(theirs, kind), **scaling))
    tokens = np.random.default_rng(0).integers(0, 96, (2, 100))
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(tokens)).logits.numpy()
    config, params = import_params(source)
    difference = np.abs(logits(config, params, jnp.asarray(tokens)) - expected).max()
    assert difference <= 1e-4 * max(1.0, np.abs(expected).max())


def test_an_imported_minicpm_computes_what_was_written(tmp_path):
    """The multipliers and LongRoPE factors as our own config has them, from the file alone."""
    theirs = hf_model("minicpm", tied=True)
    short = np.linspace(1, 2, HEAD_DIM // 2, dtype=np.float32)
    factors = {"rope_factors_short.weight": short, "rope_factors_long.weight": short * 3}
    tensors = gguf_tensors(theirs, "minicpm") | factors
    more = MUP | {"rope.scaling.original_context_length": 64}
    config, params = import_params(open_source(write(tmp_path / "model.gguf", "minicpm", tensors, **more)))
    assert (config.scale_emb, config.scale_depth, config.dim_model_base) == (12.0, 1.4, 16)
    assert config.rope.short_factor == tuple(short.tolist())
    assert config.rope.long_factor == tuple((short * 3).tolist())
    assert config.rope.original_max_position_embeddings == 64
    kernel = np.asarray(params["layers"]["self_attn"]["q_proj"]["kernel"])
    expected = [layer.self_attn.q_proj.weight.detach().numpy().T for layer in theirs.model.layers]
    np.testing.assert_array_equal(kernel, np.stack(expected))


def test_the_multipliers_of_minicpm(tmp_path):
    tensors = gguf_tensors(hf_model("minicpm", True), "minicpm")
    config = GgufSource(write(tmp_path / "a.gguf", "minicpm", tensors, **MUP)).config
    assert (config["scale_emb"], config["scale_depth"], config["dim_model_base"]) == (12.0, 1.4, 16)
    with pytest.raises(
        GgufError, match=r"minicpm\.logit_scale = 3\.7: expected minicpm\.embedding_length = 64 divided"
    ):
        GgufSource(write(tmp_path / "b.gguf", "minicpm", tensors, **(MUP | {"logit_scale": 3.7})))
    with pytest.raises(GgufError, match=r"has no metadata minicpm\.residual_scale"):
        GgufSource(write(tmp_path / "c.gguf", "minicpm", tensors, **(MUP | {"residual_scale": None})))


def rope_scaling(tmp_path, kind="llama", tensors=None, **values):
    model = gguf_tensors(hf_model(kind, True), kind)
    more = MUP if kind == "minicpm" else {}
    return GgufSource(write(tmp_path / "model.gguf", kind, model | (tensors or {}), **more, **values)).config[
        "rope_scaling"
    ]


def test_linear_and_yarn_scaling(tmp_path):
    assert rope_scaling(tmp_path, **{"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}) == {
        "rope_type": "linear",
        "factor": 2.5,
    }
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_beta_fast": 16.0,
    }
    assert rope_scaling(tmp_path, kind="qwen2", **yarn) == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 1.0,
    }
    with pytest.raises(
        GgufError, match=r"yarn_attn_factor = 1\.25: expected 1\.0, as llama\.cpp and transformers read"
    ):
        rope_scaling(tmp_path, **yarn, **{"rope.scaling.yarn_attn_factor": 1.25})
    with pytest.raises(GgufError, match=r"rope\.scaling\.type = ntk: expected one of none, linear, yarn, longrope"):
        rope_scaling(tmp_path, **{"rope.scaling.type": "ntk"})


def test_factors_of_the_frequencies(tmp_path):
    short = np.linspace(1, 2, HEAD_DIM // 2, dtype=np.float32)
    factors = {"rope_factors_short.weight": short, "rope_factors_long.weight": short * 3}
    assert rope_scaling(tmp_path, "minicpm", factors, **{"rope.scaling.original_context_length": 64}) == {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": (short * 3).tolist(),
        "original_max_position_embeddings": 64,
        "attention_factor": 1.0,
    }
    llama3 = rope_scaling(tmp_path, "llama", {"rope_freqs.weight": short})
    assert llama3["short_factor"] == llama3["long_factor"] == short.tolist()
    assert llama3["attention_factor"] == 1.0
    with pytest.raises(GgufError, match="has only one of rope_factors_long"):
        rope_scaling(tmp_path, "minicpm", {"rope_factors_short.weight": short})
    with pytest.raises(
        GgufError, match=r"rope_freqs\.weight has shape \(3,\): by the metadata of the file expected \(8,\)"
    ):
        rope_scaling(tmp_path, "llama", {"rope_freqs.weight": short[:3]})


@pytest.fixture(scope="module")
def tensors():
    return gguf_tensors(hf_model("llama", True), "llama")


@pytest.mark.parametrize("kind", ["gemma3", "qwen2moe", "phi3"])
def test_other_architectures(tmp_path, tensors, kind):
    with pytest.raises(GgufError, match=rf"general\.architecture is '{kind}'; known are llama, minicpm, qwen2"):
        GgufSource(write(tmp_path / "model.gguf", kind, tensors))


def test_missing_extra_and_misshapen_tensors(tmp_path, tensors):
    path = tmp_path / "model.gguf"
    without = {name: value for name, value in tensors.items() if "ffn_up" not in name}
    with pytest.raises(
        GgufError, match=r"lacks blk\.0\.ffn_up\.weight, blk\.1\.ffn_up\.weight, blk\.2\.ffn_up\.weight: llama"
    ):
        GgufSource(write(path, "llama", without))
    with pytest.raises(GgufError, match=r"no place for: blk\.0\.attn_sinks\.weight"):
        GgufSource(write(path, "llama", tensors | {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)}))
    with pytest.raises(GgufError, match=r"no place for: blk\.2\.attn_q\.weight, .* and 4 more"):
        GgufSource(write(path, "llama", tensors, block_count=2))
    transposed = np.ascontiguousarray(tensors["blk.1.attn_k.weight"].T)
    with pytest.raises(GgufError, match=r"blk\.1\.attn_k\.weight has shape \(64, 32\): .* expected \(32, 64\)"):
        GgufSource(write(path, "llama", tensors | {"blk.1.attn_k.weight": transposed}))
    with pytest.raises(GgufError, match=r"block_count = 4000000000 and has only \d+ tensors"):
        GgufSource(write(path, "llama", tensors, block_count=4_000_000_000))
    with pytest.raises(GgufError, match=r"token_embd\.weight has shape \(96, 64\): .* expected \(97, 64\)"):
        GgufSource(write(path, "llama", tensors, vocab_size=97))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"embedding_length": None}, r"has no metadata llama\.embedding_length: expected a positive integer"),
        ({"attention.head_count": "four"}, r"attention\.head_count = four: expected a positive integer"),
        (
            {"feed_forward_length": [96, 96, 48]},
            r"feed_forward_length = \[96, 96, 48\]: expected .* equal in all layers",
        ),
        ({"expert_count": 8}, r"expert_count = 8: expected 0, as mixtures of experts"),
        ({"rope.dimension_count": 8}, r"rope\.dimension_count = 8: expected 16"),
        ({"split.count": 2}, r"is one of 2 parts"),
    ],
)
def test_settings_that_are_not_understood(tmp_path, tensors, values, message):
    with pytest.raises(GgufError, match=message):
        GgufSource(write(tmp_path / "model.gguf", "llama", tensors, **values))


def test_one_number_for_each_layer(tmp_path, tensors):
    source = GgufSource(write(tmp_path / "model.gguf", "llama", tensors, feed_forward_length=[96] * LAYERS))
    assert source.config["intermediate_size"] == 96
    assert source.tokenizer() is None


def test_damaged_headers_are_refused_or_read_but_never_crash(tmp_path, tensors):
    factors = {"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    more = {"split.count": 1, "tokenizer.ggml.tokens": ["a"] * 96, "rope.scaling.type": "none"}
    whole = write(tmp_path / "model.gguf", "llama", tensors | factors, **more).read_bytes()
    header = whole.index(b"rope_freqs.weight")
    rng = np.random.default_rng(0)
    damaged, refused = tmp_path / "damaged.gguf", 0
    for _ in range(300):
        content = bytearray(whole)
        content[rng.integers(0, header)] = rng.integers(0, 256)
        damaged.write_bytes(content)
        try:
            GgufSource(damaged)
        except GgufError:
            refused += 1
    assert refused > 100
