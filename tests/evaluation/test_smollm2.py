"""SmolLM2-135M-Instruct through our adapter and lm-eval's own, item by item (more in benchmarks/evaluate.py)."""

import pytest
import transformers

from benchmarks.evaluate import adapters, largest_difference, run, write_texts
from benchmarks.pretrained import smollm2_path
from cpm_jax.inference.load import load_model


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    return adapters(load_model(smollm2_path()), tmp_path_factory.mktemp("hf"))


@pytest.mark.slow
@pytest.mark.parametrize(("chat", "items"), [(False, 4), (True, 2)])
def test_likelihoods_and_decisions_are_equal(sides, chat, items):
    ours, theirs = (run(lm, "hellaswag_sample", items, chat=chat)[0] for lm in sides)
    assert largest_difference(ours, theirs) < 1
    assert [item.metrics for item in ours] == [item.metrics for item in theirs]
    assert [[greedy for _, greedy in item.responses] for item in ours] == [
        [greedy for _, greedy in item.responses] for item in theirs
    ]


@pytest.mark.slow
def test_texts_are_equally_probable(sides, tmp_path):
    ours, theirs = (run(lm, str(write_texts(tmp_path)), 2, chat=False)[0] for lm in sides)
    assert largest_difference(ours, theirs) < 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chat"), [("reasoning_gym:chain_sum", True), ("humaneval", False)])
def test_outputs_are_equal(sides, name, chat, monkeypatch):
    monkeypatch.setattr("benchmarks.evaluate.MAX_GEN_TOKENS", 16)
    ours, theirs = (run(lm, name, 2, chat=chat)[0] for lm in sides)
    assert [item.responses for item in ours] == [item.responses for item in theirs]
    assert [item.prompt for item in ours] == [item.prompt for item in theirs]
    assert any(item.responses[0] for item in ours)
