"""The judge is transformers: it loads what we wrote and has to compute the same."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import torch
import transformers

from cpm_jax.checkpoints.hf_layouts import LLAMA, tensors
from cpm_jax.common.config import ConfigError
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from export.folders import ExportError
from export.hf import export_hf, hf_config
from export.hf_check import check_hf
from export.manifest import write_manifest
from tests.export.small_models import LONGROPE, MUP, PLAIN, TEXTS, random_params, small_tokenizer
from tests.export.test_manifest import FIELDS as MANIFEST


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def plain() -> ModelConfig:
    return PLAIN


CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama tied, wide heads": ("LlamaForCausalLM", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama with biases": ("LlamaForCausalLM", {"attention_bias": True}),
    "llama with biases, tied": ("LlamaForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    "granite": ("GraniteForCausalLM", MUP),
    "granite tied": ("GraniteForCausalLM", MUP | {"tie_word_embeddings": True}),
    "granite with biases": ("GraniteForCausalLM", MUP | {"attention_bias": True}),
    "granite, scaled embeddings only": ("GraniteForCausalLM", {"scale_emb": 3.0}),
    "granite longrope": ("GraniteForCausalLM", MUP | {"rope": LONGROPE}),
    "llama longrope": ("LlamaForCausalLM", {"rope": LONGROPE}),
    "llama longrope, own factor": (
        "LlamaForCausalLM",
        {"rope": dataclasses.replace(LONGROPE, attention_factor=1.3)},
    ),
    "granite with MTP": ("GraniteForCausalLM", MUP | {"num_nextn_predict_layers": 1}),
    "unrolled": ("LlamaForCausalLM", {"scan_layers": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same(case, plain, tokenizer, tmp_path):
    architecture, changes = CASES[case]
    config = dataclasses.replace(plain, **changes)
    params = random_params(config)
    result = export_hf(params, config, tokenizer, tmp_path / "hf")
    assert result.architecture == architecture
    total = sum(leaf.size for leaf in jax.tree.leaves({k: v for k, v in params.items() if k != "mtp_layers"}))
    zeros = config.num_layers * config.d_model if config.attention_bias else 0
    assert result.parameters == total + zeros
    assert result.left_out == sum(leaf.size for leaf in jax.tree.leaves(params.get("mtp_layers", {})))
    check = check_hf(tmp_path / "hf", params, config, tokenizer, TEXTS, greedy_tokens=4, max_tokens=24)
    assert check.architecture == architecture
    assert check.max_error <= 1e-4
    assert check.greedy_tokens == 8
    assert (f"({result.left_out:,} parameters)" in (tmp_path / "hf/README.md").read_text()) == bool(result.left_out)


@pytest.mark.parametrize("length", [64, 65, 150])
def test_longrope_switches_factors_at_the_same_length(length, plain, tokenizer, tmp_path):
    config = dataclasses.replace(plain, rope=LONGROPE)
    params = random_params(config)
    export_hf(params, config, tokenizer, tmp_path / "hf")
    check = check_hf(tmp_path / "hf", params, config, tokenizer, [TEXTS[0] * 16], greedy_tokens=0, max_tokens=length)
    assert check.tokens == length


def test_qwen2_class_agrees_where_only_q_k_v_have_biases(plain, tokenizer, tmp_path):
    """MiMo's layout is Qwen2's; that class reads the same weights once the zero biases are dropped."""
    config = dataclasses.replace(plain, attention_bias=True)
    params = random_params(config)
    export_hf(params, config, tokenizer, tmp_path / "hf")
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    content = hf_config(config, tokenizer, "float32") | {"model_type": "qwen2"}
    qwen2 = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**content)).eval()
    left = qwen2.load_state_dict(llama.state_dict(), strict=False)
    assert left.missing_keys == []
    assert left.unexpected_keys == [f"model.layers.{i}.self_attn.o_proj.bias" for i in range(2)]
    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    torch.testing.assert_close(qwen2(ids).logits, llama(ids).logits, atol=1e-4, rtol=0)


def test_bfloat16_weights_are_the_rounded_ones(plain, tokenizer, tmp_path):
    params = random_params(plain)
    export_hf(params, plain, tokenizer, tmp_path / "hf", dtype="bfloat16")
    check_hf(tmp_path / "hf", params, plain, tokenizer, TEXTS, greedy_tokens=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.bfloat16
    ours = params["layers"]["mlp"]["up_proj"]["kernel"][1].astype(ml_dtypes.bfloat16).astype(np.float32).T
    np.testing.assert_array_equal(model.model.layers[1].mlp.up_proj.weight.detach().float().numpy(), ours)


def test_float16_holds_what_is_in_its_range(plain, tokenizer, tmp_path):
    params = random_params(plain)
    export_hf(params, plain, tokenizer, tmp_path / "hf", dtype="float16")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert model.dtype == torch.float16
    params["layers"]["mlp"]["up_proj"]["kernel"][1, 3, 5] = -7e4
    with pytest.raises(
        ConfigError, match=r"model.layers.1.mlp.up_proj.weight has values up to 7e\+04, and float16 ends"
    ):
        export_hf(params, plain, tokenizer, tmp_path / "again", dtype="float16")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("layout", ["llama", "granite"])
def test_a_layout_by_name(layout, plain, tokenizer, tmp_path):
    """Granite holds a model without multipliers too, with each of them 1."""
    params = random_params(plain)
    result = export_hf(params, plain, tokenizer, tmp_path / "hf", layout=layout)
    assert result.architecture == f"{layout.capitalize()}ForCausalLM"
    check_hf(tmp_path / "hf", params, plain, tokenizer, TEXTS, greedy_tokens=4, max_tokens=24)


def test_layouts_that_are_refused(plain, tokenizer, tmp_path):
    params = random_params(plain)
    with pytest.raises(
        ConfigError, match="layout = 'gpt2': accepted are llama, qwen2, granite, minicpm, internlm2, mimo"
    ):
        export_hf(params, plain, tokenizer, tmp_path / "hf", layout="gpt2")
    with pytest.raises(ConfigError, match="the layout 'qwen2' always has biases on q, k and v"):
        export_hf(params, plain, tokenizer, tmp_path / "hf", layout="qwen2")
    assert not any(tmp_path.iterdir())


def test_shards_have_an_index_and_stay_below_the_limit(plain, tokenizer, tmp_path):
    params = random_params(plain)
    limit = 100_000
    result = export_hf(params, plain, tokenizer, tmp_path / "hf", max_shard_bytes=limit)
    assert len(result.files) > 2
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(result.files)
    assert index["metadata"]["total_size"] == 4 * result.parameters
    assert max((tmp_path / "hf" / name).stat().st_size for name in result.files) < limit + 4096
    check_hf(tmp_path / "hf", params, plain, tokenizer, TEXTS, greedy_tokens=0)


def test_tokenizer_gives_the_same_ids(plain, tokenizer, tmp_path):
    export_hf(random_params(plain), plain, tokenizer, tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in (*TEXTS, "", " leading", "<s> <|im_start|>user"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert theirs(text)["input_ids"] == tokenizer.encode_prompt(text)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    assert theirs.model_max_length == plain.max_position_embeddings


def test_a_tokenizer_with_code_of_its_own(plain, tokenizer, tmp_path):
    """InternLM2's tokenizer_config.json names a class in a file that does not lie in the folder."""
    settings = {"tokenizer_class": "InternLM2Tokenizer", "eos_token": "</s>"}
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}
    published = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tokenizer.to_json())), settings)
    export_hf(random_params(plain), plain, published, tmp_path / "hf", layout="internlm2")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert theirs(TEXTS[1], add_special_tokens=False)["input_ids"] == tokenizer.encode(TEXTS[1])


def test_penalties_of_a_published_model_do_not_count(plain, tokenizer, tmp_path):
    """Its generation_config.json comes along; greedy text is compared as the most probable tokens all the same."""
    params = random_params(plain)
    published = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 0.7}
    export_hf(params, plain, tokenizer, tmp_path / "hf", imported_generation_config=published)
    assert json.loads((tmp_path / "hf/generation_config.json").read_text()).items() >= published.items()
    check = check_hf(tmp_path / "hf", params, plain, tokenizer, TEXTS, greedy_tokens=12, max_tokens=24)
    assert check.greedy_tokens == 24


def test_what_is_no_number_is_no_small_difference(plain, tokenizer, tmp_path):
    params = random_params(plain)
    params["norm"]["scale"][3] = np.nan
    export_hf(params, plain, tokenizer, tmp_path / "hf")
    with pytest.raises(ExportError, match="differ from ours by nan"):
        check_hf(tmp_path / "hf", params, plain, tokenizer, TEXTS[:1], greedy_tokens=0)


def test_check_finds_a_wrong_weight_and_a_missing_one(plain, tokenizer, tmp_path):
    params = random_params(plain)
    export_hf(params, plain, tokenizer, tmp_path / "hf")
    wrong = random_params(plain)
    wrong["layers"]["mlp"]["down_proj"]["kernel"] += 0.01
    with pytest.raises(ExportError, match=r"differ|greedy token"):
        check_hf(tmp_path / "hf", wrong, plain, tokenizer, TEXTS)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ExportError, match="missing_keys"):
        check_hf(tmp_path / "hf", params, plain, tokenizer, TEXTS)


def test_an_earlier_export_is_replaced_and_other_folders_are_not(plain, tokenizer, tmp_path):
    params = random_params(plain)
    export_hf(params, plain, tokenizer, tmp_path / "hf", max_shard_bytes=100_000)
    result = export_hf(params, plain, tokenizer, tmp_path / "hf", facts={"Steps": "10 | 20"})
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert names == expected | {"tokenizer.json", "tokenizer_config.json"}
    assert result.files == ("model.safetensors",)
    assert "| Steps | 10 \\| 20 |" in (tmp_path / "hf/README.md").read_text()
    (tmp_path / "hf/notes.txt").write_text("x")  # there is no manifest that could leave it out
    with pytest.raises(ConfigError, match=r"no export of ours \(notes.txt\)"):
        export_hf(params, plain, tokenizer, tmp_path / "hf")
    assert (tmp_path / "hf/notes.txt").read_text() == "x"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")  # somebody else's model
    with pytest.raises(ConfigError, match=r"no export of ours \(config.json\); give an empty or a new folder"):
        export_hf(params, plain, tokenizer, mine)
    write_manifest(mine, **MANIFEST)
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"no export of ours \(thesis.tex\)"):
        export_hf(params, plain, tokenizer, mine)
    assert {path.name for path in mine.iterdir()} == {"config.json", "manifest.json", "thesis.tex"}
    (mine / "thesis.tex").unlink()
    export_hf(params, plain, tokenizer, mine)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_tokenizer_of_another_model_is_refused(plain, tokenizer, tmp_path):
    config = dataclasses.replace(plain, vocab_size=100)
    with pytest.raises(ConfigError, match="vocab_size = 100: the tokenizer has"):
        export_hf(random_params(config), config, tokenizer, tmp_path / "hf")


def test_names_and_shapes_of_a_large_model_are_complete(tokenizer):
    """Every tensor that transformers expects of MiniCPM4-8B's shape, and no other, without allocating one."""
    config = ModelConfig(
        vocab_size=73_448,
        num_layers=32,
        d_model=4096,
        num_heads=32,
        num_kv_heads=2,
        d_ff=16384,
        **{**MUP, "dim_model_base": 256},
    )
    ours = {part.name: part.shape for part in tensors(LLAMA, config)}
    hf = transformers.GraniteConfig(**hf_config(config, tokenizer, "bfloat16"))
    with torch.device("meta"):
        model = transformers.GraniteForCausalLM(hf)
    assert ours == {name: tuple(value.shape) for name, value in model.state_dict().items()}
