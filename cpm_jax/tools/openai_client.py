"""The one client of servers that speak OpenAI's HTTP API: retries what may pass, and can replay from a cache."""

import hashlib
import http.client
import json
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cpm_jax.common.config import InputError

T = TypeVar("T")

# Statuses after which the same request may succeed: timeouts, too many requests, a server that is starting or restarts.
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE = 60.0  # seconds
_SHOWN = 500  # characters of what a server said


class EndpointError(InputError):
    """A server that cannot be reached, refuses a request, or does not answer as the API says."""


class RefusedError(EndpointError):
    """A request that the server would refuse again: too long for the model, or for no model that it has."""


class _Transient(Exception):
    """A failure after which the request is sent again, `pause` seconds later where the server said so."""

    def __init__(self, message: str, pause: float | None = None):
        super().__init__(message)
        self.pause = pause


class ReplyCache:
    """Replies on disk by the hash of their request; several threads may use it, and processes one after the other."""

    def __init__(self, path: Path):
        """Opens the file, or makes it.

        Raises:
            EndpointError: it is no such cache.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply BLOB)")
        except sqlite3.DatabaseError as error:
            raise EndpointError(f"{path} is not a cache of replies: {error}") from error

    def get(self, key: str) -> bytes | None:
        """The reply, if there is one."""
        with self._lock:
            row = self._database.execute("SELECT reply FROM replies WHERE request = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: str, reply: bytes) -> None:
        """Keeps a reply."""
        with self._lock:
            self._database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, reply))

    def close(self) -> None:
        """Closes the file."""
        self._database.close()


class OpenAIClient:
    """Sends requests to one server."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str = "",
        timeout_s: float = 600.0,
        max_retries: int = 6,
        pause_s: float = 1.0,
        cache: ReplyCache | None = None,
    ):
        """Nothing is sent yet.

        Args:
            url: base of the API, such as "http://localhost:8000/v1".
            api_key: sent as a bearer token where it is not empty.
            timeout_s: after which a request is given up.
            max_retries: how often a request is sent again that failed for a reason that may pass.
            pause_s: before the first of these; twice as long before each further one, up to a minute, or as long as
                the server asks for.
            cache: where replies are looked up before anything is sent, and kept. The key is the request's path and
                body: the same model behind another address gives the same replies.

        Raises:
            EndpointError: the URL is none.
        """
        if not url.startswith(("http://", "https://")):
            raise EndpointError(f"endpoint {url!r}: it must begin with http:// or https://")
        self._base = url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout, self._max_retries, self._pause, self._cache = timeout_s, max_retries, pause_s, cache

    def post(self, path: str, body: Mapping[str, Any], parse: Callable[[Any], T]) -> T:
        """Sends a request, unless its reply is cached.

        Args:
            path: below the base, such as "chat/completions".
            body: the request.
            parse: takes what is wanted from the reply's JSON; a LookupError, TypeError or ValueError from it says that
                the reply is none, and the request is sent again.

        Raises:
            RefusedError: the request was refused.
            EndpointError: it failed again and again.
        """
        data = json.dumps(body).encode("ascii")
        key = hashlib.sha256(path.encode() + b"\0" + data).hexdigest()
        url = f"{self._base}/{path}"
        if self._cache is not None and (kept := self._cache.get(key)) is not None:
            return parse(json.loads(kept))
        for attempt in range(self._max_retries + 1):
            try:
                reply = self._send(url, data)
                parsed = _parsed(url, reply, parse)
                if self._cache is not None:
                    self._cache.put(key, reply)
                return parsed
            except _Transient as error:
                if attempt == self._max_retries:
                    raise EndpointError(f"{error}; given up after {attempt + 1} attempts") from error
                pause = self._pause * 2**attempt if error.pause is None else error.pause
                time.sleep(min(pause, _LONGEST_PAUSE))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _send(self, url: str, data: bytes) -> bytes:
        request = urllib.request.Request(url, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace")[:_SHOWN]
            message = f"{url} answered {error.code} {error.reason}: {said}"
            if error.code in _RETRIED:
                raise _Transient(message, _seconds(error.headers.get("Retry-After"))) from error
            raise RefusedError(message) from error
        except (OSError, http.client.HTTPException) as error:  # no connection, or it broke, or it took too long
            reason = getattr(error, "reason", None) or error
            raise _Transient(f"{url} cannot be reached: {reason}") from error


def _parsed(url: str, reply: bytes, parse: Callable[[Any], T]) -> T:
    try:
        return parse(json.loads(reply))
    except (ValueError, LookupError, TypeError) as error:
        said = reply.decode("utf-8", "replace")[:_SHOWN]
        raise _Transient(f"{url} did not answer as OpenAI's API does ({error!r}): {said}") from error


def _seconds(retry_after: str | None) -> float | None:
    """The header as seconds; None where it is missing or a date."""
    return float(retry_after) if retry_after and retry_after.strip().isdecimal() else None


def completion_text(reply: Any) -> str:
    """The text of a reply of `completions` or `chat/completions`; "" where a model used all of its tokens to think."""
    choice = reply["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    if text is not None and not isinstance(text, str):
        raise TypeError(f"its text is {text!r}")
    return text or ""


def embeddings(reply: Any) -> Iterator[list[float]]:
    """The vectors of a reply of `embeddings`, in the order of the texts."""
    rows = sorted(reply["data"], key=lambda row: row["index"])
    return iter([[float(value) for value in row["embedding"]] for row in rows])
