"""A server that speaks OpenAI's API, with whatever answers a test wants it to give."""

import contextlib
import http.server
import json
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What is sent instead of an answer."""

    status: int
    body: str = ""
    headers: Mapping[str, str] = types.MappingProxyType({})


class Server(NamedTuple):
    """A running server: its base URL and the requests so far, as (path, headers, body)."""

    url: str
    requests: list[tuple[str, dict[str, str], dict[str, Any]]]


@contextlib.contextmanager
def serve(answer: Callable[[Any], str | Reply | None]) -> Iterator[Server]:
    """Answers each prompt, last message, or list of texts to embed with what `answer` says of it."""
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers), body))
            chat = self.path == "/v1/chat/completions"
            if self.path == "/v1/embeddings":
                said = answer(body["input"])
            else:
                said = answer(body["messages"][-1]["content"] if chat else body["prompt"])
            if not isinstance(said, Reply):
                choice = {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
                said = Reply(200, json.dumps({"choices": [{"index": 0} | choice]}))
            data = said.body.encode()
            self.send_response(said.status)
            for name, value in ({"Content-Length": str(len(data))} | dict(said.headers)).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Is silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{server.server_port}/v1", requests)
        finally:
            server.shutdown()
            thread.join()
