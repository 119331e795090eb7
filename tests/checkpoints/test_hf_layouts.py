"""Published folders in, the logits of plain PyTorch out; and back again, bit by bit."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from cpm_jax.checkpoints.hf_config import LAYOUTS
from cpm_jax.checkpoints.hf_layouts import flatten, tensors
from cpm_jax.checkpoints.import_params import import_params
from cpm_jax.checkpoints.sources import open_source
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, abstract_params, bind
from export.hf import export_hf
from tests.checkpoints import published_decoders
from tests.checkpoints.published_folders import CONFIGS, V, write

ROUND_TRIPS = [*CONFIGS, "internlm2 with biases", "qwen2 tied"]


def config_of(case: str) -> dict:
    changes = {"internlm2 with biases": {"bias": True}, "qwen2 tied": {"tie_word_embeddings": True}}
    return CONFIGS.get(case) or CONFIGS[case.split()[0]] | changes[case]


def hidden(config: ModelConfig, params: Params, tokens: np.ndarray) -> tuple:
    positions, row = jnp.arange(len(tokens))[None], jnp.asarray(tokens)[None]
    decoder = bind(config, params)
    return decoder, decoder(row, positions, jnp.ones_like(row)), positions


def close(ours: jnp.ndarray, theirs: torch.Tensor) -> None:
    assert theirs.abs().max() > 1
    np.testing.assert_allclose(ours[0], theirs, rtol=0, atol=3e-5)


@pytest.mark.parametrize("length", [40, 64, 65, 128])
@pytest.mark.parametrize("name", ["minicpm", "internlm2"])
def test_logits_of_the_published_equations(name: str, length: int, tmp_path: Path) -> None:
    """Below and above the length at which LongRoPE and dynamic NTK change frequencies."""
    write(tmp_path, CONFIGS[name])
    config, params = import_params(open_source(tmp_path))
    tokens = np.random.default_rng(1).integers(0, V, length)
    decoder, states, _ = hidden(config, params, tokens)
    close(decoder.logits(states), getattr(published_decoders, name)(tmp_path, torch.tensor(tokens)))


def test_internlm2_with_biases(tmp_path: Path) -> None:
    write(tmp_path, CONFIGS["internlm2"] | {"bias": True})
    config, params = import_params(open_source(tmp_path))
    tokens = np.arange(30)
    decoder, states, _ = hidden(config, params, tokens)
    close(decoder.logits(states), published_decoders.internlm2(tmp_path, torch.tensor(tokens)))


def test_mimo_and_its_mtp_layer(tmp_path: Path) -> None:
    write(tmp_path, CONFIGS["mimo"])
    config, params = import_params(open_source(tmp_path))
    tokens = np.random.default_rng(1).integers(0, V, 40)
    following = np.roll(tokens, -1)
    decoder, states, positions = hidden(config, params, tokens)
    ahead = decoder.mtp(states, jnp.asarray(following)[None], positions, jnp.ones((1, 40), int), 0)
    next_token, one_further = published_decoders.mimo(tmp_path, torch.tensor(tokens), torch.tensor(following))
    close(decoder.logits(states), next_token)
    close(decoder.logits(ahead), one_further)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["import os\nfor x in range(10): print(x)\n"] * 3, V)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_round_trip_is_bit_exact(case: str, dtype: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Theirs to ours in float32 and back: the same names, the same bits, and a config.json that says the same."""
    content = config_of(case)
    before = write(tmp_path / "in", content, dtype, shards=3)
    source = open_source(tmp_path / "in")
    config, params = import_params(source)
    layout = content["model_type"]
    export_hf(params, config, tokenizer, tmp_path / "out", layout=layout, dtype=dtype, imported_config=source.config)
    after = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert after[name].tobytes() == value.tobytes(), name
    written = json.loads((tmp_path / "out/config.json").read_text())
    said = {name: value for name, value in content.items() if name not in ("auto_map", "mup_denominator")}
    said |= {"dtype": dtype}
    if said["rope_scaling"]:
        said["rope_scaling"] = {
            "rope_type" if entry == "type" else entry: value for entry, value in said["rope_scaling"].items()
        }
    if "sparse_config" in said:  # what it leaves to defaults is written too
        said["sparse_config"] = written["sparse_config"] | said["sparse_config"]
    assert {name: written[name] for name in said} == said
    again, same = import_params(open_source(tmp_path / "out"))
    assert again == config
    for path, value in flatten(same).items():
        np.testing.assert_array_equal(value, flatten(params)[path])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_has_one_place(layout: str) -> None:
    """All values of a model that the layout holds lie in its tensors, once."""
    config = ModelConfig(
        vocab_size=V,
        num_layers=2,
        d_model=64,
        num_heads=4,
        num_kv_heads=2,
        d_ff=96,
        attention_bias=True,
        num_nextn_predict_layers=2 if layout == "mimo" else 0,
    )
    found = tensors(LAYOUTS[layout].names, config)
    assert len({tensor.name for tensor in found}) == len(found)
    places = [(path, tensor.layer) for tensor in found for path in tensor.paths]
    assert len(set(places)) == len(places)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(config)).items()}
    assert {path for path, _ in places} == shapes.keys()
    held = sum(int(np.prod(tensor.shape)) for tensor in found if tensor.paths)
    assert held == sum(int(np.prod(shape)) for shape in shapes.values())
