"""The verb `evaluate` on random models: what lies on disk, resuming after a kill, comparison, and bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cpm_jax.checkpoints.manager import CheckpointConfig, Checkpointer, CheckpointError
from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError, config_to_dict
from cpm_jax.common.metrics import read_metrics
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.errors import ComparisonError, ResumeError, TaskError
from cpm_jax.inference.load import load_model
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import init_params
from experiments.evaluate import EvaluateConfig, run
from experiments.run import main

ROOT = Path(__file__).resolve().parents[2]


def write_run(folder, seed):
    """A workdir as a training leaves it, with a random model."""
    tokenizer = Tokenizer.train(["the quick brown fox jumps over the lazy dog. "] * 3, vocab_size=290)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        d_ff=64,
        max_position_embeddings=256,
        initializer_range=0.3,
        dtype="float32",
    )
    with Checkpointer(folder / "checkpoints", CheckpointConfig(every=1)) as checkpointer:
        state = {"step": jnp.int32(5), "params": init_params(config, jax.random.key(seed))}
        checkpointer.save(5, state, {"model": config_to_dict(config), "step": 5})
    tokenizer.save(folder / "tokenizer")
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [write_run(tmp_path_factory.mktemp(f"run{seed}"), seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A .jsonl file of each kind."""
    folder = tmp_path_factory.mktemp("tasks")
    animals = ["a fox", "a dog", "a cat", "a hen", "a cow"]
    records = {
        "choice": [{"question": f"What is {i}?", "choices": animals[: 2 + i % 4], "answer": i % 2} for i in range(30)],
        "generation": [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(7)],
        "text": [{"text": "the quick brown fox " * (1 + 5 * i)} for i in range(9)],
    }
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def config(model, files, *names, **fields):
    tasks = tuple(str(files / f"{name}.jsonl") for name in names)
    return EvaluateConfig(checkpoint=model, tasks=tasks, **{"batch_size": 4, "max_gen_tokens": 8} | fields)


@pytest.fixture(scope="module")
def evaluated(models, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    run(config(models[0], files, "choice", "generation", "text"), folder)
    return folder


class TestOnDisk:
    def test_every_item_and_every_figure_with_its_standard_error(self, evaluated):
        found = results(evaluated)["tasks"]
        assert {name: task["items"] for name, task in found.items()} == {"choice": 30, "generation": 7, "text": 9}
        for name, task in found.items():
            items = lines(evaluated / "items" / f"{name}.jsonl")
            assert sorted(item["index"] for item in items) == list(range(task["items"]))
            for metric, figure in task["metrics"].items():
                values = [item["metrics"][metric] for item in items]
                assert figure["value"] == pytest.approx(sum(v for v, _ in values) / sum(w for _, w in values))
                assert figure["n"] == task["items"]
                assert figure["standard_error"] >= 0

    def test_accuracy_is_that_of_the_likelihoods_on_disk(self, evaluated):
        for item in lines(evaluated / "items" / "choice.jsonl"):
            scores = [log_likelihood for log_likelihood, _ in item["responses"]]
            assert item["metrics"]["acc"][0] == float(scores.index(max(scores)) == int(item["target"]))
            assert item["prompt"] == f"Question: What is {item['index']}?\nAnswer:"
            assert [choice[1:] for choice in item["choices"]] == ["a fox", "a dog", "a cat", "a hen", "a cow"][
                : len(scores)
            ]

    def test_chance_is_told(self, evaluated):
        assert results(evaluated)["tasks"]["choice"]["chance"] == pytest.approx(
            sum(1 / (2 + i % 4) for i in range(30)) / 30
        )
        assert results(evaluated)["tasks"]["text"]["chance"] is None

    def test_metrics_lie_under_the_step_of_the_checkpoint(self, evaluated):
        (row,) = read_metrics(evaluated / "metrics.jsonl")
        found = results(evaluated)["tasks"]
        assert row["step"] == 5
        assert row["eval/choice/acc"] == found["choice"]["metrics"]["acc"]["value"]
        assert list((evaluated / "tensorboard").iterdir())

    def test_the_report(self, evaluated):
        page = (evaluated / "report.html").read_text()
        assert page.count("<svg") == 2
        assert "46 items of 3 tasks" in page
        assert "Items of generation" in page

    def test_what_made_it(self, evaluated, models):
        found = results(evaluated)
        assert found["checkpoint"].startswith(models[0])
        assert found["step"] == 5
        assert found["settings"]["seed"] == 0
        assert "jax" in found["versions"]


def test_the_same_command_does_nothing_again(evaluated, models, files, monkeypatch):
    before = results(evaluated)["tasks"], (evaluated / "items" / "choice.jsonl").read_bytes()
    monkeypatch.setattr("cpm_jax.inference.scoring._head_inputs", None)  # nothing may be computed
    monkeypatch.setattr("cpm_jax.inference.generate.start", None)
    run(config(models[0], files, "choice", "generation", "text"), evaluated)
    assert (results(evaluated)["tasks"], (evaluated / "items" / "choice.jsonl").read_bytes()) == before


def test_a_higher_limit_adds_items(models, files, tmp_path):
    run(config(models[0], files, "choice", limit=5), tmp_path)
    assert results(tmp_path)["tasks"]["choice"]["items"] == 5
    first = {item["index"]: item for item in lines(tmp_path / "items" / "choice.jsonl")}
    assert sorted(first) == [0, 1, 2, 3, 4]
    run(config(models[0], files, "choice", "text", limit=8), tmp_path)
    now = {item["index"]: item for item in lines(tmp_path / "items" / "choice.jsonl")}
    assert sorted(now) == list(range(8))
    assert {index: now[index] for index in first} == first
    run(config(models[0], files, "choice", limit=2), tmp_path)
    assert results(tmp_path)["tasks"]["choice"]["items"] == 2
    assert len(lines(tmp_path / "items" / "choice.jsonl")) == 8


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_without_redoing_items(models, tmp_path):
    """A process is killed (SIGKILL) several times; each start finds the items that were done, byte by byte."""
    rows = [{"prompt": f"{i} + {i} =", "answer": "x"} for i in range(40)]
    task = tmp_path / "many.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, path = tmp_path / "out", tmp_path / "out" / "items" / "many.jsonl"
    command = [
        *(sys.executable, "-m", "experiments.run", "evaluate", f"--workdir={folder}", f"--gin.CHECKPOINT={models[0]}"),
        *(f"--gin.TASKS={task}", "--gin.MAX_GEN_TOKENS=48", "--gin.BATCH_SIZE=2"),
    ]
    whole = tmp_path / "whole"
    run(EvaluateConfig(checkpoint=models[0], tasks=str(task), max_gen_tokens=48, batch_size=2), whole)
    expected = {item["index"]: item for item in lines(whole / "items" / "many.jsonl")}
    done = b""
    for kill_at in (3, 17):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < kill_at:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        left = path.read_bytes()
        assert left.startswith(done)
        done = left[: left.rindex(b"\n") + 1]
        path.write_bytes(done + b'{"index": 39, "doc_ha')  # as if the kill had come in the midst of a write
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == exit_codes.OK, finished.stderr
    assert path.read_bytes().startswith(done)
    assert {item["index"]: item for item in lines(path)} == expected
    assert len(lines(path)) == 40
    assert results(folder)["tasks"] == results(whole)["tasks"]


def test_int8_weights_are_another_model(evaluated, models, files):
    with pytest.raises(ResumeError, match="weights_sha256"):
        run(config(models[0], files, "text", weight_dtype="int8"), evaluated)


def test_a_model_that_diverged_is_told_of(models, files, tmp_path, monkeypatch, capsys):
    loaded = load_model(models[0])
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, loaded.params)
    monkeypatch.setattr("experiments.evaluate.load_model", lambda *args: loaded._replace(params=broken))
    run(config(models[0], files, "choice", "text"), tmp_path)
    said = capsys.readouterr()
    assert "text: 9 of 9 items have likelihoods that are not finite" in said.err
    assert "not finite" in said.out
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)["tasks"]
    assert found["text"]["metrics"]["bits_per_byte"]["value"] is None
    assert found["choice"]["not_finite"] == 30
    assert "their metrics say nothing" in (tmp_path / "report.html").read_text()


def test_an_interrupt_says_how_to_go_on(models, files, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("cpm_jax.evaluation.runner.run_task", interrupted)
    with pytest.raises(exit_codes.Stop, match="the same command goes on") as stopped:
        run(config(models[0], files, "text"), tmp_path)
    assert stopped.value.code == exit_codes.PREEMPTED


class TestComparison:
    def test_with_another_model(self, evaluated, models, files, tmp_path, capsys):
        run(config(models[1], files, "choice", "text", compare=str(evaluated)), tmp_path)
        found = results(tmp_path)
        by_metric = {(row["task"], row["metric"]): row for row in found["comparison"]}
        assert set(by_metric) == {("choice", "acc"), ("choice", "acc_norm"), ("text", "bits_per_byte")}
        row = by_metric["text", "bits_per_byte"]
        ours, theirs = (
            results(folder)["tasks"]["text"]["metrics"]["bits_per_byte"] for folder in (tmp_path, evaluated)
        )
        assert row["difference"] == pytest.approx(ours["value"] - theirs["value"])
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
        page = (tmp_path / "report.html").read_text()
        assert row["verdict"].split(" (")[0] in page.replace("&#39;", "'")
        assert row["verdict"] in capsys.readouterr().out

    def test_over_the_items_that_both_have(self, evaluated, models, files, tmp_path):
        run(config(models[1], files, "choice", limit=6, compare=str(evaluated)), tmp_path)
        assert {row["n"] for row in results(tmp_path)["comparison"]} == {6}

    def test_other_items_are_refused(self, evaluated, models, tmp_path):
        (tmp_path / "choice.jsonl").write_text('{"question": "other", "choices": ["a", "b"], "answer": 0}\n')
        with pytest.raises(ComparisonError, match="item 0 of choice is not the same in"):
            run(config(models[1], tmp_path, "choice", compare=str(evaluated)), tmp_path / "out")
        assert results(tmp_path / "out")["tasks"]["choice"]["items"] == 1  # what was measured stays

    def test_no_task_in_common(self, evaluated, models, tmp_path):
        (tmp_path / "mine.jsonl").write_text('{"text": "the fox"}\n')
        with pytest.raises(ComparisonError, match=r"no task in common .* it has choice, generation, text"):
            run(config(models[1], tmp_path, "mine", compare=str(evaluated)), tmp_path / "out")

    def test_not_an_evaluation(self, models, files, tmp_path):
        with pytest.raises(ComparisonError, match="not the folder of an evaluation that has ended"):
            run(config(models[0], files, "text", compare=str(tmp_path)), tmp_path / "out")


class TestBadInput:
    def test_a_folder_of_another_model_or_other_settings(self, evaluated, models, files):
        before = results(evaluated)
        with pytest.raises(ResumeError, match=r"another evaluation:\n  model.weights_sha256"):
            run(config(models[1], files, "choice"), evaluated)
        with pytest.raises(ResumeError, match=r"settings.num_fewshot: None there, 2 now"):
            run(config(models[0], files, "choice", num_fewshot=2), evaluated)
        assert results(evaluated) == before

    def test_a_folder_with_items_of_other_data(self, evaluated, models, files, tmp_path):
        task = tmp_path / "text.jsonl"
        task.write_text('{"text": "something else"}\n')
        with pytest.raises(ResumeError, match=r"text.jsonl has item 0 of another question"):
            run(config(models[0], tmp_path, "text"), evaluated)

    def test_a_start_that_failed_does_not_claim_the_folder(self, models, files, tmp_path):
        with pytest.raises(TaskError, match="task generation: num_fewshot = 9: there are 6 examples"):
            run(config(models[0], files, "choice", "generation", num_fewshot=9), tmp_path)
        assert not (tmp_path / "items").exists()  # not even of the first task
        run(config(models[1], files, "generation"), tmp_path)

    def test_not_a_checkpoint(self, files, tmp_path):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            run(config(str(tmp_path), files, "text"), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_unknown_task_lists_what_there_is(self, models, tmp_path):
        with pytest.raises(TaskError, match="no task 'hellaswog': there are gsm8k_sample, hellaswag_sample"):
            run(EvaluateConfig(checkpoint=models[0], tasks="hellaswog"), tmp_path)

    def test_more_output_than_the_model_can_read(self, models, files, tmp_path):
        with pytest.raises(InputError, match="max_gen_toks = 300: must be from 1 to below"):
            run(config(models[0], files, "generation", max_gen_tokens=300), tmp_path)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"limit": -1}, "EvaluateConfig.limit = -1"),
            ({"tasks": ()}, "name at least one task"),
            ({"batch_size": 0}, "EvaluateConfig.batch_size = 0"),
            ({"dtype": "int8"}, "EvaluateConfig.dtype = 'int8'"),
        ],
    )
    def test_impossible_configs(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            EvaluateConfig(**{"checkpoint": "x", "tasks": "y"} | fields)

    def test_exit_codes(self, models, tmp_path, capsys):
        assert main(["evaluate", f"--workdir={tmp_path / 'a'}", "--gin.CHECKPOINT=x", "--gin.LIMIT=-1"]) == 2
        assert "LIMIT" in capsys.readouterr().err
        arguments = ["evaluate", f"--workdir={tmp_path / 'b'}", f"--gin.CHECKPOINT={models[0]}", "--gin.TASKS=none"]
        assert main(arguments) == exit_codes.BAD_INPUT
        assert "no task 'none'" in capsys.readouterr().err
