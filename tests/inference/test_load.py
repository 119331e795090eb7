"""Models from Hugging Face folders, with the tokenizer beside them or another."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from cpm_jax.checkpoints.sources import SourceError
from cpm_jax.common.config import InputError
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.load import load_model
from tests.checkpoints.published_folders import CONFIGS, GENERATION_CONFIG, V, write

WORDS = [f"{a}{b} {b}{c}{a}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrs"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "model", CONFIGS["llama"])
    Tokenizer.train(WORDS, V).save(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_read_as_it_is(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    loaded = load_model(folder, dtype="bfloat16")
    assert loaded.config.dtype == "bfloat16"
    assert loaded.eos_ids == (2, 7)
    assert loaded.tokenizer.vocab_size == V
    written = safetensors.numpy.load_file(folder / "model-00001-of-00002.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(loaded.params["embed_tokens"]["embedding"], written.astype(ml_dtypes.bfloat16))


def test_a_tokenizer_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    """Larger, its last ids would have no row; much smaller, the scores would be those of nonsense."""
    Tokenizer.train(WORDS, V + 1).save(tmp_path / "larger")
    with pytest.raises(SourceError, match=rf"larger has {V + 1} ids and the model's vocab_size is {V}: accepted are"):
        load_model(folder, tmp_path / "larger")
    write(tmp_path / "large", CONFIGS["llama"] | {"vocab_size": V + 1100})
    with pytest.raises(SourceError, match=rf"has {V} ids and the model's vocab_size is 1,400: accepted are"):
        load_model(tmp_path / "large", folder)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer with it: give the path of a tokenizer\.json"):
        load_model(folder)
