"""Folders that are damaged or are not what config.json says: each is a named error that says what was expected."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import HfSource, SourceError, open_source
from tests.checkpoints.published_folders import CONFIGS, D, V, write

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama in two shards."""
    write(tmp_path / "model", CONFIGS["llama"])
    return tmp_path / "model"


def change(folder: Path, file: str, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (with None) removes tensors of a file, and says so in the index."""
    tensors = safetensors.numpy.load_file(folder / file)
    names = {name.replace("__", "."): value for name, value in changes.items()}
    tensors = {name: value for name, value in (tensors | names).items() if value is not None}
    safetensors.numpy.save_file(tensors, folder / file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weight_map = {name: place for name, place in index["weight_map"].items() if place != file}
    index["weight_map"] = weight_map | dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def message(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        import_params(open_source(folder))
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_reads_what_safetensors_wrote(shards: int, dtype: str, tmp_path: Path) -> None:
    written = write(tmp_path, CONFIGS["llama"], dtype, shards)
    source = HfSource(tmp_path)
    assert set(source.names()) == written.keys()
    for name, value in written.items():
        assert source.shape(name) == value.shape
        assert source.dtype(name) == source.read(name).dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
        assert source.read(name).tobytes() == value.tobytes()
    part = source.read("model.layers.1.mlp.up_proj.weight", (slice(7, 20), slice(3, 9)))
    np.testing.assert_array_equal(part, written["model.layers.1.mlp.up_proj.weight"][7:20, 3:9])
    assert source.tokenizer() is None


def test_a_missing_shard(folder: Path) -> None:
    (folder / SECOND).unlink()
    assert f"lacks the shard {SECOND}, in which model.safetensors.index.json says 15 of 30 tensors are" in message(
        folder
    )


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_a_file_cut_short(folder: Path, keep: int) -> None:
    content = (folder / SECOND).read_bytes()[:keep]
    (folder / SECOND).write_bytes(content)
    found = message(folder)
    assert f"{SECOND} ({len(content):,} bytes) cannot be read as safetensors" in found
    assert "cut short" in found


def test_an_index_that_says_something_else(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = FIRST
    index.write_text(json.dumps(content))
    assert f"{FIRST} lacks model.layers.9.mlp.up_proj.weight, which model.safetensors.index.json says" in message(
        folder
    )
    del content["weight_map"]["model.layers.9.mlp.up_proj.weight"], content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    assert "has model.norm.weight, of which model.safetensors.index.json does not know" in message(folder)
    index.write_text(json.dumps({"weight_map": ["model.norm.weight"]}))
    assert 'must have a "weight_map"' in message(folder)
    index.write_text("{")
    assert "model.safetensors.index.json cannot be read as JSON" in message(folder)


def test_missing_extra_and_misshapen_tensors(folder: Path) -> None:
    up = "model.layers.1.mlp.up_proj.weight"
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][up]
    original = shutil.copytree(folder, folder.with_name("original"))
    change(folder, where, **{up: None})
    assert f"missing tensors: {up}; the model that config.json describes (3 layers of width 64, 4 heads" in message(
        folder
    )
    change(folder, where, **{up: np.zeros((95, D), np.float32)})
    assert f"{up} has the shape (95, 64): (96, 64) is what the model has" in message(folder)
    shutil.copytree(original, folder, dirs_exist_ok=True)
    change(folder, FIRST, model__layers__0__self_attn__q_norm__weight=np.ones(16, np.float32))
    assert "tensors without a place: model.layers.0.self_attn.q_norm.weight" in message(folder)


def test_config_json_of_another_depth_or_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for entry, words in (
        ({"num_hidden_layers": 4}, "missing tensors: model.layers.3.input_layernorm.weight, "),
        ({"num_hidden_layers": 10**12}, "says that there are 1,000,000,000,000 layers: the weights have only 30"),
        ({"num_hidden_layers": 2}, "tensors without a place: model.layers.2.input_layernorm.weight, "),
        ({"vocab_size": 301}, f"model.embed_tokens.weight has the shape ({V}, {D}): (301, {D}) is what"),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight has the shape (32, 64): (64, 64)"),
    ):
        (folder / "config.json").write_text(json.dumps(config | entry))
        assert words in message(folder)


def test_a_config_json_that_cannot_be_read(folder: Path) -> None:
    for content in ("", "{", "[" * 100_000, "\xff", "[]"):
        (folder / "config.json").write_text(content, "latin-1")
        with pytest.raises(
            SourceError, match=r"config\.json (cannot be read as JSON|must hold a JSON object): |not list"
        ):
            open_source(folder)


def test_a_bias_that_our_decoder_does_not_have(tmp_path: Path) -> None:
    write(tmp_path, CONFIGS["llama with biases"])
    name = "model.layers.2.self_attn.o_proj.bias"
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"][name]
    bias = np.zeros(D, np.float32)
    bias[-1] = 1e-9
    change(tmp_path, where, **{name: bias})
    assert f"{name} is not zero: accepted are zeros" in message(tmp_path)


def test_a_tied_head_that_is_written_too(tmp_path: Path) -> None:
    """It is passed over where it is the embedding, as transformers does, and refused where it is not."""
    tensors = write(tmp_path, CONFIGS["qwen2"] | {"tie_word_embeddings": True}, shards=1)
    for head in (tensors["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"] + 1):
        safetensors.numpy.save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
        if head is tensors["model.embed_tokens.weight"]:
            assert "lm_head" not in import_params(open_source(tmp_path))[1]
    assert "lm_head.weight differs from model.embed_tokens.weight" in message(tmp_path)


def test_constants_among_the_weights_are_passed_over(tmp_path: Path) -> None:
    tensors = write(tmp_path, CONFIGS["llama"], shards=1)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    config, _ = import_params(open_source(tmp_path))
    assert config.num_layers == 3


def test_types_that_are_no_floats(tmp_path: Path) -> None:
    tensors = write(tmp_path, CONFIGS["llama"], shards=1)
    tensors["model.norm.weight"] = np.ones(D, np.int8)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert "model.norm.weight is of type I8; accepted are F32, F16, BF16" in message(tmp_path)


def test_folders_without_weights(tmp_path: Path, folder: Path) -> None:
    assert "is no Hugging Face folder: it has no config.json" in message(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "needs model.safetensors, or shards named in model.safetensors.index.json; it has none" in message(tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    assert "it has 2 of them without an index" in message(folder)
    (tmp_path / "config.json").write_text("[]")
    assert "config.json must hold a JSON object, not list" in message(tmp_path)
    assert "no such folder" in message(tmp_path / "nowhere")
