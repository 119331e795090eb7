"""How what a runtime says is judged: against our decoder, which here plays the runtime too."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cpm_jax.modeling.decoder import init_params
from export.checks import exact
from export.devices import checks
from export.devices.checks import Said, compare, verify_device
from export.folders import ExportError
from export.hf_check import greedy, logits_of
from export.manifest import Manifest, RecordedText
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


def test_a_tie_may_be_decided_otherwise_when_verified(tmp_path, monkeypatch):
    """As when it was written: the logits of the recorded text say whether it is one."""
    logits = np.zeros((3, 4), np.float32)
    logits[1, 2], logits[1, 3], logits[2, 0] = 5, 5 - 1e-4, 5
    recorded = RecordedText("code", "a", (1, 2), (2, 0), (2, 3), (5.0, 5.0))
    manifest = Manifest("onnx", "llama", {"float32": 1}, 1, {}, (), (), {}, (recorded,), {}, {}, "", "")
    monkeypatch.setattr(checks, "RUNTIMES", {"onnx": SimpleNamespace(title="it", missing=lambda: "")})
    monkeypatch.setattr(checks, "other_ids", lambda *_: 0)
    monkeypatch.setattr(checks.Tokenizer, "load", lambda _: None)
    said = [Said([1, 2], logits, [3, 1])]
    monkeypatch.setattr(checks, "ask", lambda *_: (said, {}))
    assert "as recorded" in verify_device(tmp_path, manifest)[0][-1]
    for greedy_text in ([1, 0], [2, 1], [2]):
        said[0] = Said([1, 2], logits, greedy_text)
        with pytest.raises(ExportError, match="the text 'code' is continued in another way than was recorded"):
            verify_device(tmp_path, manifest)
