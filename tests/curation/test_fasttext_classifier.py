"""The classifier beside fastText itself, and the same scores however texts are grouped."""

import functools
import json
import subprocess
import sys

import fasttext
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.curation.fasttext_classifier import FastTextClassifier, FastTextConfig, train
from cpm_jax.curation.text_normalization import TextNormalizer
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.data.workers import ordered_map

SMALL = {"dim": 16, "bucket": 4000, "min_count": 2, "epoch": 20, "lr": 0.5, "vocab_size": 2000, "cutoff": 2000}


@pytest.fixture(scope="module")
def examples(pool_texts):
    pairs = list(zip(pool_texts["prose"], pool_texts["code"], strict=False))
    return [text for pair in pairs for text in pair], np.array([True, False] * len(pairs))


@pytest.fixture(scope="module")
def trained(examples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return folder, train(FastTextConfig(**SMALL), *examples, folder)


def test_the_papers_settings_are_the_defaults():
    config = FastTextConfig()
    assert (config.dim, config.lr, config.word_ngrams, config.min_count, config.epoch) == (256, 0.1, 3, 5, 3)


def test_is_what_fasttext_trains_on_the_same_lines(examples, tmp_path):
    config = FastTextConfig(**SMALL, quantize=False)
    ours = train(config, *examples, tmp_path / "ours").classifier
    lines = TextNormalizer(Tokenizer.load(tmp_path / "ours" / "tokenizer"))(examples[0])
    file = tmp_path / "examples.txt"
    labels = ["__label__pos" if positive else "__label__neg" for positive in examples[1]]
    file.write_text("".join(f"{label} {line}\n" for label, line in zip(labels, lines, strict=True)))
    theirs = fasttext.train_supervised(
        str(file), dim=16, bucket=4000, minCount=2, epoch=20, lr=0.5, wordNgrams=3, thread=1, verbose=0
    )
    found, probabilities = theirs.predict(lines)
    expected = [p[0] if f[0] == "__label__pos" else 1 - p[0] for f, p in zip(found, probabilities, strict=True)]
    np.testing.assert_allclose(ours(examples[0]), np.clip(expected, 0, 1), atol=1e-7)


def test_scores_do_not_depend_on_how_texts_are_grouped(trained, examples):
    folder, _ = trained
    texts = [*examples[0][:60], "", "只有中文的一段文字。", "__label__neg __label__pos"]
    classifier = FastTextClassifier.load(folder)
    together = classifier(texts)
    np.testing.assert_array_equal(together, [classifier([text])[0] for text in texts])
    np.testing.assert_array_equal(together[::-1], classifier(texts[::-1]))
    batches = [(None, texts[i : i + 7]) for i in range(0, len(texts), 7)]
    pooled = ordered_map(functools.partial(FastTextClassifier.load, folder), batches, num_workers=2)
    np.testing.assert_array_equal(together, np.concatenate([scores for _, scores in pooled]))


def test_scores_are_those_of_another_process(trained, examples):
    folder, result = trained
    program = (
        "import json, sys; from cpm_jax.curation.fasttext_classifier import FastTextClassifier;"
        "print(json.dumps(FastTextClassifier.load(sys.argv[1])(json.load(sys.stdin)).tolist()))"
    )
    command = [sys.executable, "-c", program, folder]
    said = subprocess.run(command, input=json.dumps(examples[0][:20]), capture_output=True, text=True, check=True)
    assert json.loads(said.stdout) == result.classifier(examples[0][:20]).tolist()


def test_one_thread_trains_the_same_model_twice(trained, examples, tmp_path):
    train(FastTextConfig(**SMALL), *examples, tmp_path)
    assert (tmp_path / "model.ftz").read_bytes() == (trained[0] / "model.ftz").read_bytes()


def test_quantised_model_is_small_and_agrees(trained, examples):
    folder, result = trained
    small, full = result.classifier(examples[0]), result.full(examples[0])
    assert ((small >= 0.5) == (full >= 0.5)).mean() > 0.95
    assert (folder / "model.ftz").stat().st_size < 200_000


def test_log_odds_are_the_mean_of_pulls(examples, tmp_path):
    config = FastTextConfig(**SMALL | {"word_ngrams": 1}, quantize=False)
    classifier = train(config, *examples, tmp_path).classifier
    words = {w.word: w.pull for side in classifier.deciding_words(10**6) for w in side}
    mild = sorted((word for word in words if word != "</s>"), key=lambda word: abs(words[word]))
    line = " ".join(mild[:40:4])
    probability = classifier.score_lines([line])[0]
    pulls = [words[word] for word in line.split()] + [words["</s>"]]  # fastText ends each line with </s>
    assert np.log(probability / (1 - probability)) == pytest.approx(np.mean(pulls), abs=0.02)


def test_words_that_decide_are_words_of_their_class(trained, examples):
    positive, negative = trained[1].words
    assert "self" in {w.word for w in negative}
    assert all(w.pull > 0 for w in positive)
    assert all(w.pull < 0 for w in negative)


def test_wrong_settings_and_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"FastTextConfig\.cutoff = 5: must be 0, or at least 256"):
        FastTextConfig(cutoff=5)
    with pytest.raises(InputError, match=r"holds no model\.ftz and no model\.bin"):
        FastTextClassifier.load(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"model\.bin cannot be read as a fastText model"):
        FastTextClassifier.load(tmp_path)


@pytest.mark.parametrize("labels", [("__label__good", "__label__bad"), ("__label__pos",)])
def test_a_model_with_other_labels_is_named(tmp_path, labels):
    """One that was made elsewhere, or of one class only."""
    (tmp_path / "examples.txt").write_text("".join(f"{label} some words of a text\n" for label in labels * 5))
    model = fasttext.train_supervised(str(tmp_path / "examples.txt"), dim=2, minCount=1, thread=1, verbose=0)
    model.save_model(str(tmp_path / "model.bin"))
    with pytest.raises(InputError, match=r"model\.bin has the labels \[.*\]: expected __label__pos and __label__neg"):
        FastTextClassifier.load(tmp_path)


def test_examples_without_a_frequent_word_are_an_error(tmp_path):
    config = FastTextConfig(**SMALL | {"min_count": 1000})
    with pytest.raises(
        InputError, match=r"FastTextConfig\.min_count = 1000: no word of the 2 examples occurs so often"
    ):
        train(config, ["one text", "another"], np.array([True, False]), tmp_path)
