"""Held-out loss as bits per byte of text, which models with different tokenizers, and compressors, can be compared by.

Definition: the sum over all documents of -log2 p(document), divided by the bytes of the documents' text in UTF-8, as
`prepare` cleaned it. p(document) is the product over all tokens of p(token | the tokens of the document before it). It
includes the token that ends a document. A BOS is given, not predicted; the first token is predicted from it. Where a
tokenizer has no BOS, nothing precedes the first token, and it is charged log2(vocabulary size).

A document longer than the window is read in windows that overlap by half: each token is predicted once, and past the
first window from at least half a window of its own document.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from cpm_jax.evaluation.documents import Documents
from cpm_jax.inference.scoring import Scorer
from cpm_jax.modeling.config import ModelConfig

_ROWS = 256  # read together, where they are short


@dataclass(frozen=True)
class BitsPerByte:
    """A score of some text.

    Attributes:
        value: bits per byte.
        standard_error: of the value, as an estimate for the documents' source: documents are taken as independent
            draws, and the value as a ratio of their sums (linearised). None of a single document.
        bits: total.
        num_bytes: of the original text.
        tokens: predicted tokens.
        documents: number of documents.
    """

    value: float
    standard_error: float | None
    bits: float
    num_bytes: int
    tokens: int
    documents: int

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.4f}"
        return f"{self.value:.4f}{error} bits per byte ({self.documents} document{'s' * (self.documents != 1)})"


def summarise(document_bits: Float[np.ndarray, " n"], documents: Documents) -> BitsPerByte:
    """The score of a split from the bits of each of its documents."""
    bits, sizes, num_bytes = document_bits, documents.document_bytes, documents.text_bytes
    value = float(bits.sum() / num_bytes)
    n = len(bits)
    deviations = bits - value * sizes
    error = math.sqrt(float((deviations**2).sum()) * n / (n - 1)) / num_bytes if n > 1 else None
    tokens = sum(len(tokens) - 1 for tokens in documents.tokens)
    return BitsPerByte(value, error, float(bits.sum()), num_bytes, tokens, n)


def first_token_bits(documents: Documents, bos_id: int | None, vocab_size: int) -> Float[np.ndarray, " n"]:
    """Bits charged for tokens that nothing precedes: none for a BOS, log2(vocab_size) for any other."""
    charged = [bool(len(tokens)) and int(tokens[0]) != bos_id for tokens in documents.tokens]
    return np.array(charged, np.float64) * math.log2(vocab_size)


@dataclass(frozen=True)
class _Window:
    document: int
    begin: int
    end: int  # of the inputs: targets are begin + 1 … end
    first_scored: int  # index of the first target that counts


def _windows(lengths: Sequence[int], size: int) -> Iterator[_Window]:
    stride = max(1, size // 2)
    for document, length in enumerate(lengths):
        begin, scored = 0, 1
        while scored < length:
            end = min(begin + size, length - 1)
            yield _Window(document, begin, end, scored)
            scored = end + 1
            begin += stride


def document_bits(
    params: dict[str, Any], config: ModelConfig, documents: Documents, window: int, *, progress: bool = False
) -> Float[np.ndarray, " n"]:
    """The bits that a model needs for each document, without those of `first_token_bits`.

    Args:
        params: the model's parameters; MTP layers are not used.
        config: the model.
        documents: what to score.
        window: longest row in tokens, the length that the model was trained with.
        progress: whether to show how far it is.
    """
    windows = list(_windows([len(tokens) for tokens in documents.tokens], window))
    requests = []
    for item in windows:
        tokens = documents.tokens[item.document].tolist()
        requests.append((tokens[item.begin : item.first_scored], tokens[item.first_scored : item.end + 1]))
    scores = Scorer(config, params, batch_size=_ROWS).score(requests, progress=progress)
    bits = np.zeros(len(documents), np.float64)
    np.add.at(bits, [item.document for item in windows], [-score.log_likelihood / math.log(2) for score in scores])
    return bits


def evaluate(
    params: dict[str, Any],
    config: ModelConfig,
    documents: Documents,
    *,
    window: int,
    bos_id: int | None,
    progress: bool = False,
) -> BitsPerByte:
    """Bits per byte of a model on documents.

    Args:
        params: the model's parameters.
        config: the model.
        documents: what to score, from `documents.read_split`.
        window: longest row in tokens.
        bos_id: the token that begins a document, if there is one.
        progress: whether to show how far it is.

    Returns:
        The score; `value` is not finite where the model gives a token no probability.
    """
    bits = document_bits(params, config, documents, window, progress=progress)
    return summarise(bits + first_token_bits(documents, bos_id, config.vocab_size), documents)
