"""The verb `ruler`: a server that reads the prompt, one that says nothing, a model of ours, kills, and errors."""

import dataclasses
import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from cpm_jax.checkpoints.manager import CheckpointConfig, Checkpointer
from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError, config_to_dict
from cpm_jax.common.metrics import read_metrics
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.errors import ResumeError, TaskError
from cpm_jax.evaluation.ruler.tasks import TASKS
from cpm_jax.inference.generate import Generator, collect
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.decoder import init_params
from cpm_jax.tools.openai_client import EndpointError
from experiments.ruler import RulerConfig, run
from experiments.run import main
from tests.evaluation.openai_server import Reply, serve
from tests.evaluation.ruler_oracle import oracle

ROOT = Path(__file__).resolve().parents[2]
PROSE = pydoc_data.topics.__file__


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A workdir as a training leaves it, with a random model that reads 4,096 tokens."""
    folder = tmp_path_factory.mktemp("run")
    with open(PROSE, encoding="utf-8") as file:
        tokenizer = Tokenizer.train([file.read(200_000)], vocab_size=1500)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        d_ff=64,
        max_position_embeddings=4096,
        initializer_range=0.3,
        dtype="float32",
    )
    with Checkpointer(folder / "checkpoints", CheckpointConfig(every=1)) as checkpointer:
        state = {"step": jnp.int32(5), "params": init_params(config, jax.random.key(0))}
        checkpointer.save(5, state, {"model": config_to_dict(config), "step": 5})
    tokenizer.save(folder / "tokenizer")
    return folder


def config(model, server, **fields):
    options = {"lengths": (2000,), "depths": (0.0, 0.5, 1.0), "samples": 1, "tasks": ("niah_single", "recall")}
    there = {"endpoint": server.url, "model": "m", "tokenizer": str(model / "tokenizer")}
    return RulerConfig(haystack=PROSE, **there | options | fields)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestScores:
    @pytest.fixture(scope="class")
    def all_right(self, model, tmp_path_factory):
        folder = tmp_path_factory.mktemp("right")
        with serve(oracle) as server:
            run(config(model, server, tasks=tuple(TASKS), lengths=(2000, 3000), samples=2), folder)
        return folder

    def test_who_reads_the_prompt_gets_everything_right(self, all_right):
        found = results(all_right)
        assert {length: mean["value"] for length, mean in found["mean"].items()} == {"2000": 1.0, "3000": 1.0}
        for name, cells in found["tasks"].items():
            for cell in cells.values():
                assert cell["score"] == {"value": 1.0, "standard_error": 0.0, "n": 6}
                depths = {} if name in ("common_words", "frequent_words") else {"0.0", "0.5", "1.0"}
                assert set(cell["by_depth"]) == set(depths)
                assert all(figure["value"] == 1 for figure in cell["by_depth"].values())

    def test_questions_and_answers_lie_on_disk(self, all_right):
        for name in TASKS:
            for length in (2000, 3000):
                questions = lines(all_right / "questions" / f"{name}_{length}.jsonl")
                items = lines(all_right / "items" / f"{name}_{length}.jsonl")
                assert sorted(question["index"] for question in questions) == list(range(6))
                assert sorted(item["index"] for item in items) == list(range(6))
                by_index = {item["index"]: item["responses"][0] for item in items}
                for question in questions:
                    prompt = question["body"] + question["answer_prefix"]
                    assert by_index[question["index"]] == oracle(prompt)

    def test_the_report_has_a_map_for_each_task_with_depths_and_a_table(self, all_right):
        page = (all_right / "report.html").read_text()
        assert page.count("<svg") == 1 + 7  # the curve over lengths, and a heat map
        assert "effective length" in page
        assert "1.000 ± 0.000" in page

    def test_metrics(self, all_right):
        (row,) = read_metrics(all_right / "metrics.jsonl")
        assert row["ruler/mean/3000"] == row["ruler/qa/2000"] == 1.0

    @pytest.mark.parametrize("chat", [False, True])
    def test_who_says_nothing_gets_nothing(self, model, tmp_path, chat):
        with serve(lambda prompt: "") as server:
            run(config(model, server, tasks=tuple(TASKS), chat=chat), tmp_path)
        assert results(tmp_path)["mean"]["2000"]["value"] == 0
        assert {path for path, *_ in server.requests} == {"/v1/chat/completions" if chat else "/v1/completions"}

    def test_a_part_is_scored_by_its_share_and_at_its_depth(self, model, tmp_path):
        """Who only sees the first half of a prompt finds what lies there."""

        def half(prompt):
            context, _, question = prompt.rpartition("Question:")
            return oracle(f"{context[: len(context) // 2]}Question:{question}")

        with serve(half) as server:
            depths = (0.0, 0.25, 0.5, 0.75, 1.0)
            run(config(model, server, tasks=("niah_multivalue",), depths=depths, samples=8), tmp_path)
        cell = results(tmp_path)["tasks"]["niah_multivalue"]["2000"]
        found = [cell["by_depth"][str(depth)]["value"] for depth in depths]
        assert found[:2] == [1, 1]
        assert found[3:] == [0, 0]
        items = lines(tmp_path / "items" / "niah_multivalue_2000.jsonl")
        scores = [item["metrics"]["score"][0] for item in items]
        assert set(scores) <= {0, 0.25, 0.5, 0.75, 1}
        assert cell["score"]["value"] == pytest.approx(sum(scores) / 40)
        spread = (sum((score - cell["score"]["value"]) ** 2 for score in scores) / 39) ** 0.5
        assert cell["score"]["standard_error"] == pytest.approx(spread / 40**0.5)


class TestOurModel:
    def test_is_given_the_whole_prompt_and_answers_greedily(self, model, tmp_path):
        ours = {"checkpoint": str(model), "lengths": (1000,), "tasks": ("niah_single", "qa"), "depths": (0.5,)}
        run(RulerConfig(haystack=PROSE, samples=3, max_gen_tokens=24, batch_size=2, **ours), tmp_path)
        generator = Generator.from_checkpoint(model)
        for name in ours["tasks"]:
            questions = lines(tmp_path / "questions" / f"{name}_1000.jsonl")
            answers = {item["index"]: item["responses"][0] for item in lines(tmp_path / "items" / f"{name}_1000.jsonl")}
            for question in questions:
                prompt = generator.tokenizer.encode_prompt(question["body"] + question["answer_prefix"])
                assert len(prompt) == question["num_tokens"] <= 1000 - 24
                pieces = generator.stream([prompt], sampling=SamplingConfig(temperature=0.0), max_new_tokens=24)
                assert collect(pieces)[0].text == answers[question["index"]]
        assert results(tmp_path)["step"] == 5

    def test_a_chat_ends_with_the_turn(self, model, tmp_path):
        ours = {"checkpoint": str(model), "lengths": (1000,), "tasks": "qa", "depths": (0.5,)}
        run(RulerConfig(haystack=PROSE, samples=1, chat=True, max_gen_tokens=24, **ours), tmp_path)
        assert results(tmp_path)["settings"]["turns"] == "open"

    def test_dense_weights_attend_sparsely(self, model, tmp_path):
        """Other settings of the attention are another model, and its answers are not mixed with the dense one's."""
        settings = RulerConfig(
            haystack=PROSE,
            checkpoint=str(model),
            lengths=(1000,),
            tasks="qa",
            depths=(0.5,),
            samples=1,
            max_gen_tokens=24,
            sparse_config=SparseConfig(window_size=128, topk=2, dense_len=-1),
        )
        run(settings, tmp_path)
        with pytest.raises(ResumeError, match="model"):
            run(dataclasses.replace(settings, sparse_config=None), tmp_path)

    def test_lengths_that_it_cannot_read(self, model, tmp_path):
        with pytest.raises(ConfigError, match=r"lengths = \(1000, 5000\): the model reads up to .* = 4096 tokens"):
            run(RulerConfig(haystack=PROSE, checkpoint=str(model), lengths=(1000, 5000)), tmp_path)


class TestResuming:
    def test_nothing_is_asked_twice(self, model, tmp_path):
        with serve(oracle) as server:
            run(config(model, server), tmp_path)
            assert len(server.requests) == 6
            before = (tmp_path / "questions" / "recall_2000.jsonl").read_bytes()
            run(config(model, server), tmp_path)
            assert len(server.requests) == 6
            assert (tmp_path / "questions" / "recall_2000.jsonl").read_bytes() == before
            run(config(model, server, samples=2, lengths=(2000, 3000)), tmp_path)
            assert len(server.requests) == 24
        prompts = [body["prompt"] for *_, body in server.requests]
        assert len(set(prompts)) == 24

    def test_after_an_error_of_the_server(self, model, tmp_path):
        answered, limit = [], [4]

        def answer(prompt):
            if len(answered) == limit[0]:
                return Reply(400, "gone")
            answered.append(prompt)
            return oracle(prompt)

        with serve(answer) as server:
            with pytest.raises(EndpointError, match="400"):
                run(config(model, server, batch_size=1), tmp_path)
            limit[0] = 100
            run(config(model, server, batch_size=1), tmp_path)
        assert len(answered) == len(set(answered)) == 6
        assert results(tmp_path)["mean"]["2000"] == {"value": 1.0, "standard_error": 0.0, "n": 6}

    def test_after_a_kill(self, model, tmp_path):
        asked = []

        def slowly(prompt):
            asked.append(prompt)
            time.sleep(0.25)
            return oracle(prompt)

        with serve(slowly) as server:
            there = [f"--gin.ENDPOINT={server.url}", "--gin.MODEL=m", f"--gin.TOKENIZER={model}/tokenizer"]
            what = ["--gin.LENGTHS=(2000,)", "--gin.SAMPLES=4", "--gin.TASKS='niah_single'", "--gin.BATCH_SIZE=1"]
            command = ["ruler", f"--workdir={tmp_path}", f"--gin.HAYSTACK={PROSE}", *there, *what]
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments.run", *command],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stderr=subprocess.PIPE,
            )
            items = tmp_path / "items" / "niah_single_2000.jsonl"
            deadline = time.monotonic() + 60
            while not (items.exists() and items.read_bytes().count(b"\n") >= 3):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kept = items.read_bytes().count(b"\n")
            with items.open("ab") as file:
                file.write(b'{"index": 19, "doc')  # as a kill in the midst of a write leaves it
            before = len(asked)
            assert main(command) == exit_codes.OK
        assert kept < 20
        assert len(asked) - before == 20 - kept
        assert results(tmp_path)["tasks"]["niah_single"]["2000"]["score"] == {
            "value": 1.0,
            "standard_error": 0.0,
            "n": 20,
        }

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"seed": 1}, r"settings.seed: 0 there, 1 now"),
            ({"model": "other"}, r"model.model: 'm' there, 'other' now"),
            ({"depths": (0.5,)}, r"settings.depths"),
            ({"haystack": str(ROOT / "docs")}, r"settings.haystack_sha256"),
        ],
    )
    def test_a_folder_of_other_questions_is_refused(self, model, tmp_path, changes, said):
        with serve(oracle) as server:
            run(config(model, server, tasks="niah_single"), tmp_path)
            with pytest.raises(ResumeError, match=said):
                run(RulerConfig(**vars(config(model, server, tasks="niah_single")) | changes), tmp_path)

    def test_questions_of_a_start_that_answered_nothing_are_made_anew(self, model, tmp_path):
        with serve(lambda prompt: Reply(400)) as server, pytest.raises(EndpointError):
            run(config(model, server, seed=7), tmp_path)
        with serve(oracle) as server:
            run(config(model, server), tmp_path)
        with serve(oracle) as other:
            run(config(model, other), tmp_path / "fresh")
        assert sorted(body["prompt"] for *_, body in server.requests) == sorted(
            body["prompt"] for *_, body in other.requests
        )


class TestWrong:
    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({}, "give one of them"),
            ({"checkpoint": "x", "endpoint": "y"}, "give one of them"),
            ({"endpoint": "http://x/v1", "model": "m"}, "needs the model's name there, and its tokenizer"),
            ({"checkpoint": "x", "lengths": (2000, 1000)}, r"lengths = \(2000, 1000\): must be numbers positive, asc"),
            ({"checkpoint": "x", "lengths": ()}, "at least one"),
            ({"checkpoint": "x", "depths": (0.5, 1.5)}, r"depths = \(0.5, 1.5\): must be numbers from 0 to 1"),
            ({"checkpoint": "x", "depths": (float("nan"),)}, "depths"),
            ({"checkpoint": "x", "samples": 0}, "samples = 0"),
            ({"checkpoint": "x", "tasks": ()}, "at least one task"),
            (
                {"endpoint": "http://x/v1", "model": "m", "tokenizer": "t", "sparse_config": SparseConfig()},
                "an endpoint attends as it does",
            ),
        ],
    )
    def test_config(self, fields, said):
        with pytest.raises(ConfigError, match=said):
            RulerConfig(haystack=PROSE, **fields)

    def test_a_task_is_said_before_the_model_is_read(self, tmp_path):
        with pytest.raises(TaskError, match="no task 'needle'"):
            run(RulerConfig(haystack=PROSE, checkpoint="none", tasks="needle"), tmp_path)

    def test_too_short_a_length_is_said_before_anybody_is_asked(self, model, tmp_path):
        with serve(oracle) as server, pytest.raises(TaskError, match="task common_words does not fit into 500 tokens"):
            run(config(model, server, tasks=("niah_single", "common_words"), lengths=(500,)), tmp_path)
        assert server.requests == []

    def test_no_haystack(self, model, tmp_path):
        with serve(oracle) as server, pytest.raises(InputError, match="does not exist"):
            run(RulerConfig(**vars(config(model, server)) | {"haystack": "nowhere"}), tmp_path)

    def test_exit_code(self, tmp_path, capsys):
        assert main(["ruler", f"--workdir={tmp_path}", "--gin.HAYSTACK=stdlib", "--gin.CHECKPOINT=none"]) == 3
        assert "none" in capsys.readouterr().err
