"""config.json of transformers' own classes, both styles of rotary embedding, and what is refused by name."""

import dataclasses
import re
from typing import Any

import pytest
import transformers

from cpm_jax.checkpoints.hf_config import LAYOUTS, default_layout, eos_token_ids, notes, read_config, write_config
from cpm_jax.checkpoints.sources import SourceError
from cpm_jax.common.config import ConfigError
from cpm_jax.modeling.config import ModelConfig, RopeConfig, SparseConfig
from tests.checkpoints.published_folders import CONFIGS

FACTORS = tuple(1.0 + i for i in range(8))
ROPES = {
    "default": RopeConfig(rope_theta=5e5),
    "linear": RopeConfig(scaling="linear", factor=4.0),
    "dynamic": RopeConfig(scaling="dynamic", factor=2.0, original_max_position_embeddings=32),
    "yarn": RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn with all": RopeConfig(
        scaling="yarn",
        factor=4.0,
        original_max_position_embeddings=16,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
        attention_factor=1.1,
    ),
    "longrope": RopeConfig(short_factor=FACTORS, long_factor=FACTORS[::-1], original_max_position_embeddings=16),
    "llama3": RopeConfig(
        scaling="llama3",
        factor=8.0,
        original_max_position_embeddings=16,
        low_freq_factor=1.5,
        high_freq_factor=3.0,
    ),
}


@pytest.fixture
def model() -> ModelConfig:
    return ModelConfig(
        vocab_size=300,
        num_layers=3,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        d_ff=96,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rope", ROPES)
def test_there_and_back(layout: str, rope: str, model: ModelConfig) -> None:
    """Every layout writes what it reads; with multipliers, biases and MTP layers where it has a place for them."""
    config = dataclasses.replace(model, rope=ROPES[rope], attention_bias=True)
    if layout in ("granite", "minicpm"):
        config = dataclasses.replace(config, scale_emb=12.0, scale_depth=1.4, dim_model_base=16)
    if layout == "mimo":
        config = dataclasses.replace(config, num_nextn_predict_layers=2)
    if rope.split()[0] not in LAYOUTS[layout].rope_types:
        with pytest.raises(ConfigError, match=f"RopeConfig.scaling = {rope.split()[0]}: the layout '{layout}' knows"):
            write_config(config, LAYOUTS[layout])
        return
    assert read_config(write_config(config, LAYOUTS[layout])) == config


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Granite"])
def test_transformers_writes_it_anew(name: str, rope: str, model: ModelConfig) -> None:
    """Our entries through transformers 5's own class, which saves rope_parameters, mean the same."""
    layout = LAYOUTS[name.lower()]
    config = dataclasses.replace(model, rope=ROPES[rope], attention_bias=True)
    theirs = getattr(transformers, f"{name}Config")(**write_config(config, layout)).to_dict()
    assert "rope_parameters" in theirs
    assert "rope_theta" not in theirs
    again = read_config(theirs)
    if rope == "yarn":  # transformers writes the method's own values out
        again = dataclasses.replace(again, rope=dataclasses.replace(again.rope, attention_factor=None))
    assert again == config


def test_defaults_are_those_of_the_classes() -> None:
    """Entries that a config.json leaves out mean what they mean to transformers."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    for name in ("Llama", "Qwen2", "Granite"):
        changes = {"attention_multiplier": 0.25} if name == "Granite" else {}
        whole = getattr(transformers, f"{name}Config")(**sizes, num_attention_heads=4, num_key_value_heads=4, **changes)
        entries = sizes | {"num_attention_heads": 4, "model_type": name.lower()} | changes
        assert read_config(entries) == read_config(whole.to_dict())


def test_published_sizes() -> None:
    """MiMo-7B's published config.json, as far as it says what is computed."""
    config = read_config(
        {
            "architectures": ["MiMoForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 32768,
            "max_window_layers": 32,
            "model_type": "mimo",
            "num_attention_heads": 32,
            "head_dim": 128,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 640000,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151680,
            "attention_bias": True,
            "num_nextn_predict_layers": 2,
        }
    )
    assert (config.num_nextn_predict_layers, config.attention_bias, config.rope.rope_theta) == (2, True, 640_000.0)
    internlm2 = read_config(CONFIGS["internlm2"] | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert internlm2.max_position_embeddings == 2 * internlm2.rope.original_max_position_embeddings == 128


def test_yarn_by_the_entries_of_deepseek(model: ModelConfig) -> None:
    """mscale and mscale_all_dim decide the attention factor: equal ones cancel."""
    yarn = {
        "type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    config = read_config(write_config(model, LAYOUTS["llama"]) | {"rope_scaling": yarn})
    assert config.rope.attention_factor == 1.0


def test_longrope_by_a_factor(model: ModelConfig) -> None:
    """A factor in rope_scaling stands above max_position_embeddings / original."""
    rope = {"type": "longrope", "factor": 1.0, "short_factor": FACTORS, "long_factor": FACTORS}
    hf = write_config(model, LAYOUTS["llama"]) | {"original_max_position_embeddings": 16, "rope_scaling": rope}
    assert read_config(hf).rope.attention_factor == 1.0


@pytest.mark.parametrize("ids", ["2", 2.0, True, [2, "5"], {"eos": 2}])
def test_ids_of_the_end_are_whole_numbers(ids: Any) -> None:
    words = f"eos_token_id = {ids!r}: accepted are a whole number, a list of them, and null"
    with pytest.raises(SourceError, match=re.escape(f"config.json: {words}")):
        eos_token_ids({"eos_token_id": ids}, {})
    with pytest.raises(SourceError, match=re.escape(f"generation_config.json: {words}")):
        eos_token_ids({"eos_token_id": 2}, {"eos_token_id": ids})
    assert eos_token_ids({"eos_token_id": ids}, {"eos_token_id": [2, 5]}) == (2, 5)
    assert eos_token_ids({"eos_token_id": ids}, {"eos_token_id": None}) == ()


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        (
            "llama",
            {"model_type": "gpt2"},
            "model_type = 'gpt2' (architectures ['LlamaForCausalLM']): accepted are llama",
        ),
        ("llama", {"model_type": None, "architectures": 5}, "model_type = None (architectures 5): accepted are llama"),
        ("llama", {"rope_theta": float("inf")}, "rope_theta = inf: input should be a finite number"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": float("inf")}}, "factor = inf: input should be a finite"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu': accepted is 'silu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True: accepted is False"),
        ("llama", {"hidden_size": None}, "config.json lacks hidden_size"),
        ("llama", {"hidden_size": "64"}, "hidden_size = '64': accepted are whole numbers above 0"),
        ("llama", {"head_dim": 0}, "head_dim = 0: accepted are whole numbers above 0"),
        ("llama", {"rms_norm_eps": "small"}, "ModelConfig.rms_norm_eps = 'small': input should be a valid number"),
        ("llama", {"rope_theta": "large"}, "rope_theta = 'large': accepted is a number above 0"),
        ("llama", {"rope_scaling": ["yarn"]}, "rope_scaling = ['yarn']: accepted are an object with a rope_type"),
        ("llama", {"rope_scaling": {"type": ["yarn"]}}, "type ['yarn']: accepted are default, linear, dynamic, yarn"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": "2"}}, "config.json does not describe a decoder of ours"),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 0.5}}, "RopeConfig.factor = 0.5: must be at least 1"),
        ("granite", {"logits_scaling": 0.0}, "config.json does not describe a decoder of ours"),
        ("llama", {"num_key_value_heads": 3}, "ModelConfig.num_kv_heads = 3: must divide num_heads = 4"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: accepted is None"),
        ("llama", {"num_local_experts": 8}, "num_local_experts = 8: accepted is 0"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "accepted is 'full_attention'"),
        ("llama", {"layer_types": 3}, "layer_types = 3: accepted is 'full_attention'"),
        ("llama", {"layer_types": [["full_attention"]]}, "accepted is 'full_attention'"),
        ("llama", {"rope_scaling": {"type": "mrope"}}, "type 'mrope': accepted are default, linear, dynamic, yarn"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "type 'linear' lacks factor"),
        ("llama", {"rope_scaling": {"type": "longrope"}}, "type 'longrope' lacks short_factor, long_factor"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "accepted is 1"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "rope_parameters of type 'default' has full_attention, which we do not compute",
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [16, 24, 24]}},
            "has mrope_section, which we do not compute: accepted are factor, finetuned, original_max_position",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: accepted is 1"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True: accepted is False"),
        ("mimo", {"use_mrope": True}, "use_mrope = True: accepted is False"),
        ("mimo", {"attention_bias": False}, "attention_bias = False: accepted is True"),
        ("granite", {"attention_multiplier": 0.0156}, "attention_multiplier = 0.0156: accepted is 1/sqrt(head_dim)"),
        ("granite", {"logits_scaling": 7.0}, "logits_scaling = 7.0: accepted is hidden_size / n"),
        ("minicpm", {"head_dim": 32}, "head_dim = 32: MiniCPMForCausalLM has heads of hidden_size"),
        ("internlm2", {"head_dim": 32}, "head_dim = 32: InternLM2ForCausalLM has heads of hidden_size"),
    ],
)
def test_what_we_do_not_compute_is_refused(layout: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_config(CONFIGS[layout] | changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        (
            "llama",
            {"scale_emb": 2.0},
            "ModelConfig.scale_emb = 2.0: the layout 'llama' has no such multiplier; granite",
        ),
        ("internlm2", {"scale_depth": 1.4}, "ModelConfig.scale_depth = 1.4: the layout 'internlm2' has no such"),
        ("mimo", {"dim_model_base": 16}, "ModelConfig.dim_model_base = 16: the layout 'mimo' has no such"),
        ("qwen2", {}, "ModelConfig.attention_bias = False: the layout 'qwen2' always has biases on q, k and v"),
        ("minicpm", {"head_dim": 32}, "ModelConfig.head_dim = 32: the layout 'minicpm' takes d_model / num_heads"),
    ],
)
def test_layouts_that_cannot_hold_a_model(layout: str, changes: dict[str, Any], words: str, model: ModelConfig) -> None:
    config = dataclasses.replace(model, attention_bias=layout == "mimo", **changes)
    with pytest.raises(ConfigError) as caught:
        write_config(config, LAYOUTS[layout])
    assert words in str(caught.value)


def test_attention_factors_that_a_class_does_not_read(model: ModelConfig) -> None:
    """MiniCPM's derives it from the lengths, and plain rotary embedding has none; equal ones do no harm."""
    longrope = dataclasses.replace(model, rope=dataclasses.replace(ROPES["longrope"], attention_factor=1.0))
    with pytest.raises(
        ConfigError, match=r"attention_factor = 1.0: the layout 'minicpm' takes 1.22474 for rope type 'lo"
    ):
        write_config(longrope, LAYOUTS["minicpm"])
    assert read_config(write_config(longrope, LAYOUTS["granite"])) == longrope
    as_published = dataclasses.replace(longrope, max_position_embeddings=16)
    assert read_config(write_config(as_published, LAYOUTS["minicpm"])) == as_published
    with pytest.raises(
        ConfigError, match=r"attention_factor = 1.5: the layout 'llama' takes 1 for rope type 'default'"
    ):
        write_config(dataclasses.replace(model, rope=RopeConfig(attention_factor=1.5)), LAYOUTS["llama"])


def test_the_layout_by_default(model: ModelConfig) -> None:
    assert default_layout(model).model_type == "llama"
    assert default_layout(dataclasses.replace(model, scale_depth=1.4)).model_type == "granite"


def test_what_is_left_aside_is_said() -> None:
    (denominator,) = notes(CONFIGS["minicpm"])
    assert "mup_denominator = 32: residual branches are multiplied by scale_depth / sqrt(num_hidden_layers = 3)" in (
        denominator
    )
    assert notes(CONFIGS["llama"]) == []


def test_sparse_config(model: ModelConfig) -> None:
    """The published names; what their code does with them is the variant of that name."""
    published = {
        "kernel_size": 32,
        "kernel_stride": 16,
        "init_blocks": 1,
        "block_size": 64,
        "window_size": 2048,
        "topk": 64,
        "use_nope": False,
        "dense_len": 8192,
    }
    read = read_config(CONFIGS["minicpm"] | {"sparse_config": published})
    assert read.sparse_config == SparseConfig(variant="huggingface") == read_config(CONFIGS["minicpm"]).sparse_config
    assert write_config(read, LAYOUTS["minicpm"])["sparse_config"] == published
    assert read_config(CONFIGS["minicpm"] | {"sparse_config": None}).sparse_config is None
    assert "sparse_config" not in write_config(model, LAYOUTS["llama"])
    ours = dataclasses.replace(
        model, sparse_config=SparseConfig(variant="paper", lse_approximation=False, use_nope=True)
    )
    for layout in ("llama", "granite", "minicpm"):
        assert read_config(write_config(ours, LAYOUTS[layout])).sparse_config == ours.sparse_config


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"block_size": 60}, "SparseConfig.block_size = 60: must be a multiple of kernel_stride = 16"),
        ({"topk": "64"}, "SparseConfig.topk = '64': input should be a valid integer"),
        ({"gate": True}, "SparseConfig.gate = True: unexpected"),
        ({"dense_len": -1, "topk": 64}, "SparseConfig.topk = 64: must be at most the 2 blocks"),
    ],
)
def test_sparse_config_refuses(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_config(CONFIGS["minicpm"] | {"sparse_config": entries})
    assert message in str(caught.value)
