"""The study of ScalingBench: its problems and rows, its analysis of values whose answer is known, and a tiny run."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.stats

from benchmarks import results, scaling_bench, scaling_bench_report
from benchmarks.scaling_bench_report import ALL, Measured, Study, ordering, pairs_in_order, repeated, spearman
from benchmarks.scaling_bench_texts import (
    BARE,
    FAMILIES,
    TASKS,
    WRONG,
    answer_of,
    draw,
    held_out_problems,
    make_batch,
    training_texts,
)

RECIPES = np.linspace(0.0, 1.0, 12)  # how good each is


@pytest.fixture(scope="module")
def texts():
    test = held_out_problems("short", 5)
    return training_texts("short", 50, test), test


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("solutions", FAMILIES)
def test_steps_are_right_and_lead_to_the_answer(solutions, task):
    """Each equation by Python's own arithmetic; `draw` itself holds the last against Reasoning Gym's answer."""
    for solved in draw(solutions, task, 50, 3):
        steps = solved.reasoning.split(";")
        for step in steps:
            expression, _, value = step.rpartition("=")
            assert eval(expression) == int(value)
        assert steps[-1].endswith(f"={solved.answer}")
    if task != "legs":
        assert all(eval(solved.question) == int(solved.answer) for solved in draw(solutions, task, 50, 3))


@pytest.mark.parametrize("solutions", FAMILIES)
def test_problems_fit_into_a_row_and_solutions_into_an_output(solutions):
    size = scaling_bench.SIZES[solutions]
    drawn = {task: draw(solutions, task, 200, 5) for task in TASKS}
    tokenizer = training_texts(solutions, 200, {task: [] for task in TASKS}).tokenizer
    for solved in drawn.values():
        asked, given = (
            tokenizer.encode_batch([getattr(one, name) for one in solved]) for name in ("context", "continuation")
        )
        assert max(map(len, given)) < size.answer_tokens
        assert max(map(len, asked)) + size.answer_tokens <= scaling_bench.MODEL.max_position_embeddings
        assert max(len(a) + len(b) for a, b in zip(asked, given, strict=True)) < size.seq_len


def test_a_solution_that_misses_the_answer_is_refused(monkeypatch):
    family = FAMILIES["short"]["one digit"]._replace(solve=lambda metadata: ("1+1", "1+1=3", 3))
    monkeypatch.setitem(FAMILIES["short"], "one digit", family)
    with pytest.raises(ValueError, match=r"one digit: '1\+1' is worked out as 3, and is"):
        draw("short", "one digit", 3, 0)


def test_no_test_problem_is_trained_on():
    """Of two terms of two digits few are drawn twice by chance: here the same seed draws all of them again."""
    drawn = {task: draw("short", task, 30, 0)[:10] for task in TASKS}
    texts = training_texts("short", 30, drawn)
    for task, solved in drawn.items():
        text = texts.tokenizer.decode(texts.streams[task].tokens)
        assert solved
        assert not any(one.context in text for one in solved)
        assert len(text) > 500


def test_rows_are_whole_tokens_of_their_documents(texts):
    (tokenizer, streams), _ = texts
    batch = make_batch(streams, {"one digit": 1.0}, 4, 64, np.random.default_rng(0))
    shape = (4, 64)
    assert {array.shape for name, array in batch.items() if name != "source_ids"} == {shape}
    assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()
    begins = batch["tokens"] == tokenizer.bos_id
    assert begins.any()
    assert (batch["positions"][begins] == 0).all()
    assert begins[:, 0].all()
    pairs = zip(batch["targets"], batch["loss_weights"], strict=True)
    solutions = [tokenizer.decode(targets[weights > 0]) for targets, weights in pairs]
    assert all(re.match(r" -?\d+[+-]\d=.*\nThe answer is -?\d+</s>", solution) for solution in solutions)
    new = np.diff(batch["segment_ids"], axis=1, prepend=1) == 1
    assert (new[:, 1:] == begins[:, 1:]).all()


def test_mixtures_have_their_shares(texts):
    (tokenizer, streams), _ = texts
    batch = make_batch(streams, {"two digits": 3.0, "text": 1.0}, 400, 64, np.random.default_rng(1))
    asked = [" is" in tokenizer.decode(row) and "Question" in tokenizer.decode(row) for row in batch["tokens"]]
    assert np.mean(asked) == pytest.approx(0.75, abs=0.07)


def test_spoilt_problems(texts):
    (tokenizer, streams), _ = texts
    bare = tokenizer.decode(streams[BARE].tokens, skip_special_tokens=True)
    assert "Question:" in bare
    assert "The answer is" not in bare
    wrong = tokenizer.decode(streams[WRONG].tokens).split("<s>")[1:]
    fits = 0
    for document in wrong:
        question, _, solution = document.partition("\nAnswer: ")
        fits += solution.startswith(question.removeprefix("Question: ")[:3])
    assert len(wrong) > 100
    assert fits < len(wrong) / 4


@pytest.mark.parametrize(
    ("output", "answer"),
    [(" 3+4=7\nThe answer is 7", "7"), (" -12", "-12"), (" 1+1=2\nThe answer is 2\nThe", "2"), ("The answer is", "")],
)
def test_answers_are_found(output, answer):
    assert answer_of(output) == answer


def test_measures_of_order_agree_with_scipy():
    rng = np.random.default_rng(0)
    predicted, truth = rng.integers(0, 6, (2, 20, 12)).astype(float)
    truth += rng.random(truth.shape) * 1e-3  # ties of the prediction alone: there τ-a and the share are one
    for a, b, rho, share in zip(
        predicted, truth, spearman(predicted, truth), pairs_in_order(predicted, truth), strict=True
    ):
        assert rho == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
        i, j = np.triu_indices(12, 1)
        tau_a = np.mean(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]))
        assert share == pytest.approx((1 + tau_a) / 2)
    assert spearman(np.zeros(5), np.arange(5.0)) == 0
    assert pairs_in_order(np.zeros(5), np.arange(5.0)) == 0.5


def made(noise_loss, noise_accuracy, seeds=4, seed=0):
    """Models whose loss and accuracy are as good as their recipe, but for noise."""
    rng = np.random.default_rng(seed)
    shape = (len(RECIPES), seeds)
    loss = 2 - RECIPES[:, None] + noise_loss * rng.normal(size=shape)
    accuracy = np.clip(0.1 + 0.5 * RECIPES[:, None] + noise_accuracy * rng.normal(size=shape), 0, 1)
    return Measured(loss, accuracy)


@pytest.mark.parametrize(
    ("noise_loss", "noise_accuracy", "verdicts"),
    [
        (0.01, 0.3, {"holds"}),
        (1.0, 0.005, {"not at this scale"}),
        (0.1, 0.055, {"direction only", "not at this scale"}),
    ],
)
def test_the_verdict_follows_the_noise(noise_loss, noise_accuracy, verdicts):
    large = made(0.0, 0.005, seeds=3, seed=1)
    found = ordering(made(noise_loss, noise_accuracy), large, pairs_in_order, draws=300)
    assert found.verdict in verdicts
    assert found.difference.value == pytest.approx(found.loss.value - found.accuracy.value)
    for interval in found:
        assert interval.low <= interval.value <= interval.high + 0.02  # a recipe that is drawn twice makes no pair


def test_measures_that_are_one_differ_by_nothing():
    """Accuracy that is a function of the loss: whatever is drawn, the order is the same."""
    small = made(0.2, 0.0)
    same = Measured(small.loss, 1 / (1 + np.exp(small.loss)))
    found = ordering(same, made(0.0, 0.01, seeds=3, seed=1), spearman, draws=200)
    assert tuple(found.difference) == (0, 0, 0)
    assert found.verdict == "not at this scale"


def test_larger_models_that_agree_repeat_their_order():
    assert repeated(made(0, 0.0, seeds=3), pairs_in_order) == 1
    assert 0.4 < repeated(made(0, 0.2, seeds=3), pairs_in_order) < 0.95


def test_items_are_taken_together_as_evaluate_does():
    """Losses weigh items by their tokens, accuracies all alike, and tasks all alike."""
    one = {"nll": [2.0, 6.0], "tokens": [1, 3], "right": [1, 0]}
    other = {"nll": [1.0, 1.0], "tokens": [4, 4], "right": [1, 1]}
    cells = {(width, seed): {"a": {"s": one, "t": other}} for width in (8, 16) for seed in (0, 1)}
    study = Study.of(cells, (8,), 16)
    assert study.large["s"].loss.tolist() == [[2.0, 2.0]]
    assert study.small[8][ALL].loss.tolist() == [[1.125, 1.125]]
    assert study.small[8][ALL].accuracy.tolist() == [[0.75, 0.75]]


def test_the_law_of_small_models_finds_larger_ones_that_obey_it():
    def at(middle, seed):
        rng = np.random.default_rng(seed)
        loss = middle + 0.5 * rng.random((12, 4))
        noise = 0.01 * rng.normal(size=loss.shape)  # reaches neither 0 nor 1, where it would be cut off
        return {ALL: Measured(loss, 1 / (1 + np.exp(6 * (loss - 0.8))) + noise)}

    study = Study(list("abcdefghijkl"), {16: at(0.6, 0), 32: at(0.5, 1)}, {}, at(0.4, 2), 64)
    law = scaling_bench_report.law_of(study, ALL)
    assert law is not None
    assert (law.coefficients["gamma"], law.coefficients["middle"]) == pytest.approx((6, 0.8), rel=0.05)
    checked = scaling_bench_report.held_out(study, ALL, law)
    assert len(checked) == 48
    assert np.mean([one.covered for one in checked]) > 0.9 - 3 * np.sqrt(0.9 * 0.1 / 48)


@pytest.mark.slow
def test_a_tiny_study_from_end_to_end(tmp_path, monkeypatch):
    """Trained, measured, written down; and what is measured is not trained again."""
    monkeypatch.setattr(scaling_bench_report, "IMAGES", tmp_path / "images")
    write, written = results.Benchmark.write, []
    monkeypatch.setattr(results.Benchmark, "write", lambda bench: written.append(write(bench, tmp_path).read_text()))
    few = dict(list(scaling_bench.RECIPES.items())[:3])
    monkeypatch.setattr(scaling_bench, "RECIPES", few)
    monkeypatch.setattr(scaling_bench, "process_on_each_core", lambda: ThreadPoolExecutor(1))
    arguments = ["--work", str(tmp_path / "work"), "--solutions", "smoke"]
    scaling_bench.main(arguments)
    (found,) = results.load(tmp_path)
    assert found["name"].endswith("scaling_bench_smoke")
    assert any("Spearman" in row.metric for row in found["rows"])
    assert (tmp_path / "images" / "scaling_bench_smoke.svg").exists()
    monkeypatch.setattr(scaling_bench, "run_cell", lambda *args: pytest.fail("a cell is measured twice"))
    scaling_bench.main(arguments)
    assert json.loads(written[0])["rows"] == json.loads(written[1])["rows"]
