"""Figures and their standard errors against lm-eval's and against the closed form; items on disk."""

import json

import numpy as np
import pytest
from lm_eval.api.metrics import mean_stderr

from cpm_jax.evaluation.bits_per_byte import summarise
from cpm_jax.evaluation.documents import Documents
from cpm_jax.evaluation.errors import ResumeError
from cpm_jax.evaluation.results import Item, ItemWriter, Measured, estimates, items_path, ratio, read_items


def item(index, value=1.0, weight=1.0, **fields):
    given = {"doc_hash": "h", "prompt": "p", "choices": (), "target": "t", "responses": ("x",)}
    return Item(index=index, metrics={"m": Measured(value, weight)}, **given | fields)


def test_a_mean_has_lm_evals_standard_error():
    values = np.random.default_rng(0).random(50)
    found = ratio(values, np.ones(50))
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(mean_stderr(values))
    assert found.n == 50


def test_a_ratio_has_that_of_bits_per_byte():
    rng = np.random.default_rng(1)
    texts = ["x" * size for size in rng.integers(1, 400, 30)]
    bits = np.array([2.0 * len(text) * factor for text, factor in zip(texts, rng.random(30), strict=True)])
    known = summarise(bits, Documents([np.zeros(2, np.uint32)] * 30, texts, sum(map(len, texts))))
    found = ratio(bits, np.array([len(text) for text in texts], float))
    assert (found.value, found.standard_error) == pytest.approx((known.value, known.standard_error))


def test_the_standard_error_is_the_spread_over_samples():
    rng = np.random.default_rng(2)
    weights = rng.integers(10, 500, (4000, 40)).astype(float)
    values = weights * rng.normal(2.0, 0.3, weights.shape)
    found = [ratio(*sample) for sample in zip(values, weights, strict=True)]
    spread = np.std([estimate.value for estimate in found])
    assert np.mean([estimate.standard_error for estimate in found]) == pytest.approx(spread, rel=0.05)


def test_one_item_has_no_standard_error():
    assert estimates([item(0, 0.5)])["m"] == (0.5, None, 1)
    assert estimates([]) == {}


def test_items_come_back_as_they_were(tmp_path):
    path = items_path(tmp_path, "reasoning_gym:chain_sum")
    assert path.name == "reasoning_gym.chain_sum.jsonl"
    written = [
        item(3, prompt="日本\u2028\n", responses=([-1.5, True], [-2.0, False]), choices=(" a", " b"), truncated=True),
        item(1, responses=("lone \udc80 surrogate",)),
    ]
    with ItemWriter(path, ()) as writer:
        writer.write(written[:1])
        writer.write(written[1:])
    assert read_items(path) == {one.index: one for one in written}


def test_what_a_kill_cut_short_is_left_out_and_written_over(tmp_path):
    path = tmp_path / "t.jsonl"
    with ItemWriter(path, ()) as writer:
        writer.write([item(0), item(1)])
    whole = path.read_text()
    for cut in range(1, len(whole)):
        path.write_text(whole[:cut])
        assert set(read_items(path)) == set(range(whole[:cut].count("\n")))
    with ItemWriter(path, read_items(path).values()) as writer:
        writer.write([item(1)])
    assert path.read_text() == whole


@pytest.mark.parametrize("line", ["[]", "{", '{"index": 1}', json.dumps({"metrics": {"m": [1, 2, 3]}})])
def test_a_line_that_is_no_item_is_named(tmp_path, line):
    path = tmp_path / "t.jsonl"
    with ItemWriter(path, ()) as writer:
        writer.write([item(0)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ResumeError, match=r"t.jsonl:2 is not an item of an evaluation"):
        read_items(path)
