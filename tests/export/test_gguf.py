"""GGUF files hold the model exactly as the type rounds it; the judges are the gguf package and transformers."""

import dataclasses
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from benchmarks.pretrained import smollm2_path
from cpm_jax.checkpoints.gguf import GgufSource
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.common.config import ConfigError
from cpm_jax.data.gguf_tokenizer import UNKNOWN, tokenizer_from_gguf
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig, RopeConfig, SparseConfig
from cpm_jax.modeling.rotary import attention_factor, inverse_frequencies
from export.folders import ExportError
from export.gguf import FILE_TYPES, check_read_back, export_gguf, plan_tensors
from export.gguf_tokenizer import tokenizer_to_gguf
from export.hf_check import check_hf
from tests.data.test_gguf_tokenizer import TEXTS, recorded_metadata, sentencepiece
from tests.export.small_models import LLAMA3, LONGROPE, MUP, PLAIN, YARN, random_params

CASES = {
    "llama": {},
    "llama tied, wide heads": {"tie_word_embeddings": True, "head_dim": 32},
    "llama linear": {"rope": RopeConfig(scaling="linear", factor=2.5)},
    "llama yarn": {"rope": YARN},
    "llama longrope": {"rope": LONGROPE},
    "llama longrope, own factor": {"rope": dataclasses.replace(LONGROPE, attention_factor=1.3)},
    "llama llama3": {"rope": LLAMA3},
    "llama with biases and longrope": {"attention_bias": True, "rope": LONGROPE},
    "qwen2": {"attention_bias": True},
    "qwen2 yarn": {"attention_bias": True, "rope": YARN},
    "minicpm": MUP | {"rope": LONGROPE},
    "minicpm tied": MUP | {"tie_word_embeddings": True},
    "minicpm, scaled embeddings only": {"scale_emb": 3.0},
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([*TEXTS, "def add(a, b):\n    return a + b\n", "import os"] * 3, 300)


@pytest.fixture(scope="module")
def plain() -> ModelConfig:
    return dataclasses.replace(PLAIN, rms_norm_eps=1e-5)


def export(config, tokenizer, folder, kind="F32", params=None):
    params = random_params(config) if params is None else params
    result = export_gguf(params, config, tokenizer, folder, kind=kind, name="tiny")
    return params, result, folder / result.file


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_back(case, plain, tokenizer, tmp_path):
    """Every parameter bit for bit, and every field of the config that says what is computed."""
    config = dataclasses.replace(plain, **CASES[case])
    params, result, path = export(config, tokenizer, tmp_path / "out")
    assert result.architecture == case.split()[0].rstrip(",")
    source = GgufSource(path)
    read, values = import_params(source)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(values), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    for length in (48, 200):
        frequencies = inverse_frequencies(config, length)
        np.testing.assert_allclose(inverse_frequencies(read, length), frequencies, rtol=1e-6)
    assert attention_factor(read) == pytest.approx(attention_factor(config), rel=1e-6)
    for field in ("rms_norm_eps", "max_position_embeddings", "vocab_size", "head_size", "attention_bias", *MUP):
        assert getattr(read, field) == getattr(config, field), field
    assert check_read_back(path, params, config, "F32") == result.parameters
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", FILE_TYPES)
def test_values_are_those_of_the_type(kind, tied, plain, tokenizer, tmp_path):
    """As the gguf package quantises and reads them itself; floats as numpy rounds."""
    wide = dataclasses.replace(plain, d_model=256, d_ff=256, num_layers=1, tie_word_embeddings=tied)
    params, result, path = export(wide, tokenizer, tmp_path / "out", kind)
    head = "token_embd.weight" if tied else "output.weight"
    higher = {"F16"} if kind.startswith("TQ") else {kind} if kind in ("F32", "F16", "BF16", "Q8_0") else {"Q8_0"}
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for item in plan_tensors(wide, kind):
        stored = read[item.name].tensor_type.name
        assert stored == item.kind.name
        if len(item.tensor.shape) == 1:
            assert stored == "F32"
        elif item.name == head:
            assert {stored} == higher
        elif item.name == "token_embd.weight" and kind.startswith("TQ"):
            assert stored == "F16"
        else:
            assert stored == kind
    down = np.asarray(params["layers"]["mlp"]["down_proj"]["kernel"][0]).T
    theirs = gguf.dequantize(read["blk.0.ffn_down.weight"].data, read["blk.0.ffn_down.weight"].tensor_type)
    numpy_type = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(kind)
    if numpy_type is not None:
        np.testing.assert_array_equal(theirs, down.astype(numpy_type).astype(np.float32))
    else:
        kind_number = gguf.GGMLQuantizationType[kind]
        np.testing.assert_array_equal(theirs, gguf.dequantize(gguf.quantize(down, kind_number), kind_number))
    assert check_read_back(path, params, wide, kind) == result.parameters
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.file_type"].contents() == int(FILE_TYPES[kind])


@pytest.mark.parametrize(
    ("case", "kind"),
    [("llama", "Q8_0"), ("llama tied, wide heads", "F32"), ("qwen2", "F16")],
    ids=["llama", "tied", "qwen2"],
)
def test_transformers_computes_the_same(case, kind, plain, tokenizer, tmp_path):
    config = dataclasses.replace(plain, **CASES[case])
    _, _, path = export(config, tokenizer, tmp_path / "out", kind)
    read, values = import_params(GgufSource(path))
    check = check_hf(path, values, read, tokenizer, [TEXTS[0], "def add(a, b):"], greedy_tokens=4, max_tokens=40)
    assert check.architecture == ("Qwen2ForCausalLM" if case == "qwen2" else "LlamaForCausalLM")
    assert check.greedy_tokens == 8
    wrong = jax.tree.map(lambda leaf: leaf * 1.01, values)
    with pytest.raises(ExportError, match=r"differ|greedy token"):
        check_hf(path, wrong, read, tokenizer, [TEXTS[0]], greedy_tokens=4, max_tokens=40)


def test_a_difference_is_found(plain, tokenizer, tmp_path):
    params, _, path = export(plain, tokenizer, tmp_path / "out", "Q8_0")
    kernel = params["layers"]["self_attn"]["k_proj"]["kernel"]
    params["layers"]["self_attn"]["k_proj"]["kernel"] = jnp.asarray(kernel).at[1, 3, 5].add(1.0)
    with pytest.raises(ExportError, match=r"blk\.1\.attn_k\.weight \(Q8_0\) reads back with other values"):
        check_read_back(path, params, plain, "Q8_0")


def test_what_llama_cpp_has_no_place_for(plain, tokenizer, tmp_path):
    def refused(match, **changes):
        config = dataclasses.replace(plain, **changes)
        with pytest.raises(ConfigError, match=match):
            export(config, tokenizer, tmp_path / "out")

    dynamic = RopeConfig(scaling="dynamic", factor=2.0, original_max_position_embeddings=64)
    refused("no dynamic NTK; the Hugging Face layouts llama, qwen2, .* have", rope=dynamic)
    refused(
        r"RopeConfig.attention_factor = 1.2: llama.cpp takes 1.13863",
        rope=dataclasses.replace(YARN, attention_factor=1.2),
    )
    refused("RopeConfig.truncate = False: llama.cpp's YaRN rounds", rope=dataclasses.replace(YARN, truncate=False))
    refused("ModelConfig.attention_bias = True: with multipliers", attention_bias=True, **MUP)
    refused("ModelConfig.head_dim = 32: llama.cpp's minicpm takes", head_dim=32, **MUP)
    refused(
        "head_dim = 32: with biases of q, k and v llama.cpp takes d_model / num_heads", head_dim=32, attention_bias=True
    )
    refused("ModelConfig.vocab_size = 200: the tokenizer has 300 tokens", vocab_size=200)
    assert not any(tmp_path.iterdir())


def test_what_is_left_out_is_said(plain, tokenizer, tmp_path):
    config = dataclasses.replace(plain, num_nextn_predict_layers=1, sparse_config=SparseConfig(), fp8=True)
    params, result, path = export(config, tokenizer, tmp_path / "out")
    assert result.left_out == sum(leaf.size for leaf in jax.tree.leaves(params["mtp_layers"]))
    said = " ".join(result.notes)
    for words in ("1 MTP layers", "sparse attention (InfLLM v2) is left out", "products in FP8 are left out"):
        assert words in said
    assert import_params(GgufSource(path))[0].num_nextn_predict_layers == 0


def test_rows_that_no_block_divides(plain, tokenizer, tmp_path):
    odd = dataclasses.replace(plain, d_ff=80)
    _, result, path = export(odd, tokenizer, tmp_path / "out", "Q4_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q4_0")
    assert "2 matrices are stored as F16, as rows of 80 values (blk.0.ffn_down.weight)" in result.notes[0]
    with pytest.raises(ConfigError, match=r"'TQ1_0': it stores blocks of 256 .* rows of 64. Accepted are F32, .*Q8_0"):
        export(plain, tokenizer, tmp_path / "none", "TQ1_0")
    for kind in ("Q4_K", "IQ4_NL", "Q6_K"):
        with pytest.raises(ConfigError, match=f"does not write {kind}: write F16, and let llama.cpp's llama-quantize"):
            export(plain, tokenizer, tmp_path / "none", kind)
    with pytest.raises(ConfigError, match="kind = 'int8': accepted are F32, F16") as raised:
        export(plain, tokenizer, tmp_path / "none", "int8")
    assert "llama-quantize" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("F16", 7e4, "blk.1.ffn_up.weight has values up to 7e.04, and float16"),
        ("Q4_0", -7e4, "ends at 65504; choose BF16 or F32"),
        ("BF16", 7e4, None),
        ("F32", float("nan"), "blk.1.ffn_up.weight .*has values that are not finite"),
        ("Q8_0", float("inf"), "not finite"),
    ],
)
def test_values_beyond_the_type(kind, value, words, plain, tokenizer, tmp_path):
    params = random_params(plain)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    params["layers"]["mlp"]["up_proj"]["kernel"] = jnp.asarray(kernel).at[1, 3, 5].set(value)
    if words is None:
        export(plain, tokenizer, tmp_path / "out", kind, params)
        return
    with pytest.raises(ConfigError, match=words):
        export(plain, tokenizer, tmp_path / "out", kind, params)
    assert not any(tmp_path.iterdir())


def test_nothing_half_written(plain, tokenizer, tmp_path, monkeypatch):
    """Ended in the middle of the tensors, the earlier export is as it was, and the same call then replaces it."""
    _, result, path = export(plain, tokenizer, tmp_path / "out")
    before = path.read_bytes()
    write = gguf.GGUFWriter.write_tensor_data
    written = []

    def killed(self, tensor, **more):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(tensor)
        write(self, tensor, **more)

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", killed)
        with pytest.raises(KeyboardInterrupt):
            export(plain, tokenizer, tmp_path / "out", "F16")
    assert [item.name for item in tmp_path.rglob("*")] == ["out", result.file]
    assert path.read_bytes() == before
    export(plain, tokenizer, tmp_path / "out", "F16")
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["tiny-F16.gguf"]
    (tmp_path / "out/other.gguf").write_bytes(b"somebody else's")
    with pytest.raises(ConfigError, match=r"no export of ours \(other.gguf\)"):
        export(plain, tokenizer, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds files that are no export"):
        export(plain, tokenizer, tmp_path / "mine")


# Tokenizers.


@pytest.mark.parametrize("name", ["smollm", "llama-bpe", "qwen2", "gpt-2", "default", "tekken"])
def test_byte_level_tokenizers_come_back(name, tmp_path):
    metadata = recorded_metadata(name)
    tokenizer = tokenizer_from_gguf(metadata, "model.gguf")
    written = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size)
    assert written["tokenizer.ggml.pre"] == name
    for key in ("tokens", "token_type", "merges", "model"):
        assert written[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"], key
    again = tokenizer_from_gguf(written, "again.gguf")
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert (again.add_bos, again.bos_id, again.eos_id) == (tokenizer.add_bos, tokenizer.bos_id, tokenizer.eos_id)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_comes_back(prefix):
    metadata = sentencepiece(add_space_prefix=prefix)
    tokenizer = tokenizer_from_gguf(metadata, "model.gguf")
    written = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size + 3)
    assert written["tokenizer.ggml.tokens"][-3:] == [f"[PAD{tokenizer.vocab_size + i}]" for i in range(3)]
    assert written["tokenizer.ggml.token_type"][:-3] == metadata["tokenizer.ggml.token_type"]
    assert written["tokenizer.ggml.add_space_prefix"] == prefix
    again = tokenizer_from_gguf(written, "again.gguf")
    assert again.vocab_size == tokenizer.vocab_size
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_an_unknown_token_that_is_an_added_one():
    content = tokenizer_from_gguf(sentencepiece(), "model.gguf").to_json()
    first, *rest = content["model"]["vocab"]
    assert first == content["model"]["unk_token"] == "<unk>"
    content["model"]["vocab"] = {token: index for index, token in enumerate(rest)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"] = [added | {"id": added["id"] - 1} for added in content["added_tokens"]]
    content["added_tokens"].append({"id": len(rest), "content": "<unk>", "special": True, **flags})
    content["post_processor"] = None
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), {})
    written = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size)
    assert (written["tokenizer.ggml.tokens"][-1], written["tokenizer.ggml.token_type"][-1]) == ("<unk>", UNKNOWN)


def test_our_own_tokenizer(tokenizer):
    """Digits apart, bos first, and a template whose end of turn is a token."""
    written = tokenizer_to_gguf(tokenizer, tokenizer.vocab_size)
    assert written["tokenizer.ggml.pre"] == "smollm"
    assert written["tokenizer.chat_template"] == tokenizer.require_chat_template().source
    assert written["tokenizer.ggml.eot_token_id"] == tokenizer.encode("<|im_end|>")[0]
    assert (written["tokenizer.ggml.add_bos_token"], written["tokenizer.ggml.add_eos_token"]) == (True, False)
    again = tokenizer_from_gguf(written, "model.gguf")
    for text in (*TEXTS, "<|im_start|>user\n42<|im_end|>"):
        assert again.encode_prompt(text) == tokenizer.encode_prompt(text)
    assert again.special_tokens == tokenizer.special_tokens


def without_eos(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    tokenizer.save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(folder)


def test_the_end_of_a_text_that_the_tokenizer_does_not_name(plain, tokenizer, tmp_path):
    """The first id of the configuration that the model has; without one, what llama.cpp assumes is said."""
    nameless = without_eos(tokenizer, tmp_path / "tokenizer")
    key = "tokenizer.ggml.eos_token_id"
    written = [tokenizer_to_gguf(nameless, plain.vocab_size, ids) for ids in ([7, 5], [-1, plain.vocab_size, 5], [])]
    assert [metadata.get(key) for metadata in written] == [7, 5, None]
    assert tokenizer_to_gguf(tokenizer, plain.vocab_size, [7])[key] == tokenizer.eos_id
    for ids in ([7], []):
        params = random_params(plain)
        result = export_gguf(params, plain, nameless, tmp_path / "out", name="tiny", eos_token_ids=ids)
        said = "the token that ends a text is left out" in " ".join(result.notes)
        assert said == (not ids)
        assert not ids or GgufSource(tmp_path / "out" / result.file).tokenizer().eos_id == 7


def changed(tokenizer: Tokenizer, folder: Path, change) -> Tokenizer:
    """A tokenizer with another backend."""
    tokenizer.save(folder)
    loaded = Tokenizer.load(folder)
    change(loaded._backend)
    loaded.save(folder)
    return Tokenizer.load(folder)


def test_tokenizers_that_gguf_cannot_describe(tokenizer, tmp_path):
    def refused(change, words, base=tokenizer):
        with pytest.raises(ConfigError, match=words) as raised:
            tokenizer_to_gguf(changed(base, tmp_path / "other", change), 1000)
        assert "Write a Hugging Face folder" in str(raised.value)

    def three_digits(backend):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )

    refused(three_digits, "it splits text by .*accepted is the rule of one of default, gpt-2, smollm")
    refused(lambda backend: setattr(backend, "normalizer", normalizers.Lowercase()), "it normalises text by Lowercase")
    refused(lambda backend: setattr(backend, "normalizer", normalizers.NFC()), "after NFC with ignore_merges = False")
    refused(lambda backend: setattr(backend.model, "dropout", 0.5), "its model has dropout = 0.5")
    refused(lambda backend: setattr(backend, "model", models.Unigram([("a", 0.0)], 0)), "its model is Unigram")
    refused(
        lambda backend: backend.add_special_tokens([AddedToken("<mask>", lstrip=True)]), "'<mask>' has lstrip = True"
    )
    pieces = tokenizer_from_gguf(sentencepiece(), "model.gguf")
    refused(lambda backend: setattr(backend, "normalizer", normalizers.NFKC()), "its normalizer is .*NFKC", pieces)

    def scrambled(backend):
        content = json.loads(backend.to_str())
        content["model"]["merges"] = content["model"]["merges"][:-1]
        backend.model = models.BPE(
            content["model"]["vocab"], [tuple(merge) for merge in content["model"]["merges"]], unk_token="<unk>"
        )

    refused(scrambled, "its merges do not join", pieces)


def test_the_real_tokenizer_of_smollm2():
    source = GgufSource(smollm2_path())
    tokenizer = source.tokenizer()
    written = tokenizer_to_gguf(tokenizer, source.config["vocab_size"])
    metadata = source._file.metadata
    for key in ("model", "pre", "tokens", "merges", "bos_token_id", "eos_token_id", "unknown_token_id"):
        assert written[f"tokenizer.ggml.{key}"] == metadata[f"tokenizer.ggml.{key}"], key
    assert written["tokenizer.chat_template"] == metadata["tokenizer.chat_template"]
    ours, theirs = (m["tokenizer.ggml.token_type"] for m in (written, metadata))
    assert ours == theirs
