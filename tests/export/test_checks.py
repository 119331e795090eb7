"""What export and VERIFY compare of texts; the runtimes that they compare with have tests of their own."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.modeling.config import RopeConfig
from export.checks import MAX_DIVERGENCE, Exported, compare_source, exact, record, recorded_error, text_lengths
from export.folders import ExportError
from export.manifest import RecordedText
from tests.export.small_models import LONGROPE, PLAIN, SPARSE, random_params, small_tokenizer

SMALL = exact(dataclasses.replace(PLAIN, num_layers=1, scan_layers=False, max_position_embeddings=12))


@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({}, (64, 16)),
        ({"max_position_embeddings": 48}, (32, 16)),
        ({"max_position_embeddings": 17}, (2, 15)),
        ({"max_position_embeddings": 12}, (2, 10)),
        ({"sparse_config": dataclasses.replace(SPARSE, dense_len=8)}, (2, 6)),
        ({"sparse_config": dataclasses.replace(SPARSE, dense_len=1)}, (2, 1)),
        ({"sparse_config": dataclasses.replace(SPARSE, dense_len=-1)}, (64, 16)),
        ({"rope": dataclasses.replace(LONGROPE, original_max_position_embeddings=16)}, (2, 14)),
        ({"rope": RopeConfig(scaling="dynamic", factor=2.0, original_max_position_embeddings=70)}, (54, 16)),
    ],
)
def test_lengths_within_which_all_is_computed_alike(changes, lengths):
    assert text_lengths(dataclasses.replace(PLAIN, **changes)) == lengths


def test_a_context_of_few_tokens(tmp_path):
    params, tokenizer = random_params(SMALL), small_tokenizer()
    figures = compare_source(Exported(tmp_path, SMALL, params, tokenizer), params, SMALL, tokenizer).figures
    assert (figures["positions"], figures["max_error"]) == (6, 0)
    assert figures["perplexity"] == figures["perplexity_of_source"] > 1
    damaged = random_params(SMALL)
    damaged["norm"]["scale"][3] = np.nan
    with pytest.raises(ExportError, match="the source gives logits that are not finite"):
        compare_source(Exported(tmp_path, SMALL, damaged, tokenizer), damaged, SMALL, tokenizer)
    with pytest.raises(ExportError, match=f"{tmp_path} gives logits that are not finite"):
        compare_source(Exported(tmp_path, SMALL, damaged, tokenizer), params, SMALL, tokenizer)


def test_texts_without_tokens(tmp_path):
    """A tokenizer of one script has no tokens for the others, and its model is compared on what it can read."""

    def tokenizer_of(letters: str) -> Tokenizer:
        return Tokenizer(tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [])), {})

    params, chinese = random_params(SMALL), tokenizer_of("清晨的码头")
    exported = Exported(tmp_path, SMALL, params, chinese)
    assert compare_source(exported, params, SMALL, chinese).figures["positions"] == 2
    assert [text.name for text in record(exported)] == ["other scripts"]
    none = tokenizer_of("ξψ")
    with pytest.raises(ExportError, match="of 2 tokens, gives none to any of the texts code, prose, other scripts"):
        compare_source(Exported(tmp_path, SMALL, params, none), params, SMALL, none)


def test_a_type_that_ruins_a_model(tmp_path):
    """A GGUF file that says something else is refused; of a quantised folder the cost is stated."""
    params, ruined, tokenizer = random_params(SMALL), random_params(SMALL), small_tokenizer()
    ruined["norm"]["scale"] *= -3
    folder, file = (Exported(tmp_path / name, SMALL, ruined, tokenizer) for name in ("gptq", "tiny-TQ2_0.gguf"))
    assert compare_source(folder, params, SMALL, tokenizer).figures["kl_divergence"] > MAX_DIVERGENCE
    with pytest.raises(
        ExportError, match=r"tiny-TQ2_0.gguf says something else .* by [\d.]+ nats .*choose a wider TYPE"
    ):
        compare_source(file, params, SMALL, tokenizer)


def test_logits_that_were_recorded(tmp_path):
    last = np.asarray([0.5, -8.0, 2.0], np.float32)
    text = RecordedText("code", "a", (1,), (2,), (2, 0), (2.0, 0.5))
    assert recorded_error(tmp_path, text, last, 1e-4) == (0, pytest.approx(8e-4))
    with pytest.raises(ExportError, match=r"after the text 'code' differ by 0\.001 from those recorded"):
        recorded_error(tmp_path, text, last + np.float32(1e-3), 1e-4)
    with pytest.raises(ExportError, match="differ by nan"):
        recorded_error(tmp_path, text, last * np.float32("nan"), 1e-4)
    for strange in ({"top_tokens": (3, 0)}, {"greedy": (3,)}):
        with pytest.raises(ExportError, match="recorded after the text 'code' that no model of 3 has"):
            recorded_error(tmp_path, dataclasses.replace(text, **strange), last, 1e-4)
