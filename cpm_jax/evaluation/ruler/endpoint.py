"""Answers of a server that speaks OpenAI's API: vLLM, llama.cpp, SGLang, TGI and others."""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from cpm_jax.common.config import InputError
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.ruler.question import PromptFormat, Question

# Statuses after which the same request may succeed: timeouts, too many requests, a server that is starting or restarts.
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE = 60.0  # seconds
_SHOWN = 500  # characters of what a server said


class EndpointError(InputError):
    """A server that cannot be reached, refuses a request, or does not answer as the API says."""


class _Transient(Exception):
    """A failure after which the request is sent again, `pause` seconds later where the server said so."""

    def __init__(self, message: str, pause: float | None = None):
        super().__init__(message)
        self.pause = pause


class EndpointAnswers:
    """A model behind `/completions` or `/chat/completions`, asked greedily.

    Attributes:
        prompt_format: what it is given; of a chat, the tokens are counted by the tokenizer's own template.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Tokenizer,
        *,
        chat: bool = False,
        api_key: str = "",
        parallel: int = 8,
        timeout_s: float = 600.0,
        max_retries: int = 6,
        pause_s: float = 1.0,
    ):
        """Nothing is sent yet.

        Args:
            url: base of the API, such as "http://localhost:8000/v1".
            model: name by which the server knows the model.
            tokenizer: of the model, by which prompts are made as long as they are to be.
            chat: whether questions are a user's turns (`/chat/completions`) or texts to continue (`/completions`).
            api_key: sent as a bearer token where it is not empty.
            parallel: requests under way at a time.
            timeout_s: after which a request is given up.
            max_retries: how often a request is sent again that failed for a reason that may pass.
            pause_s: before the first of these; twice as long before each further one, up to a minute, or as long as
                the server asks for.

        Raises:
            EndpointError: the URL is none.
            DataError: `chat`, and the tokenizer has no chat template.
        """
        if not url.startswith(("http://", "https://")):
            raise EndpointError(f"endpoint {url!r}: it must begin with http:// or https://")
        if chat:
            tokenizer.require_chat_template()
        self.prompt_format = PromptFormat(tokenizer, "closed" if chat else "plain")
        self._url = f"{url.rstrip('/')}/{'chat/completions' if chat else 'completions'}"
        self._model, self._chat, self._parallel = model, chat, parallel
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout, self._max_retries, self._pause = timeout_s, max_retries, pause_s

    def stream(self, questions: Sequence[Question]) -> Iterator[tuple[Question, str]]:
        """Answers questions, each as soon as it is known.

        Raises:
            EndpointError: a request was refused, or failed again and again.
        """
        pool = ThreadPoolExecutor(self._parallel)
        try:
            asked = {pool.submit(self.answer, question): question for question in questions}
            for future in as_completed(asked):
                yield asked[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def answer(self, question: Question) -> str:
        """The server's answer; "" where it gives none.

        Raises:
            EndpointError: as `stream`.
        """
        body: dict[str, Any] = {"model": self._model, "temperature": 0, "max_tokens": question.max_new_tokens}
        if self._chat:
            body["messages"] = self.prompt_format.messages(question.body, question.answer_prefix)
        else:
            body["prompt"] = self.prompt_format.text(question.body, question.answer_prefix)
        data = json.dumps(body).encode("ascii")
        for attempt in range(self._max_retries + 1):
            try:
                return self._text(self._post(data))
            except _Transient as error:
                if attempt == self._max_retries:
                    raise EndpointError(f"{error}; given up after {attempt + 1} attempts") from error
                pause = self._pause * 2**attempt if error.pause is None else error.pause
                time.sleep(min(pause, _LONGEST_PAUSE))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _post(self, data: bytes) -> bytes:
        request = urllib.request.Request(self._url, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace")[:_SHOWN]
            message = f"{self._url} answered {error.code} {error.reason}: {said}"
            if error.code in _RETRIED:
                raise _Transient(message, _seconds(error.headers.get("Retry-After"))) from error
            raise EndpointError(message) from error
        except (OSError, http.client.HTTPException) as error:  # no connection, or it broke, or it took too long
            reason = getattr(error, "reason", None) or error
            raise _Transient(f"{self._url} cannot be reached: {reason}") from error

    def _text(self, data: bytes) -> str:
        try:
            choice = json.loads(data)["choices"][0]
            text = choice["message"]["content"] if self._chat else choice["text"]
        except (ValueError, LookupError, TypeError) as error:
            said = data.decode("utf-8", "replace")[:_SHOWN]
            raise _Transient(f"{self._url} did not answer as OpenAI's API does ({error!r}): {said}") from error
        if text is not None and not isinstance(text, str):
            raise _Transient(f"{self._url} did not answer as OpenAI's API does: its text is {text!r}")
        return text or ""  # null where a model used all of its tokens to think


def _seconds(retry_after: str | None) -> float | None:
    """The header as seconds; None where it is missing or a date."""
    return float(retry_after) if retry_after and retry_after.strip().isdecimal() else None
