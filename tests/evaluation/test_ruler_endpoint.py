"""Asking a server that speaks OpenAI's API: what is sent, what is retried, and what is said when it fails."""

import socket
import threading
import time

import pytest

from cpm_jax.data.errors import DataError
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.ruler.endpoint import EndpointAnswers
from cpm_jax.evaluation.ruler.question import Question
from cpm_jax.tools import openai_client
from cpm_jax.tools.openai_client import EndpointError
from tests.evaluation.openai_server import Reply, serve

GOOD = '{"choices": [{"index": 0, "text": " fine"}]}'


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the quick brown fox "], vocab_size=270)


def question(index, body="Who?"):
    return Question("qa", 100, index, f"{body} {index}", "\nAnswer:", ("me",), (), "part", 9, 32)


def asked(url, tokenizer, **options):
    return EndpointAnswers(url, "a model", tokenizer, **{"pause_s": 0.01} | options)


def test_a_completion(tokenizer):
    with serve(lambda prompt: f" {prompt[::-1]}") as server:
        assert asked(server.url, tokenizer, api_key="secret").answer(question(1)) == " :rewsnA\n1 ?ohW"
    ((path, headers, body),) = server.requests
    assert path == "/v1/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body == {"model": "a model", "temperature": 0, "max_tokens": 32, "prompt": "Who? 1\nAnswer:"}


def test_a_chat(tokenizer):
    with serve(lambda prompt: prompt.upper()) as server:
        assert asked(server.url + "/", tokenizer, chat=True).answer(question(1)) == "WHO? 1\nANSWER:"
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert body["messages"] == [{"role": "user", "content": "Who? 1\nAnswer:"}]


def test_many_at_a_time_and_each_with_its_own_answer(tokenizer):
    six = threading.Barrier(6, timeout=60)

    def slow(prompt):
        six.wait()  # breaks where fewer are asked at a time
        return prompt.split()[1]

    questions = [question(index) for index in range(12)]
    with serve(slow) as server:
        answers = dict(asked(server.url, tokenizer, parallel=6).stream(questions))
    assert answers == {question: str(question.index) for question in questions}


def test_no_text_is_an_empty_answer(tokenizer):
    with serve(lambda prompt: None) as server:
        assert asked(server.url, tokenizer, chat=True).answer(question(1)) == ""


@pytest.mark.parametrize(
    "failure",
    [
        Reply(429, "slow down", {"Retry-After": "0"}),
        Reply(500, "oops"),
        Reply(503, "loading"),
        Reply(200, "<html>"),
        Reply(200, '{"choices": []}'),
        Reply(200, '{"choices": [{"text": 3}]}'),
        Reply(200, '{"error": "x"}'),
        Reply(200, "[]"),
        Reply(200, GOOD, {"Content-Length": "500"}),  # breaks off
    ],
    ids=lambda reply: f"{reply.status} {reply.body[:20]}",
)
def test_what_may_pass_is_asked_again(tokenizer, failure):
    replies = [Reply(200, GOOD), failure, failure]
    with serve(lambda prompt: replies.pop()) as server:
        assert asked(server.url, tokenizer, timeout_s=1.0).answer(question(1)) == " fine"
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_what_was_refused_is_not_asked_again(tokenizer, status):
    with (
        serve(lambda prompt: Reply(status, '{"error": "context is too long"}')) as server,
        pytest.raises(EndpointError, match=rf"/v1/completions answered {status} .*context is too long"),
    ):
        list(asked(server.url, tokenizer).stream([question(1)]))
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(500, "out of memory"), r"answered 500 .*: out of memory; given up after 3 attempts"),
        (Reply(200, "<html>"), r"did not answer as OpenAI's API does .*<html>; given up"),
    ],
)
def test_what_does_not_pass_is_given_up(tokenizer, reply, said):
    with serve(lambda prompt: reply) as server, pytest.raises(EndpointError, match=said):
        asked(server.url, tokenizer, max_retries=2).answer(question(1))
    assert len(server.requests) == 3


def test_pauses_double_unless_the_server_says_how_long(tokenizer, monkeypatch):
    pauses = []
    monkeypatch.setattr(openai_client.time, "sleep", pauses.append)
    replies = [Reply(429, "", {"Retry-After": "7"}), Reply(429, "", {"Retry-After": "Fri, 01 Jan 2027 00:00:00 GMT"})]
    replies += [Reply(500)] * 7
    with serve(lambda prompt: replies.pop() if replies else "x") as server:
        asked(server.url, tokenizer, pause_s=1.0, max_retries=9).answer(question(1))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 7]


def test_nobody_there(tokenizer):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=r"cannot be reached: .*refused; given up after 2 attempts"):
            asked(url, tokenizer, max_retries=1).answer(question(1))


def test_too_slow(tokenizer):
    def answer(prompt):
        time.sleep(0.3)
        return "x"

    with serve(answer) as server, pytest.raises(EndpointError, match="timed out"):
        asked(server.url, tokenizer, timeout_s=0.1, max_retries=0).answer(question(1))


def test_one_failure_ends_the_stream_and_what_waits_is_not_asked(tokenizer):
    def answer(prompt):
        return Reply(400, "no") if prompt.startswith("Who? 0\n") else "x"

    with serve(answer) as server, pytest.raises(EndpointError, match="400"):
        list(asked(server.url, tokenizer, parallel=1).stream([question(index) for index in range(200)]))
    assert len(server.requests) < 200


def test_what_cannot_be_asked(tokenizer, tmp_path):
    with pytest.raises(EndpointError, match=r"'localhost:80': it must begin with http://"):
        asked("localhost:80", tokenizer)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no chat template"):
        asked("http://localhost/v1", Tokenizer.load(tmp_path), chat=True)
