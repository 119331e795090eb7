"""ScalingBench: losses are the model's own, items are told apart, and the builder is replayable."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from cpm_jax.common.config import InputError
from cpm_jax.evaluation.errors import TaskError
from cpm_jax.evaluation.lm_eval_adapter import CpmJaxLM
from cpm_jax.evaluation.results import estimates
from cpm_jax.evaluation.runner import Settings, build_task, run_task
from cpm_jax.evaluation.scaling_bench import Solved, read_solved, scaling_bench_task, solved_gsm8k
from cpm_jax.evaluation.scaling_bench_builder import EndpointScores, build
from cpm_jax.evaluation.tasks import make_tasks
from cpm_jax.modeling import decoder
from cpm_jax.tools.openai_client import EndpointError, OpenAIClient, ReplyCache
from tests.evaluation.openai_server import Reply, serve

ROWS = [
    {"question": "What is 2 + 3?", "reasoning": "Two and three are five.", "answer": "5"},
    {"question": "Is 7 odd?", "reasoning": "", "answer": "yes"},
    {"question": "What is 4 · 6?", "reasoning": "Four sixes: 6, 12, 18, 24.", "answer": 24},
]


@pytest.fixture
def path(tmp_path):
    lines = [json.dumps(row) for row in ROWS] + ["[1]", json.dumps({"question": "?", "answer": "1"})]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "sums.jsonl"


def test_the_loss_is_that_of_the_models_own_logits(path, tmp_path, lm, random_model):
    (task,) = make_tasks([f"scaling_bench:{path}"])
    build_task(lm, task, Settings())
    result = run_task(lm, task, tmp_path / "out")
    nats, tokens = 0.0, 0
    for item in result.items:
        context, whole = lm.tok_encode(item.prompt), lm.tok_encode(item.prompt + item.target)
        assert whole[: len(context)] == context
        tokens_in = jnp.array([whole[:-1]])
        model = decoder.bind(random_model.config, random_model.params)
        hidden = model(tokens_in, jnp.arange(len(whole) - 1)[None], jnp.ones_like(tokens_in))
        logprobs = scipy.special.log_softmax(np.asarray(model.logits(hidden)[0], np.float64), axis=-1)
        own = -sum(float(logprobs[at - 1, whole[at]]) for at in range(len(context), len(whole)))
        assert item.metrics["loss"].value == pytest.approx(own, rel=1e-4)
        assert item.metrics["loss"].weight == len(whole) - len(context)
        assert item.metrics["bits_per_byte"].value == pytest.approx(own / math.log(2), rel=1e-4)
        assert item.metrics["bits_per_byte"].weight == len(item.target.encode())
        nats, tokens = nats + own, tokens + len(whole) - len(context)
    assert result.summary["metrics"]["loss"]["value"] == pytest.approx(nats / tokens, rel=1e-4)
    assert result.summary["higher_is_better"]["loss"] is False
    assert result.summary["rejected"] == 2
    again = run_task(lm, task, tmp_path / "out")  # nothing is left to do
    assert again.items == result.items


def test_other_models_of_lm_eval_and_ours_agree(path, tmp_path, lm):
    class Plain:
        """The same model, by lm-eval's interface alone."""

        loglikelihood, _encode_pair = lm.loglikelihood, lm._encode_pair

    (task,) = make_tasks([f"scaling_bench:{path}"])
    build_task(lm, task, Settings())
    ours = run_task(lm, task, tmp_path / "ours").items
    plain = run_task(Plain(), task, tmp_path / "plain").items
    for one, other in zip(ours, plain, strict=True):
        assert one.metrics["loss"].value == pytest.approx(other.metrics["loss"].value, rel=1e-5)
        assert one.metrics["loss"].weight == other.metrics["loss"].weight


def test_reasoning_and_answer_are_what_is_scored():
    solved = Solved("Is 7 odd?", "It is not even.", "yes")
    assert (solved.context, solved.continuation) == (
        "Question: Is 7 odd?\nAnswer:",
        " It is not even.\nThe answer is yes",
    )
    assert Solved("Is 7 odd?", "", "yes").continuation == " yes"
    program = Solved("def f():\n", "", "    return 1\n", program=True)
    assert program.context + program.continuation == "def f():\n    return 1\n"


def test_worked_answers_of_gsm8k_are_taken_apart():
    solved = solved_gsm8k("How many?", "He has 2*3=<<2*3=6>>6 apples.\nThat is all.\n#### 6")
    assert solved == Solved("How many?", "He has 2*3=6 apples.\nThat is all.", "6")
    with pytest.raises(TaskError, match="ends in a line '#### answer'"):
        solved_gsm8k("?", "six")


def test_built_in_data_is_read():
    for name, items in (("gsm8k", 100), ("humaneval", 164)):
        task = scaling_bench_task(f"scaling_bench:{name}")
        assert len(task.hashes()) == items
        assert all(solved.continuation.strip() for solved in task.solved)


def test_bad_names_and_files_are_named(path):
    with pytest.raises(TaskError, match=r"there are scaling_bench:gsm8k, .* and scaling_bench:<file>.jsonl"):
        make_tasks(["scaling_bench:mmlu"])
    with pytest.raises(TaskError, match="No such file"):
        make_tasks(["scaling_bench:nothing.jsonl"])
    solved, rejects = read_solved(path)
    assert [one.answer for one in solved] == ["5", "yes", "24"]
    assert [reject.reason for reject in rejects] == ["it is list, not an object", "'reasoning' is missing"]


def test_the_builder_takes_what_is_given_and_replays_what_is_written(tmp_path):
    records = [
        {"question": "2 + 3?", "answer": 5, "solution": "Five."},
        {"question": "Which is odd?", "choices": ["4", "7"], "answer": 1},
        {"question": "Which is even?", "choices": ["4", "7"], "answer": "9"},
        {"answer": "no question"},
    ]
    with serve(lambda prompt: "Seven leaves a rest of one.") as server:
        cache = ReplyCache(tmp_path / "replies.sqlite")
        client = OpenAIClient(server.url, cache=cache)
        built = build(records, tmp_path / "a.jsonl", client=client, model="writer")
        again = build(records, tmp_path / "b.jsonl", client=client, model="writer")
        assert len(server.requests) == 1
        body = server.requests[0][2]
    assert (built.records, built.given, built.generated, len(built.rejects)) == (2, 1, 1, 2)
    assert built == again
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert "Which is odd?\nA. 4\nB. 7" in body["messages"][0]["content"]
    assert "Correct answer: B" in body["messages"][0]["content"]
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["reasoning_by"] for row in rows] == ["given", "writer"]
    (task,) = make_tasks([f"scaling_bench:{tmp_path / 'a.jsonl'}"])
    assert task.solved[1].reasoning == "Seven leaves a rest of one."


def test_without_an_endpoint_only_given_solutions_are_taken(tmp_path):
    built = build(
        [{"question": "a?", "answer": "b", "rationale": "c"}, {"question": "a?", "answer": "b"}], tmp_path / "a.jsonl"
    )
    assert (built.records, built.generated) == (1, 0)
    assert built.rejects == (("a?", "it has no reasoning, and there is no endpoint"),)
    with pytest.raises(InputError, match="no record could be used"):
        build([{"question": "a?", "answer": "b"}], tmp_path / "b.jsonl")
    with pytest.raises(InputError, match=r"build\.model = ''"):
        build([], tmp_path / "c.jsonl", client=OpenAIClient("http://localhost:1/v1"))


class Writer:
    """An endpoint that answers with half of a character."""

    def post(self, path, body, parse):
        return "one \ud800 two"


def test_odd_records_and_replies_are_set_aside(tmp_path):
    odd = [
        "a text",
        None,
        {"question": "a?", "answer": -1, "choices": ["x", "y"], "solution": "s"},
        {"question": "a?", "answer": "A", "choices": {"text": ["x"], "label": ["A"]}, "solution": "s"},
        {"question": 3, "answer": 0, "choices": ["x"], "solution": "s"},
        {"question": "a?", "answer": {}, "solution": "s"},
        {"question": "a?", "answer": "b", "solution": ["s"]},
    ]
    built = build([*odd, {"question": "a?", "answer": "b"}], tmp_path / "a.jsonl", client=Writer(), model="m")
    assert (built.records, len(built.rejects)) == (1, len(odd))
    assert read_solved(tmp_path / "a.jsonl")[0][0].reasoning == "one ? two"


def test_a_question_that_the_endpoint_refuses_is_set_aside(tmp_path):
    records = [{"question": "a short one?", "answer": "b"}, {"question": "a long one?", "answer": "b"}]

    def answer(prompt):
        return Reply(400, "too many tokens") if "a long one?" in prompt else "Because."

    with serve(answer) as server:
        client = OpenAIClient(server.url)
        built = build(records, tmp_path / "a.jsonl", client=client, model="m")
        assert (built.records, built.rejects[0][0]) == (1, "a long one?")
        assert "answered 400" in built.rejects[0][1]
        with pytest.raises(EndpointError, match=r"answered 400 .*too many tokens"):
            build(records[1:], tmp_path / "b.jsonl", client=client, model="m")


def echoing(prompt):
    """A model of one token a letter, each of a hundredth more nats than its place in the prompt."""
    scores = [None, *(-0.01 * place for place in range(1, len(prompt) + 1))]
    found = {"text_offset": list(range(len(prompt) + 1)), "token_logprobs": scores}
    return Reply(200, json.dumps({"choices": [{"index": 0, "text": prompt + "x", "logprobs": found}]}))


def test_an_endpoint_that_echoes_is_scored_as_ours(path, tmp_path, lm):
    (task,) = make_tasks([f"scaling_bench:{path}"])
    build_task(lm, task, Settings())
    with serve(echoing) as server:
        scores = EndpointScores(OpenAIClient(server.url), "echo")
        items = run_task(scores, task, tmp_path / "out").items
        body = server.requests[0][2]
    assert (body["echo"], body["logprobs"], body["model"]) == (True, 1, "echo")
    for item in items:
        start, end = len(item.prompt), len(item.prompt) + len(item.target)
        assert item.metrics["loss"].value == pytest.approx(0.01 * sum(range(start, end)))
        assert item.metrics["loss"].weight == len(item.target)
    assert estimates(items)["loss"].n == 3


def test_an_endpoint_without_log_probabilities_is_refused():
    with serve(lambda prompt: "text") as server, pytest.raises(EndpointError, match="needs completions with echo"):
        EndpointScores(OpenAIClient(server.url), "mute").score([("a", "b")])


@pytest.fixture(scope="module")
def lm(random_model):

    return CpmJaxLM(random_model.config, random_model.params, random_model.tokenizer, batch_size=4)


@pytest.mark.parametrize("logprobs", [[None, -1.0], [None, float("nan"), -1.0], None])
def test_an_endpoint_that_answers_badly_is_named(logprobs):
    found = {"text_offset": [0, 1, 2], "token_logprobs": logprobs}
    reply = Reply(200, json.dumps({"choices": [{"logprobs": found}]}))
    with serve(lambda prompt: reply) as server, pytest.raises(EndpointError, match=r"did not answer as|no log-prob"):
        EndpointScores(OpenAIClient(server.url, max_retries=0), "odd").score([("a", "b")])
