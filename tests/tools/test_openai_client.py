"""What the client keeps and sends; what it retries is tested where it is used, in tests/evaluation."""

import pytest

from cpm_jax.tools.openai_client import EndpointError, OpenAIClient, ReplyCache, completion_text
from tests.evaluation.openai_server import Reply, serve

BODY = {"model": "m", "prompt": "Who?"}


def test_a_reply_is_kept_by_path_and_body_and_not_by_address(tmp_path):
    with serve(lambda prompt: f"{prompt} me") as server:
        client = OpenAIClient(server.url, cache=ReplyCache(tmp_path / "replies"))
        assert [client.post("completions", BODY, completion_text) for _ in range(2)] == ["Who? me"] * 2
        assert client.post("completions", BODY | {"prompt": "Why?"}, completion_text) == "Why? me"
        assert len(server.requests) == 2
    elsewhere = OpenAIClient("http://localhost:1/v1", cache=ReplyCache(tmp_path / "replies"), max_retries=0)
    assert elsewhere.post("completions", BODY, completion_text) == "Who? me"


def test_a_reply_that_is_none_is_not_kept(tmp_path):
    replies = [Reply(200, '{"error": "busy"}'), "me"]
    with serve(lambda prompt: replies.pop(0)) as server:
        client = OpenAIClient(server.url, cache=ReplyCache(tmp_path / "replies"), pause_s=0.01)
        assert client.post("completions", BODY, completion_text) == "me"


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "replies").write_text("something else, and long enough to be taken for a database header" * 20)
    with pytest.raises(EndpointError, match=r"replies is not a cache of replies"):
        ReplyCache(tmp_path / "replies")
