"""Answers of a server that speaks OpenAI's API: vLLM, llama.cpp, SGLang, TGI and others."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.evaluation.ruler.question import PromptFormat, Question
from cpm_jax.tools.openai_client import OpenAIClient, completion_text


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
        if chat:
            tokenizer.require_chat_template()
        self._client = OpenAIClient(url, api_key=api_key, timeout_s=timeout_s, max_retries=max_retries, pause_s=pause_s)
        self.prompt_format = PromptFormat(tokenizer, "closed" if chat else "plain")
        self._model, self._chat, self._parallel = model, chat, parallel

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
            return self._client.post("chat/completions", body, completion_text)
        body["prompt"] = self.prompt_format.text(question.body, question.answer_prefix)
        return self._client.post("completions", body, completion_text)
