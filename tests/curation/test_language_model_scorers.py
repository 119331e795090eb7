import hashlib
import json

import numpy as np
import pytest
import sklearn.linear_model

from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.curation.classifier import ClassifierConfig, load_classifier, train_classifier
from cpm_jax.curation.language_model_scorers import (
    Embedder,
    EmbeddingClassifier,
    EmbeddingConfig,
    Judge,
    JudgeConfig,
    fit_logistic,
)
from cpm_jax.curation.pools import read_pools
from cpm_jax.tools.openai_client import EndpointError
from tests.evaluation.openai_server import Reply, serve


def embed_by_hash(texts):
    """Counts of words by hash, in the form of the API, out of order as it allows."""
    rows = []
    for index, text in enumerate(texts):
        vector = np.zeros(64)
        for word in text.split():
            vector[hashlib.sha256(word.encode()).digest()[0] % 64] += 1
        rows.append({"index": index, "embedding": vector.tolist()})
    return Reply(200, json.dumps({"data": rows[::-1]}))


def test_fit_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 5))
    labels = vectors @ rng.normal(size=5) + rng.normal(size=200) > 0.5
    weights, bias = fit_logistic(vectors, labels, l2=2.0)
    theirs = sklearn.linear_model.LogisticRegression(C=1 / 2.0, tol=1e-10, max_iter=1000).fit(vectors, labels)
    np.testing.assert_allclose(weights, theirs.coef_[0], atol=1e-4)
    assert bias == pytest.approx(theirs.intercept_[0], abs=1e-4)


def test_judge_rates_and_does_not_ask_twice(tmp_path):
    with serve(lambda prompt: "Rating: 4.0 of 5" if "good {text}" in prompt else "-3") as server:
        judge = Judge(JudgeConfig(server.url, "m"), tmp_path / "replies.sqlite")
        texts = ["a good {text} indeed", "a bad one"]
        assert judge(texts).tolist() == [0.8, 0.0]
        assert judge(texts[::-1]).tolist() == [0.0, 0.8]
        assert len(server.requests) == 2
    # The server is gone; the replies are not.
    assert Judge(JudgeConfig(server.url, "m"), tmp_path / "replies.sqlite")(texts).tolist() == [0.8, 0.0]


def test_judge_that_gives_no_number_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("cpm_jax.tools.openai_client.time.sleep", lambda _: None)
    with serve(lambda prompt: "It is fine.") as server, pytest.raises(EndpointError, match="no number in 'It is fine"):
        Judge(JudgeConfig(server.url, "m"), tmp_path / "replies.sqlite")(["x"])


def test_prompt_needs_the_text():
    with pytest.raises(ConfigError, match=r"JudgeConfig\.prompt: must have \{text\}"):
        JudgeConfig("http://x", "m", prompt="How good?")


def test_embedding_classifier_trains_saves_and_loads(pool_files, tmp_path):
    pools = read_pools([pool_files["prose"]], [pool_files["code"]])
    with serve(embed_by_hash) as server:
        config = ClassifierConfig(scorer=EmbeddingConfig(server.url, "m", l2=0.01, batch_size=16, api_key="secret"))
        result = train_classifier(config, *pools, tmp_path)
        scorer, threshold = load_classifier(tmp_path)
        texts = [document.text for document in pools[0].documents[:20]]
        together = scorer(texts)
        np.testing.assert_array_equal(together, [scorer([text])[0] for text in texts])
    assert result["average_precision"] > 0.75  # chance is 0.61
    assert (together >= threshold).mean() > 0.6
    assert "secret" not in (tmp_path / "classifier.json").read_text()


def test_a_server_that_embeds_too_few_texts_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("cpm_jax.tools.openai_client.time.sleep", lambda _: None)
    with serve(lambda texts: embed_by_hash(texts[:1])) as server:
        embed = Embedder(EmbeddingConfig(server.url, "m"), tmp_path / "replies.sqlite")
        with pytest.raises(EndpointError, match="1 embeddings of 2 texts"):
            embed(["a", "b"])


def test_a_folder_without_a_linear_model_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no linear classifier"):
        EmbeddingClassifier.load(tmp_path, embed_by_hash)
