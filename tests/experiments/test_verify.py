"""The verb `verify`, end to end on a model that learns in seconds: real text against the same words shuffled."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from cpm_jax.checkpoints.manager import CheckpointConfig, restore_params
from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.common.metrics import read_metrics
from cpm_jax.data.errors import DataError
from cpm_jax.data.mixture import from_folders
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.evaluation.errors import TaskError
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training import loop
from cpm_jax.training.loop import TrainConfig
from cpm_jax.training.schedules import wsd
from experiments import evaluate, pretrain, verify
from experiments.verify import VerifyConfig, cell_folder, run

SEQ_LEN, VOCAB, STABLE, DECAY = 64, 300, 60, 20


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def setting(pool_texts, tmp_path_factory):
    """A default mix of code, candidates of prose and shuffled prose, held-out prose, and a run in its stable phase."""
    folder = tmp_path_factory.mktemp("verify")
    prose, code = pool_texts["prose"], pool_texts["code"]
    rng = random.Random(0)
    shuffled = [" ".join(rng.sample(text.split(" "), len(text.split(" ")))) for text in prose[:200]]
    prepare(
        PrepareConfig(write(folder / "code.jsonl", code), SEQ_LEN, vocab_size=VOCAB, num_workers=0),
        folder / "default",
        progress=False,
    )
    held_out = write(folder / "held_out.jsonl", [text[:300] for text in prose[200:260]])
    candidates = {
        "prose": write(folder / "prose.jsonl", prose[:200]),
        "shuffled": write(folder / "shuffled.jsonl", shuffled),
    }
    pretrain.run(
        pretrain.PretrainConfig(
            model=ModelConfig(
                vocab_size=VOCAB,
                num_layers=1,
                d_model=32,
                num_heads=2,
                num_kv_heads=1,
                d_ff=64,
                max_position_embeddings=256,
                dtype="float32",
                scan_layers=False,
            ),
            mixture=from_folders(str(folder / "default")),
            schedule=wsd(0.01, STABLE + 20, 5, 20),
            train=TrainConfig(steps=STABLE, batch_size=8, seed=0),
            checkpoint=CheckpointConfig(every=STABLE),
        ),
        folder / "run",
    )
    return VerifyConfig(
        checkpoint=str(folder / "run"),
        default=str(folder / "default"),
        candidates=candidates,
        tasks=held_out,
        decay_steps=DECAY,
        num_seeds=2,
        share=0.6,
        num_workers=0,
        keep_checkpoints=True,
    )


@pytest.fixture(scope="module")
def verified(setting, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("verified")
    return workdir, run(setting, workdir)


def test_prose_is_told_from_code_and_ranks_above_the_same_words_shuffled(verified):
    _, results = verified
    assert results["ranking"] == ["prose", "shuffled", "default"]
    pairs = {(pair["first"], pair["second"]): pair for pair in results["pairs"]}
    assert pairs["prose", "default"]["significant"]
    assert "better than the default mix alone: prose" in results["verdict"]
    # A model this small hardly knows order: the verdict has to say what the test of the pair says, and no more.
    pair = pairs["prose", "shuffled"]
    assert pair["seeds"] == 2
    said = {True: "prose is better than shuffled: +", False: "prose and shuffled are not distinguishable"}
    assert results["verdict"].startswith(said[pair["significant"]])


def test_leaves_a_page_and_the_figures(verified):
    workdir, results = verified
    assert json.loads((workdir / "results.json").read_text()) == results
    page = (workdir / "report.html").read_text()
    for said in ("Against the default mix", "All pairs", "more tokens to tell"):
        assert said in page
    assert results["cost"]["tokens"] == 3 * 2 * DECAY * 8 * SEQ_LEN
    assert results["cost"]["from_scratch_ratio"] == pytest.approx((STABLE + DECAY) / DECAY)
    assert results["passes"].keys() == {"prose", "shuffled"}
    assert {name: found["documents"] for name, found in results["candidates"].items()} == {
        "prose": 200,
        "shuffled": 200,
    }


def test_an_annealing_goes_on_from_the_checkpoint_and_decays_to_its_end(verified):
    lines = read_metrics(cell_folder(verified[0], "prose", 1) / "train" / "metrics.jsonl")
    rates = {line["step"]: line["lr"] for line in lines if "lr" in line}
    assert min(rates) == STABLE + 10
    assert rates[STABLE + DECAY] == pytest.approx(0.01 * 0.1 ** (1 - 1 / DECAY), rel=1e-3)
    shares = np.mean([line.get("loss/candidate") is not None for line in lines if "loss" in line])
    assert shares == 1.0


@pytest.mark.slow
def test_cells_of_one_size_share_their_programs(setting, tmp_path):
    loop._train_step.cache_clear()
    run(dataclasses.replace(setting, decay_steps=2, limit=2), tmp_path)
    found = loop._train_step.cache_info()
    assert (found.misses, found.hits) == (2, 4)  # the default mix has one source less


def test_a_second_call_trains_nothing_and_says_the_same(setting, verified, monkeypatch):
    workdir, results = verified
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("trained again"))
    again = run(setting, workdir)
    assert {**again, "date": ""} == {**results, "date": ""}


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_weights_and_figures(setting, verified, tmp_path, monkeypatch):
    evaluate_run, train = evaluate.run, pretrain.run
    calls = []

    def stopped(config, workdir):
        calls.append(workdir)
        if len(calls) == 3:
            raise exit_codes.Stop(exit_codes.PREEMPTED, "stopped")
        evaluate_run(config, workdir)

    def cut_short(config, workdir):
        if len(calls) == 1:  # leaves a checkpoint in the middle, as a preempted training does
            calls.append(workdir)
            steps = config.train.steps
            train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps - 7)), workdir)
            raise exit_codes.Stop(exit_codes.PREEMPTED, "stopped")
        train(config, workdir)

    monkeypatch.setattr(evaluate, "run", stopped)
    monkeypatch.setattr(pretrain, "run", cut_short)
    for _ in range(2):
        with pytest.raises(exit_codes.Stop):
            run(setting, tmp_path)
    results = run(setting, tmp_path)
    assert results["pairs"] == verified[1]["pairs"]
    for place in (("default", 1), ("prose", 1), ("shuffled", 2)):
        ours, theirs = (restore_params(cell_folder(folder, *place) / "train")[0] for folder in (tmp_path, verified[0]))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_checkpoints_of_a_cell_go_once_it_is_evaluated_and_not_before(tmp_path, monkeypatch):
    """Also those that a kill after the evaluation left."""
    config = VerifyConfig("run", "default", {"a": "source"}, "held_out", decay_steps=1)
    checkpoints, results = tmp_path / "train" / "checkpoints", tmp_path / "evaluation" / "results.json"

    def train(job, folder):
        (folder / "checkpoints" / "20").mkdir(parents=True, exist_ok=True)

    def stop(job, folder):
        raise exit_codes.Stop(exit_codes.PREEMPTED, "stopped")

    def measure(job, folder):
        assert (checkpoints / "20").exists()
        folder.mkdir(exist_ok=True)
        results.write_text("{}")

    monkeypatch.setattr(verify, "annealing", lambda *_: None)
    monkeypatch.setattr(pretrain, "run", train)
    monkeypatch.setattr(evaluate, "run", stop)
    with pytest.raises(exit_codes.Stop):
        verify.run_cell(config, None, "source", 1, tmp_path)
    assert checkpoints.exists()
    monkeypatch.setattr(evaluate, "run", measure)
    verify.run_cell(dataclasses.replace(config, keep_checkpoints=True), None, "source", 1, tmp_path)
    assert checkpoints.exists()
    verify.run_cell(config, None, "source", 1, tmp_path)
    assert results.exists()
    assert not checkpoints.exists()
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("trained again"))
    verify.run_cell(config, None, "source", 1, tmp_path)


@pytest.mark.slow
def test_more_seeds_and_candidates_may_be_asked_for_later(setting, verified, tmp_path):
    small = dataclasses.replace(
        setting, decay_steps=2, limit=5, num_seeds=1, candidates={"prose": setting.candidates["prose"]}
    )
    assert run(small, tmp_path)["pairs"][0]["seeds"] == 1
    more = dataclasses.replace(small, num_seeds=2, candidates=setting.candidates)
    assert len(run(more, tmp_path)["pairs"]) == 3


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"decay_steps": 3}, ConfigError, "was made with decay_steps = 20, now decay_steps = 3"),
        ({"candidates": {"prose": "/elsewhere"}}, ConfigError, "now candidates.prose = '/elsewhere'"),
        ({"tasks": "hellaswog"}, TaskError, "no task 'hellaswog'"),
        ({"checkpoint": "/nowhere"}, InputError, "/nowhere holds no checkpoint"),
    ],
)
def test_what_does_not_fit_is_said(setting, verified, changes, error, said):
    with pytest.raises(error, match=said):
        run(dataclasses.replace(setting, **changes), verified[0])


def test_what_of_a_candidate_is_set_aside_is_counted_and_said(setting, tmp_path):
    """Three usable documents are verified, and the verdict warns of how often they were read."""
    lines = [f'{{"text": "document {number}"}}'.encode() for number in (1, 2, 3, 3)]
    lines += [b'{"text": "na\xefve"}', b'{"txt": "x"}', b'{"text": ""}', b"{"]
    (tmp_path / "few.jsonl").write_bytes(b"\n".join(lines))
    candidates = {"few": str(tmp_path / "few.jsonl")}
    small = dataclasses.replace(setting, candidates=candidates, decay_steps=2, limit=2, num_seeds=1)
    results = run(small, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "results.json").read_text())["candidates"]["few"]
    assert found.pop("tokens") > 3
    assert found == {
        "documents": 3,
        "duplicates": 1,
        "set_aside": {"empty text": 1, "invalid UTF-8": 1, "malformed JSON": 1, "missing field": 1},
    }
    assert "Read more than four times" in results["verdict"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "1 empty text, 1 invalid UTF-8, 1 malformed JSON, 1 missing field" in page


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'{"txt": "a"}\n{"txt": "b"}\n', r"no document found in .* \(rejected: \{'missing field': 2\}\)"),
        (b'{"text": "na\xefve"}\n', r"no document found in .* \(rejected: \{'invalid UTF-8': 1\}\)"),
        (b"", r"no document found in .* \(rejected: nothing\)"),
        (None, r"source .*bad\.jsonl' does not exist"),
    ],
)
def test_a_candidate_of_which_nothing_can_be_used_is_named(setting, tmp_path, monkeypatch, data, said):
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("trained"))
    if data is not None:
        (tmp_path / "bad.jsonl").write_bytes(data)
    candidates = {"prose": setting.candidates["prose"], "bad": str(tmp_path / "bad.jsonl")}
    with pytest.raises(DataError, match=rf"^candidate bad: {said}"):
        run(dataclasses.replace(setting, candidates=candidates), tmp_path / "run")
    assert not (tmp_path / "run" / "settings.json").exists()  # the name may still be given to another source


@pytest.mark.parametrize("field", ["default", "candidates"])
def test_a_dataset_with_another_tokenizer_is_named_before_anything_is_trained(setting, tmp_path, monkeypatch, field):
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("trained"))
    other = tmp_path / "other"
    prepare(PrepareConfig(setting.candidates["prose"], SEQ_LEN, vocab_size=VOCAB, num_workers=0), other, progress=False)
    value = str(other) if field == "default" else {"other": str(other)}
    with pytest.raises(ConfigError, match=rf"VerifyConfig\.{field}: .*{other}.* was prepared with another tokenizer"):
        run(dataclasses.replace(setting, **{field: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dataset_of_other_lengths_is_named(setting, tmp_path):
    tokenizer, other = f"{setting.default}/tokenizer", tmp_path / "other"
    prepare(PrepareConfig(setting.candidates["prose"], 32, tokenizer, num_workers=0), other, progress=False)
    with pytest.raises(ConfigError, match=r"seq_len \(32\) than the default mix; prepare it with .* and seq_len 64"):
        run(dataclasses.replace(setting, candidates={"other": str(other)}), tmp_path / "run")


def test_tasks_of_both_kinds_are_refused_before_anything_is_claimed_or_trained(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "run", lambda *_: pytest.fail("trained"))
    choices = tmp_path / "choices.jsonl"
    choices.write_text(json.dumps({"question": "Two and two?", "choices": ["four", "five"], "answer": 0}))
    mixed = dataclasses.replace(setting, tasks=(setting.tasks, str(choices)))
    with pytest.raises(ConfigError, match=r"VerifyConfig\.tasks = \['held_out', 'choices'\]: .* no common mean"):
        run(mixed, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert verify.check(dataclasses.replace(setting, tasks=str(choices))).meta["step"] == STABLE


def test_a_task_whose_figure_is_of_neither_kind_is_refused(setting, tmp_path):
    solved = tmp_path / "sums.jsonl"
    solved.write_text(json.dumps({"question": "What is 2 + 3?", "reasoning": "Two and three.", "answer": "5"}))
    with pytest.raises(ConfigError, match=r"VerifyConfig\.tasks has '.*sums.*', whose figure is 'loss'"):
        run(dataclasses.replace(setting, tasks=f"scaling_bench:{solved}"), tmp_path / "run")


def test_a_checkpoint_that_has_decayed_is_refused(verified):
    with pytest.raises(ConfigError, match=r"at step 80 its learning rate is 0\.001, not the 0\.01"):
        verify.find_start(str(cell_folder(verified[0], "prose", 1) / "train"))


@pytest.mark.parametrize("name", ["default", "", "a/b"])
def test_names_of_candidates_are_checked(setting, name):
    with pytest.raises(ConfigError, match=r"VerifyConfig\.candidates has the name"):
        dataclasses.replace(setting, candidates={name: "x"})
