"""The rows of the recall study, what its variants can see, and that a cut-off training goes on unchanged."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from benchmarks import sparse_recall
from benchmarks.recall_data import (
    LONG_VOCABULARY,
    RecallTask,
    Vocabulary,
    long_task,
    make_batch,
    make_tokens,
    write_dataset,
)
from cpm_jax.checkpoints.manager import restore_params
from cpm_jax.data.loader import make_loader, open_datasets
from cpm_jax.data.mixture import from_folders
from cpm_jax.modeling import decoder

WORDS = Vocabulary()
TASKS = {
    "fixed": RecallTask(200, 16, 16, gap=60),
    "varying": RecallTask(200, (1, 32), 16, gap=40),
    "needle": RecallTask(512, 1, 1, gap=192),
    "full": RecallTask(64, 8, 8, gap=20, head=10),
    "repeated": RecallTask(96, (2, 4), 24, repeat=True),
}


def is_key(tokens):
    return (tokens >= 1) & (tokens < WORDS.first_value)


def is_value(tokens):
    return (tokens >= WORDS.first_value) & (tokens < WORDS.first_filler)


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_is_the_value_beside_its_key_in_the_haystack(name):
    task = TASKS[name]
    tokens, answers = make_tokens(task, 50, "train", 0, 0)
    numbers = set()
    for row, answer in zip(tokens, answers, strict=True):
        haystack = row[: task.first_question]
        keys = np.flatnonzero(is_key(haystack))
        pairs = dict(zip(haystack[keys], haystack[keys + 1], strict=True))
        assert len(pairs) == len(keys) == len(set(pairs.values())), "a key or a value stands twice"
        assert is_value(haystack).sum() == len(pairs)
        assert all(is_value(x) for x in pairs.values())
        assert keys.min() >= task.head
        assert keys.max() + 1 < task.first_question - task.gap
        asked = np.flatnonzero(answer) - 1
        assert len(asked) == (task.num_queries if task.repeat else min(task.num_queries, len(pairs)))
        assert [pairs[row[at]] for at in asked] == list(row[asked + 1])
        assert task.repeat or len(set(row[asked])) == len(asked), "an answer could be copied from an earlier one"
        # Nothing else is a question: what lies before the questions is filler.
        rest = np.delete(row[task.first_question :], np.r_[asked, asked + 1] - task.first_question)
        assert not is_key(rest).any()
        assert not is_value(rest).any()
        numbers.add(len(pairs))
    assert numbers == set(range(task.pairs[0], task.pairs[1] + 1)) or len(numbers) > 15


def test_pairs_lie_anywhere_and_questions_come_in_any_order():
    task = RecallTask(41, 2, 2, gap=4, head=3)
    tokens, _ = make_tokens(task, 2000, "train", 0, 0)
    places = np.flatnonzero(is_key(tokens[:, : task.first_question]).any(axis=0))
    assert list(places) == list(range(3, task.first_question - 4 - 1))
    in_order = [
        np.flatnonzero(row == row[task.first_question])[0] < np.flatnonzero(row == row[task.first_question + 2])[0]
        for row in tokens
    ]
    assert 0.45 < np.mean(in_order) < 0.55


def test_repeated_questions_do_not_tell_the_next_one():
    task = RecallTask(16, 2, 2, head=1, repeat=True)
    tokens, _ = make_tokens(task, 2000, "train", 0, 0)
    first, second = tokens[:, task.first_question], tokens[:, task.first_question + 2]
    assert 0.45 < np.mean(first == second) < 0.55


def test_copying_adds_the_token_before_as_a_target_and_leaves_the_answers():
    task = TASKS["fixed"]
    plain = make_batch(task, 8, "train", 0, 0)
    copying = make_batch(dataclasses.replace(task, copy_weight=0.25), 8, "train", 0, 0)
    answers = plain["loss_weights"] > 0
    np.testing.assert_array_equal(copying["loss_weights"], np.where(answers, 1.0, 0.25))
    np.testing.assert_array_equal(copying["targets"][answers], plain["targets"][answers])
    others = ~answers[:, 1:]
    np.testing.assert_array_equal(copying["targets"][:, 1:][others], plain["tokens"][:, :-1][others])


def test_rows_are_a_function_of_split_seed_and_index_and_none_is_drawn_twice():
    task = TASKS["fixed"]
    first = make_batch(task, 8, "train", 3, 7)
    again = make_batch(task, 8, "train", 3, 7)
    assert all((first[key] == again[key]).all() for key in first)
    assert (first["tokens"][:, 1:] == first["targets"][:, :-1]).all()
    rows = [
        row.tobytes()
        for split in ("train", "validation", "test")
        for seed in range(3)
        for index in range(20)
        for row in make_tokens(task, 8, split, seed, index)[0]
    ]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_pairs": 33}, "RecallTask.num_pairs = 33: must be from 1 to the vocabulary's 32"),
        ({"num_pairs": (3, 2)}, "RecallTask.num_pairs"),
        ({"num_queries": 0}, "RecallTask.num_queries = 0"),
        ({"head": 0}, "RecallTask.head = 0"),
        ({"gap": 150}, "RecallTask.seq_len = 200: .* must hold 16"),
    ],
)
def test_rows_that_cannot_be_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        RecallTask(**{"seq_len": 200, **changes})


def test_no_variant_has_a_larger_budget_than_another():
    configs = [config for config in sparse_recall.VARIANTS.values() if config is not None]
    assert {config.selection.num_selected * config.block_size for config in configs} == {96}
    with pytest.raises(ValueError, match="13 blocks, must be 12"):
        sparse_recall.sparse(topk=9)


def test_the_sliding_window_cannot_see_the_pairs_and_the_others_can():
    task = sparse_recall.TASKS["recall"](512)
    batch = make_batch(task, 2, "test", 0, 0)
    # Other values beside the keys of the haystack; the questions stay as they were.
    other = batch["tokens"].copy()
    haystack = other[:, : task.first_question]
    haystack[is_value(haystack)] = WORDS.first_filler - 1 - (haystack[is_value(haystack)] - WORDS.first_value)
    assert (other != batch["tokens"]).sum() > 20

    def questions(name, tokens):
        model = dataclasses.replace(sparse_recall.MODEL, sparse_config=sparse_recall.VARIANTS[name])
        params = decoder.init_params(model, jax.random.key(1))
        rest = batch["positions"], batch["segment_ids"]
        hidden = jax.jit(lambda tokens: decoder.bind(model, params)(tokens, *rest))(tokens)
        return np.asarray(hidden)[:, task.first_question :]

    def change(name):
        return np.abs(questions(name, other) - questions(name, batch["tokens"])).max()

    assert change(sparse_recall.WINDOW) == 0.0
    assert change(sparse_recall.FULL) > 1e-3
    assert change(sparse_recall.INFLLM) > 1e-3


@pytest.fixture
def cell():
    return sparse_recall.Cell("cell", RecallTask(32, 4, 4), "", 0, None, steps=6, tokens=128)


def test_a_training_that_was_cut_off_goes_on_as_if_it_had_not_been(cell, tmp_path, monkeypatch):
    sparse_recall.train(cell, tmp_path / "whole", checkpoint_every=2)

    def killed(task, rows, split, seed, index):
        if split == "train" and index == 3:
            raise KeyboardInterrupt
        return make_batch(task, rows, split, seed, index)

    with monkeypatch.context() as patch:
        patch.setattr(sparse_recall, "make_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            sparse_recall.train(cell, tmp_path / "cut", checkpoint_every=2)
    assert not (tmp_path / "cut" / "cell" / "training.json").exists()
    result = sparse_recall.train(cell, tmp_path / "cut", checkpoint_every=2)
    assert result["steps"] == 6
    whole, cut = (restore_params(tmp_path / side / "cell" / "checkpoints")[0] for side in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)

    # Cut off between its last checkpoint and the note that it is done.
    (tmp_path / "cut" / "cell" / "training.json").unlink()
    again = sparse_recall.train(cell, tmp_path / "cut")
    assert (again["steps"], again["validation"]) == (result["steps"], result["validation"])

    def never(*_, **__):
        raise AssertionError("what is done was done again")

    monkeypatch.setattr(sparse_recall, "make_train_step", never)
    assert sparse_recall.train(cell, tmp_path / "cut") == again


def test_a_variant_starts_from_the_dense_parameters_and_is_evaluated_once(cell, tmp_path, monkeypatch):
    sparse_recall.train(cell, tmp_path)
    after = dataclasses.replace(cell, name="after", start="cell", steps=1, peak_lr=1e-30)
    sparse_recall.train(after, tmp_path)
    before, then = (restore_params(tmp_path / name / "checkpoints")[0] for name in ("cell", "after"))
    jax.tree.map(np.testing.assert_array_equal, before, then)
    monkeypatch.setattr(sparse_recall, "TASKS", {"recall": lambda length: RecallTask(length, 4, 4)})
    found = sparse_recall.evaluate(after, tmp_path, 10)
    assert 0 <= found["recall"] <= 1
    assert json.loads((tmp_path / "after" / "accuracy_10.json").read_text()) == found


def test_a_cell_ends_when_it_is_right_often_enough(cell, tmp_path):
    easy = dataclasses.replace(cell, stop_at=0.0)
    assert sparse_recall.train(easy, tmp_path, checkpoint_every=2)["steps"] == 2


def test_the_study_trains_a_dense_model_before_what_starts_from_it():
    cells = sparse_recall.study(2, [512, 1024], [512], 10)
    done = {""}
    for cell in cells:
        assert cell.start in done
        done.add(cell.name)
    assert len(done) == len(cells) + 1
    assert sum(cell.stop_at is None for cell in cells) == 2 * (len(sparse_recall.VARIANTS) + len(sparse_recall.MAIN))


def test_the_report_says_which_goals_are_missed(tmp_path, capsys):
    accuracies = {
        (512, "recall", sparse_recall.FULL): [97.0, 96.0],
        (512, "recall", sparse_recall.INFLLM): [94.0, 93.0],
        (512, "recall", sparse_recall.WINDOW): [2.0, 4.0],
    }
    sparse_recall.report(accuracies, tmp_path)
    rows = {row["metric"]: row for row in json.loads((tmp_path / "sparse_recall.json").read_text())["rows"]}
    assert rows["512 tokens, recall, full attention: right answers, mean of 2 seeds"]["met"] is True
    below = rows["512 tokens, recall: InfLLM v2 below full attention"]
    assert below["ours"] == 3.0
    assert below["met"] is False
    assert (tmp_path / "sparse_recall_512.svg").read_text().startswith("<svg")
    assert "| sliding window and first block | 3.0 ± 1.4 |" in sparse_recall.markdown(accuracies)


def test_a_written_dataset_gives_the_same_rows_to_pretrain(tmp_path):
    task = dataclasses.replace(TASKS["varying"], seq_len=160)
    write_dataset(tmp_path, task, 100, copies=0.25, seed=5)
    mixture = from_folders(str(tmp_path))
    [dataset] = open_datasets(mixture)
    assert dataset.manifest.vocab_size == WORDS.size
    assert dataset.manifest.splits["validation"].records == 64
    dataset.manifest.verify(tmp_path)
    loader = make_loader(mixture, 100, seed=0, start_step=0, process_index=0, process_count=1, num_workers=0)
    batch = next(iter(loader))
    drawn = [make_tokens(task, 64, "train", 5, 0), make_tokens(task, 36, "train", 5, 1)]
    expected = {row.tobytes(): mask for tokens, answers in drawn for row, mask in zip(tokens, answers, strict=True)}
    copies = 0
    for row in range(100):
        tokens = np.append(batch["tokens"][row], batch["targets"][row, -1])
        weights, targets = batch["loss_weights"][row], batch["targets"][row]
        if batch["segment_ids"][row, -1] == 1:
            np.testing.assert_array_equal(weights, expected[tokens.tobytes()][1:])
            continue
        copies += 1
        learned = np.flatnonzero(weights)
        assert list(learned) == list(range(1, 160, 3))
        np.testing.assert_array_equal(targets[learned], tokens[learned - 1])
        assert set(batch["positions"][row]) == {0, 1, 2}
    assert copies == 25


@pytest.mark.parametrize("seq_len", [16, 128, 2048, 8192, 32768])
def test_rows_for_longer_models_fit_their_vocabulary(seq_len):
    tokens, answers = make_tokens(long_task(seq_len), 2, "train", 0, 0)
    assert tokens.max() < LONG_VOCABULARY.size == 1281
    assert answers.any(axis=1).all()
