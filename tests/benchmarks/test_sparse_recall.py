"""The rows of the recall study, what its variants can see, and that a cut-off training goes on unchanged."""

import dataclasses
import functools
import itertools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import recall_data, sparse_recall, sparse_recall_report
from benchmarks.custom_attention import attention_by_config, hidden_states
from benchmarks.recall_data import LONG_VOCABULARY, RecallTask, Vocabulary, batch_key, long_task
from benchmarks.recall_dataset import write_dataset
from benchmarks.results import Benchmark
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


@functools.partial(jax.jit, static_argnums=(0, 1))
def drawn(task, rows, key):
    return recall_data.make_tokens(task, rows, key)


def make_tokens(task, rows, split, seed, index):
    return tuple(map(np.array, drawn(task, rows, batch_key(split, seed, index))))


def make_batch(task, rows, split, seed, index):
    return {name: np.array(x) for name, x in recall_data.make_batch(task, rows, batch_key(split, seed, index)).items()}


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
        positions = np.broadcast_to(np.arange(512), tokens.shape)
        rest = positions, np.ones_like(positions)
        hidden = jax.jit(lambda tokens: decoder.bind(model, params)(tokens, *rest))(tokens)
        return np.asarray(hidden)[:, task.first_question :]

    def change(name):
        return np.abs(questions(name, other) - questions(name, batch["tokens"])).max()

    assert change(sparse_recall.WINDOW) == 0.0
    assert change(sparse_recall.FULL) > 1e-3
    assert change(sparse_recall.INFLLM) > 1e-3


@pytest.mark.parametrize("name", [sparse_recall.FULL, sparse_recall.INFLLM])
def test_the_study_computes_what_the_decoder_computes(name):
    config = dataclasses.replace(sparse_recall.MODEL, sparse_config=sparse_recall.VARIANTS[name])
    params = decoder.init_params(config, jax.random.key(1))
    tokens = make_batch(sparse_recall.TASKS["recall"](512), 2, "test", 0, 0)["tokens"]
    positions = np.broadcast_to(np.arange(512), tokens.shape)
    attend = attention_by_config(config.sparse_config, "reference")
    ours = jax.jit(lambda tokens: hidden_states(decoder.bind(config, params), tokens, attend)[0])(tokens)
    theirs = jax.jit(lambda tokens: decoder.bind(config, params)(tokens, positions, np.ones_like(positions)))(tokens)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


@pytest.fixture
def cell(monkeypatch):
    monkeypatch.setattr(sparse_recall, "CHUNK", 2)
    return sparse_recall.Cell("cell", RecallTask(32, 4, 4), "", None, steps=6, tokens=128)


@pytest.fixture(scope="module")
def programs():
    with sparse_recall.Programs(2) as programs:
        yield programs


def params_of(work, name="cell"):
    return restore_params(work / name / "checkpoints")[0]


def test_a_training_that_time_ended_goes_on_as_if_it_had_not(cell, tmp_path, monkeypatch, programs):
    whole = sparse_recall.train(cell, tmp_path / "whole", programs)
    times = itertools.chain([0.0, 0.0, 0.0], itertools.repeat(9.0))
    with monkeypatch.context() as patch:
        patch.setattr(sparse_recall, "time", SimpleNamespace(monotonic=lambda: next(times)))
        with pytest.raises(sparse_recall.OutOfTimeError):
            sparse_recall.train(cell, tmp_path / "cut", programs, deadline=5.0)
    assert not (tmp_path / "cut" / "cell" / "training.json").exists()
    result = sparse_recall.train(cell, tmp_path / "cut", programs)
    assert result["steps"] == 6
    assert [step for step, _ in result["curve"]] == [2, 4, 6]
    assert result["curve"] == whole["curve"]
    assert result["machine"]["platform"] == jax.default_backend()
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / "whole"), params_of(tmp_path / "cut"))

    def never(*_, **__):
        raise AssertionError("what is done was done again")

    monkeypatch.setattr(sparse_recall, "Checkpointer", never)
    assert sparse_recall.train(cell, tmp_path / "cut", programs) == result


def test_the_last_step_may_be_saved_when_its_time_comes(cell, tmp_path, monkeypatch, programs):
    monkeypatch.setattr(sparse_recall, "SAVE_EVERY", -1.0)
    result = sparse_recall.train(cell, tmp_path, programs)
    (tmp_path / "cell" / "training.json").unlink()  # as if it had been killed before that was written
    assert sparse_recall.train(cell, tmp_path, programs)["curve"] == result["curve"]


def test_seeds_that_run_together_are_those_that_run_alone(cell, tmp_path, programs):
    sparse_recall.train(cell, tmp_path / "two", programs)
    with sparse_recall.Programs(1) as one:
        one.seeds = jnp.array([1])
        sparse_recall.train(cell, tmp_path / "one", one)
    both, alone = params_of(tmp_path / "two"), params_of(tmp_path / "one")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x[1], y[0], atol=1e-5), both, alone)
    difference = jax.tree.map(lambda x: np.abs(x[0] - x[1]).max(), both)
    assert max(jax.tree.leaves(difference)) > 1e-2


def test_a_variant_starts_from_the_dense_parameters_and_is_evaluated_once(cell, tmp_path, monkeypatch, programs):
    sparse_recall.train(cell, tmp_path, programs)
    after = dataclasses.replace(cell, name="after", start="cell", steps=1, peak_lr=1e-30)
    sparse_recall.train(after, tmp_path, programs)
    jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path), params_of(tmp_path, "after"))
    monkeypatch.setattr(sparse_recall, "TASKS", {"recall": lambda length: RecallTask(length, 4, 4)})
    found = sparse_recall.evaluate(after, tmp_path, 10, programs)
    assert len(found["recall"]) == 2
    assert all(0 <= share <= 1 for share in found["recall"])
    assert json.loads((tmp_path / "after" / "accuracy.json").read_text()) == found


def test_a_cell_ends_when_it_is_right_often_enough(cell, tmp_path, programs):
    easy = dataclasses.replace(cell, stop_at=0.0)
    assert sparse_recall.train(easy, tmp_path, programs)["steps"] == 2


def test_the_study_trains_a_dense_model_before_what_starts_from_it():
    cells = sparse_recall.study([512, 1024], [512], 10)
    done = {""}
    for cell in cells:
        assert cell.start in done
        done.add(cell.name)
        assert cell.stop_at is not None or cell.first_batch >= 1000, "rows of the dense model are seen again"
    assert len(done) == len(cells) + 1
    assert sum(cell.stop_at is None for cell in cells) == len(sparse_recall.VARIANTS) + len(sparse_recall.MAIN)


def test_a_study_in_miniature_goes_on_and_is_reported(tmp_path, monkeypatch, programs, capsys):
    monkeypatch.setattr(sparse_recall, "CHUNK", 2)
    task = RecallTask(64, 2, 2)
    monkeypatch.setattr(sparse_recall, "TASKS", {"recall": lambda length: task})
    dense = sparse_recall.Cell("dense64", task, "", None, 2, 128, stop_at=0.0)
    cells = [dense]
    for variant in (sparse_recall.FULL, sparse_recall.INFLLM):
        cells.append(sparse_recall.Cell(f"64/{variant}", task, "dense64", sparse_recall.VARIANTS[variant], 2, 128))
    with pytest.raises(sparse_recall.OutOfTimeError):
        sparse_recall.run_study(cells, tmp_path, 4, programs, -math.inf)
    sparse_recall.run_study(cells, tmp_path, 4, programs, math.inf)
    capsys.readouterr()
    sparse_recall_report.main(["--work", str(tmp_path), "--directory", str(tmp_path)])
    result = json.loads((tmp_path / "sparse_recall.json").read_text())
    training = json.loads((tmp_path / "64" / sparse_recall.INFLLM / "training.json").read_text())
    assert result["machine"] == training["machine"]
    assert (tmp_path / "sparse_recall_64_training.svg").read_text().startswith("<svg")
    assert "| InfLLM v2 | " in capsys.readouterr().out


def test_the_report_says_which_goals_are_missed():
    accuracies = {
        (512, "recall", sparse_recall.FULL): [97.0, 96.0],
        (512, "recall", sparse_recall.INFLLM): [94.0, 93.0],
        (512, "recall", sparse_recall.WINDOW): [2.0, 4.0],
    }
    bench = Benchmark("sparse_recall", "")
    sparse_recall_report.add_rows(bench, accuracies)
    rows = {row.metric: row for row in bench.rows}
    assert rows["512 tokens, recall, full attention: right answers, mean of 2 seeds"].met is True
    below = rows["512 tokens, recall: InfLLM v2 below full attention"]
    assert below.ours == 3.0
    assert below.met is False
    assert "| sliding window and first block | 3.0 ± 1.4 |" in sparse_recall_report.markdown(accuracies)


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
    written = [make_tokens(task, 64, "train", 5, index) for index in range(2)]
    expected = {row.tobytes(): mask for tokens, answers in written for row, mask in zip(tokens, answers, strict=True)}
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
