"""Scorers behind a server that speaks OpenAI's API: a language model as judge, and a linear model of embeddings.

They have the fastText classifier's signature, texts to scores in [0, 1], and may stand in for it. Every reply is kept
in a cache on disk, so that a run can be repeated, or gone on with, without the server.
"""

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Bool, Float
from pydantic import PositiveFloat, PositiveInt

from cpm_jax.common.config import ConfigError, InputError, config_dataclass
from cpm_jax.common.files import write_json
from cpm_jax.tools.openai_client import OpenAIClient, ReplyCache, completion_text, embeddings

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

JUDGE_PROMPT = """\
Rate how much a language model would learn from the following text, from 0 to 5.
0: nothing: advertising, menus, lists of links, garbled or repeated text.
3: some: readable and on a subject, but shallow, disordered or mostly opinion.
5: a lot: correct, well organised and explained, as in a good textbook, documentation or encyclopedia.
Answer with the number alone.

Text:
{text}"""


@config_dataclass
class JudgeConfig:
    """A language model that rates texts.

    Attributes:
        endpoint: base URL of the server's API.
        model: its name there.
        prompt: the question; `{text}` is where the text goes.
        highest: the best rating; scores are ratings divided by it.
        max_characters: of a text that are shown.
        max_tokens: of the answer.
        parallel: requests under way at a time.
        api_key: sent as a bearer token where it is not empty.
    """

    endpoint: str
    model: str
    prompt: str = JUDGE_PROMPT
    highest: PositiveFloat = 5.0
    max_characters: PositiveInt = 8000
    max_tokens: PositiveInt = 16
    parallel: PositiveInt = 8
    api_key: str = ""

    def __post_init__(self) -> None:
        if "{text}" not in self.prompt:
            raise ConfigError("JudgeConfig.prompt: must have {text} where the text goes", "JudgeConfig.prompt")


class Judge:
    """Scores texts by what a language model says of them."""

    def __init__(self, config: JudgeConfig, cache: Path):
        """Nothing is sent yet.

        Args:
            config: which model, and what it is asked.
            cache: file of the replies.
        """
        self._config = config
        self._client = OpenAIClient(config.endpoint, api_key=config.api_key, cache=ReplyCache(cache))

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """The score of each text.

        Raises:
            EndpointError: the server fails, or answers without a number again and again.
        """
        with ThreadPoolExecutor(self._config.parallel) as pool:
            return np.array(list(pool.map(self._score, texts)), np.float64)

    def _score(self, text: str) -> float:
        # Not str.format: a text may have braces.
        content = self._config.prompt.replace("{text}", text[: self._config.max_characters])
        body = {
            "model": self._config.model,
            "temperature": 0,
            "max_tokens": self._config.max_tokens,
            "messages": [{"role": "user", "content": content}],
        }
        return self._client.post("chat/completions", body, self._rating)

    def _rating(self, reply: Any) -> float:
        said = completion_text(reply)
        found = _NUMBER.search(said)
        if not found:
            raise ValueError(f"no number in {said!r}")
        return float(np.clip(float(found[0]) / self._config.highest, 0.0, 1.0))


@config_dataclass
class EmbeddingConfig:
    """A linear classifier of embeddings.

    Attributes:
        endpoint: base URL of the server's API.
        model: name of the embedding model there.
        l2: penalty of half the squared weights, beside the summed loss of the examples.
        max_characters: of a text that are embedded.
        batch_size: texts in a request.
        api_key: sent as a bearer token where it is not empty.
    """

    endpoint: str
    model: str
    l2: PositiveFloat = 1.0
    max_characters: PositiveInt = 8000
    batch_size: PositiveInt = 64
    api_key: str = ""


class Embedder:
    """Gives the embeddings of texts."""

    def __init__(self, config: EmbeddingConfig, cache: Path):
        """Nothing is sent yet; `cache` is the file of the replies."""
        self._config = config
        self._client = OpenAIClient(config.endpoint, api_key=config.api_key, cache=ReplyCache(cache))

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """The embedding of each text, of length 1.

        Raises:
            EndpointError: the server fails.
        """
        size, cut = self._config.batch_size, self._config.max_characters
        rows: list[list[float]] = []
        for first in range(0, len(texts), size):
            part = [text[:cut] for text in texts[first : first + size]]
            rows += self._client.post("embeddings", {"model": self._config.model, "input": part}, _as_many(len(part)))
        vectors = np.array(rows, np.float64)
        return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _as_many(count: int) -> Callable[[Any], list[list[float]]]:
    def parse(reply: Any) -> list[list[float]]:
        vectors = list(embeddings(reply))
        if len(vectors) != count:
            raise ValueError(f"{len(vectors)} embeddings of {count} texts")
        return vectors

    return parse


class EmbeddingClassifier:
    """Logistic regression on embeddings."""

    def __init__(
        self, embed: Callable[[Sequence[str]], Float[np.ndarray, "n d"]], weights: Float[np.ndarray, " d"], bias: float
    ):
        """Takes the function that embeds, and what was fitted."""
        self._embed, self.weights, self.bias = embed, weights, bias

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, " n"]:
        """The probability of each text."""
        if not texts:
            return np.zeros(0)
        # Row by row: a matrix product's rounding would depend on how many texts are scored together.
        return scipy.special.expit(np.sum(self._embed(texts) * self.weights, axis=-1) + self.bias)

    def save(self, folder: Path) -> None:
        """Writes `linear.json`."""
        write_json(folder / "linear.json", {"weights": self.weights.tolist(), "bias": self.bias})

    @classmethod
    def load(cls, folder: Path, embed: Callable[[Sequence[str]], Float[np.ndarray, "n d"]]) -> "EmbeddingClassifier":
        """Loads what `save` wrote.

        Raises:
            InputError: the folder has no such file.
        """
        try:
            saved = json.loads((folder / "linear.json").read_text("utf-8"))
            return cls(embed, np.array(saved["weights"], np.float64), float(saved["bias"]))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder} holds no linear classifier: {error!r}") from error


def fit_logistic(
    vectors: Float[np.ndarray, "n d"], labels: Bool[np.ndarray, " n"], l2: float
) -> tuple[Float[np.ndarray, " d"], float]:
    """Weights and bias that minimise Σ log-loss + l2/2 · |weights|²; the bias is not penalised."""
    signs = np.where(labels, 1.0, -1.0)

    def loss(theta: Float[np.ndarray, " d+1"]) -> tuple[float, Float[np.ndarray, " d+1"]]:
        weights, bias = theta[:-1], theta[-1]
        margins = signs * (vectors @ weights + bias)
        slope = -signs * scipy.special.expit(-margins)
        value = np.logaddexp(0, -margins).sum() + l2 / 2 * weights @ weights
        return float(value), np.append(vectors.T @ slope + l2 * weights, slope.sum())

    found = scipy.optimize.minimize(loss, np.zeros(vectors.shape[1] + 1), jac=True, method="L-BFGS-B", tol=1e-10)
    return found.x[:-1], float(found.x[-1])
