"""The benchmark of quantisation in miniature: its rows, its cells, and what it concludes from losses made up."""

import argparse
import json
import math

import jax
import numpy as np
import pytest

from benchmarks import quantization
from benchmarks.long_texts import LongText
from benchmarks.quantization import (
    Measured,
    Score,
    calibration_rows,
    evaluation_rows,
    measure,
    methods,
    report,
    task_scores,
)
from benchmarks.results import load
from benchmarks.sparse_quality_texts import Excerpt, Rows
from cpm_jax.common.files import write_json
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.load import LoadedModel
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import init_params

TEXTS = ["the quick brown fox jumps over the lazy dog. Question: Answer: "] * 3
TOKENIZER = Tokenizer.train(TEXTS, vocab_size=320)
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    num_layers=2,
    d_model=32,
    num_heads=2,
    num_kv_heads=1,
    d_ff=64,
    initializer_range=0.2,
    dtype="float32",
)
SETTINGS = {"group_size": 16, "calibration_rows": 6, "rows": 4, "length": 24}
ORIGIN = {"commit": "abc", "date": "2026-01-02T03:04:05+00:00", "machine": {"cpu": "of the cells"}}


@pytest.fixture
def model(tmp_path):
    return LoadedModel(CONFIG, init_params(CONFIG, jax.random.key(0)), TOKENIZER, 0, tmp_path)


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Two tasks of three items each: right or wrong, and the loss of a solution."""
    choices, solutions = tmp_path / "choices.jsonl", tmp_path / "solutions.jsonl"
    choices.write_text(
        "".join(
            json.dumps({"question": f"the {i}?", "choices": ["fox", "dog"], "answer": i % 2}) + "\n" for i in range(3)
        )
    )
    solutions.write_text(
        "".join(
            json.dumps({"question": f"{i} + 1?", "reasoning": f"{i} and one " * (i + 1), "answer": str(i + 1)}) + "\n"
            for i in range(3)
        )
    )
    names = (str(choices), f"scaling_bench:{solutions}")
    monkeypatch.setattr(quantization, "TASKS", names)
    return names


def _texts():
    rng = np.random.default_rng(0)
    excerpts = [Excerpt(f"novels{i}", rng.integers(0, 64, 120).astype(np.int32), np.arange(120)) for i in range(2)]
    return Rows(excerpts, rng.integers(0, 64, (8, 40)).astype(np.int32))


def test_rows_are_of_all_excerpts_in_turn_and_do_not_overlap():
    texts = _texts()
    rows = evaluation_rows(texts, 5, 24)
    assert rows.shape == (5, 25)
    np.testing.assert_array_equal(rows[0], texts.excerpts[0].tokens[:25])
    np.testing.assert_array_equal(rows[1], texts.excerpts[1].tokens[:25])
    np.testing.assert_array_equal(rows[4], texts.excerpts[0].tokens[-25:])
    with pytest.raises(ValueError, match="5 rows of 25 tokens overlap in an excerpt of 120"):
        evaluation_rows(texts, 10, 24)


def test_calibration_has_as_much_of_each_kind():
    kinds = {"few": ["the quick brown fox " * 20], "many": ["jumps over the lazy dog. "] * 900}
    rows = calibration_rows({name: LongText("", text) for name, text in kinds.items()}, TOKENIZER, 5, 24)
    assert rows.shape == (5, 24)
    few, many = (TOKENIZER.encode("\n\n".join(text)) for text in kinds.values())
    assert [rows[0].tolist(), rows[1].tolist()] == [few[:24], many[:24]]
    assert [rows[4].tolist(), rows[3].tolist()] == [few[-24:], many[(len(many) - 24) // 2 :][:24]]


def test_scores_are_of_the_items_in_their_order(model, tasks):
    choices, solutions = task_scores(model).values()
    assert choices.higher_is_better
    assert set(choices.values) <= {0, 1}
    assert choices.weights == (1, 1, 1)
    assert not solutions.higher_is_better
    tokens = [len(TOKENIZER.encode(f" {f'{i} and one ' * (i + 1)}\nThe answer is {i + 1}")) for i in range(3)]
    assert list(solutions.weights) == tokens


def test_methods_are_measured_once_and_reported(tmp_path, monkeypatch, model, tasks):
    monkeypatch.setattr(quantization, "POSITIONS", 16)
    wanted = [quantization.FLOAT, "RTN"]
    args = argparse.Namespace(**SETTINGS, methods=wanted, seconds=0.0)
    write_json(tmp_path / quantization.SETTINGS_FILE, SETTINGS)
    rows = (_texts().training[:6, :24], evaluation_rows(_texts(), 4, 24))
    measure(tmp_path, model, *rows, args, deadline=0.0)  # is over: nothing is begun
    assert not (tmp_path / "cells").exists()
    measure(tmp_path, model, *rows, args, deadline=math.inf)
    cells = {method: Measured.load(tmp_path, method) for method in wanted}
    assert cells["RTN"].nats.shape == (4,)
    assert np.abs(cells["RTN"].nats - cells[quantization.FLOAT].nats).max() > 1e-4
    assert len(cells["RTN"].errors["mlp/up_proj"]) == CONFIG.num_layers
    losses = [np.array(cells[method].scores[tasks[1]].values) for method in wanted]
    assert np.abs(losses[0] - losses[1]).max() > 1e-4
    monkeypatch.setattr(quantization, "quantize_model", None)  # kept: not measured again
    measure(tmp_path, model, *rows, args, deadline=math.inf)
    report(tmp_path, tmp_path / "results")
    (result,) = load(tmp_path / "results")
    perplexities = [row for row in result["rows"] if row.metric.startswith("perplexity, RTN")]
    assert perplexities[0].ours == pytest.approx(math.exp(cells["RTN"].nats.mean()))
    assert "groups of 16, calibrated on 6 × 24 tokens" in perplexities[0].metric
    (loss,) = (row for row in result["rows"] if row.metric.startswith(f"{tasks[1]}, RTN"))
    solutions = cells["RTN"].scores[tasks[1]]
    assert loss.ours == pytest.approx(sum(solutions.values) / sum(solutions.weights))
    assert loss.metric.endswith("over 3 items")
    assert "<svg" in (tmp_path / "results/quantization_activations.svg").read_text()


def test_what_is_said_of_the_order(tmp_path, monkeypatch):
    base = np.linspace(2.0, 4.0, 60)
    noise = np.random.default_rng(1).standard_normal(60)
    made = {"RTN": base + 0.2, "GPTQ": base + 0.1 + 0.01 * noise, "P-GPTQ": base + 0.1 - 0.01 * noise}
    made["S-GPTQ"] = base + 0.4 + 0.01 * noise
    write_json(tmp_path / quantization.SETTINGS_FILE, SETTINGS)
    monkeypatch.setattr(quantization, "TASKS", ("right",))
    rng = np.random.default_rng(2)
    right = {"RTN": rng.random(60) < 0.3, "GPTQ": np.ones(60), "P-GPTQ": rng.random(60) < 0.1, "S-GPTQ": np.ones(60)}
    for method, nats in made.items():
        score = Score("acc", True, [float(value) for value in right[method]], [1.0] * 60)
        Measured(nats, {"right": score}, 1.0, {}, ORIGIN).save(tmp_path, method)
    np.savez(tmp_path / quantization.ACTIVATIONS_FILE, values=np.array([[90.0, 8, 7, 6] + [3.0] * 12, [2.0] * 16]))
    report(tmp_path, tmp_path / "results")
    (result,) = load(tmp_path / "results")
    said = {row.metric.split(";")[0] for row in result["rows"] if " against " in row.metric}
    assert said == {
        "text: GPTQ against RTN: better",
        "text: P-GPTQ against GPTQ: no difference is shown",
        "text: S-GPTQ against GPTQ: worse",
        "right: GPTQ against RTN: better",
        "right: P-GPTQ against GPTQ: worse",
        "right: S-GPTQ against GPTQ: no difference is shown",
    }
    assert result["machine"] == {"cpu": "of the cells"}
    (first,) = (row for row in result["rows"] if row.metric == "largest activation before layer 0, token 0")
    assert (first.ours, first.baseline) == (90.0, 3.0)


def test_all_methods_differ():
    settings = list(methods(64).values())
    assert len(set(settings)) == len(settings)
