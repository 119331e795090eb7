"""How what a runtime says is judged: against our decoder, which here plays the runtime too."""

import dataclasses

import jax
import numpy as np
import pytest

from cpm_jax.modeling.decoder import init_params
from export.checks import exact
from export.devices.checks import Said, compare
from export.folders import ExportError
from export.hf_check import greedy, logits_of
from tests.export.devices.test_convert import PLAIN

ROWS = [[5, 17, 200, 3, 9, 41], [7, 7, 301]]


@pytest.fixture(scope="module")
def model():
    config = exact(dataclasses.replace(PLAIN, initializer_range=0.15))
    return config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))


@pytest.fixture(scope="module")
def said(model):
    config, params = model
    return [Said(row, logits_of(config, params, row), greedy(config, params, row, 4)) for row in ROWS]


def changed(said: list[Said], logits: float = 1.0, **fields: object) -> list[Said]:
    return [dataclasses.replace(one, logits=one.logits * logits, **fields) for one in said]


def test_figures(model, said):
    config, params = model
    figures = compare(said, ROWS, params, config, "it", exactly=True).figures
    assert (figures["positions"], figures["greedy_tokens"]) == (9, "8 of 8")
    assert figures["max_error"] <= 1e-5 * figures["largest_logit"]
    figures = compare(changed(said, 0.9), ROWS, params, config, "it", exactly=False).figures
    assert figures["max_error"] == pytest.approx(0.1 * figures["largest_logit"], rel=1e-4)

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        wide = logits.astype(np.float64)
        return wide - np.log(np.exp(wide).sum(-1, keepdims=True))

    ours, theirs = (np.concatenate([log_softmax(f * one.logits) for one in said]) for f in (1.0, 0.9))
    assert figures["kl_divergence"] == pytest.approx((np.exp(ours) * (ours - theirs)).sum(-1).mean(), rel=1e-3)
    followed = [log_softmax(one.logits)[np.arange(len(row) - 1), row[1:]] for one, row in zip(said, ROWS, strict=True)]
    assert figures["perplexity_of_source"] == pytest.approx(np.exp(-np.concatenate(followed).mean()), rel=1e-4)


def test_what_is_not_passed(model, said):
    config, params = model
    with pytest.raises(ExportError, match=r"it gives other logits than we do"):
        compare(changed(said, 1.001), ROWS, params, config, "it", exactly=True)
    with pytest.raises(ExportError, match=r"it gives other logits than we do"):
        compare(changed(said, float("nan")), ROWS, params, config, "it", exactly=True)
    with pytest.raises(ExportError, match=r"chooses tokens of which ours say [\d.]+ less"):
        compare(changed(said, greedy=[1, 2, 3]), ROWS, params, config, "it", exactly=True)
    with pytest.raises(ExportError, match=r"something else than the source, by [\d.]+ nats a token"):
        compare(changed(said, -1.0), ROWS, params, config, "it", exactly=False)
    # Of a type that is not exact, a token that is not ours is counted.
    figures = compare(changed(said, greedy=[1, 2, 3]), ROWS, params, config, "it", exactly=False).figures
    assert figures["greedy_tokens"] == "0 of 6"
