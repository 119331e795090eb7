"""An n-gram model: interpolated Kneser-Ney smoothing with modified discounts (Chen and Goodman 1999, §4.3).

It is trained on the tokens that the neural model was trained on and scored on the same held-out tokens, so that it
shows what counting alone gives. Probabilities sum to one over the vocabulary for every context.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class _Order:
    """The n-grams of one order.

    An n-gram is known by a number, its place in the sorted `keys`; a key is (number of the first n - 1 tokens) * V +
    last token, which fits 64 bits at any order.

    Attributes:
        keys: sorted, int64.
        discounted: count less discount of each n-gram, float64.
        totals: by number of the context: the sum of the counts.
        left: by number of the context: what the discounts leave for the order below, the sum of them.
    """

    keys: Int[np.ndarray, " n"]
    discounted: Float[np.ndarray, " n"]
    totals: Float[np.ndarray, " c"]
    left: Float[np.ndarray, " c"]


def _discounts(counts: Int[np.ndarray, " n"]) -> tuple[float, float, float]:
    """D1, D2 and D3+ by Chen and Goodman's equation 26, from how many n-grams occur once, twice, three and four times.

    Where a corpus has no n-grams of one of these counts the estimate does not exist; D = k - 1/2 is taken then.
    """
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return 0.5, 0.75, 1.0
    y = n1 / (n1 + 2 * n2)
    estimates = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return tuple(min(max(d, 0.05), k - 0.05) for k, d in enumerate(estimates, start=1))  # type: ignore[return-value]


class NgramModel:
    """A trained model.

    Attributes:
        order: longest n-gram.
        vocab_size: V, the number of tokens over which probabilities sum to one.
        num_ngrams: stored n-grams of all orders.
    """

    def __init__(self, documents: Sequence[np.ndarray], vocab_size: int, order: int = 5):
        """Counts.

        Memory is about 60 bytes a token and order while counting, so 10 million tokens take 3 GB at order 5.

        Args:
            documents: tokens of each; n-grams do not reach across. The first token of each is context only.
            vocab_size: V, more than any token.
            order: longest n-gram.

        Raises:
            ValueError: a token is not below `vocab_size`, or no document has two tokens.
        """
        self.order, self.vocab_size = order, vocab_size
        tokens, index = _flatten(documents)
        if len(tokens) and tokens.max() >= vocab_size:
            raise ValueError(f"token {tokens.max()} is not below vocab_size = {vocab_size}")
        if not (index > 0).any():
            raise ValueError("no document has two tokens: there is nothing to count")
        # number[i]: which n-gram of the current order ends at i; -1 where the document is too short for one.
        number = np.zeros(len(tokens), np.int64)
        keys_of: list[np.ndarray] = []
        raw: list[np.ndarray] = []
        suffix: list[np.ndarray] = []  # number, one order below, of the last n - 1 tokens
        for n in range(1, order + 1):
            # The unigram table holds the tokens that open documents too, as contexts.
            ends = np.flatnonzero(index >= n - 1)
            if not len(ends):
                break
            keys = (number[ends - 1] if n > 1 else 0) * vocab_size + tokens[ends]
            unique, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            if n == 1:
                counts = np.bincount(inverse, weights=index[ends] > 0, minlength=len(unique)).astype(np.int64)
            keys_of.append(unique)
            raw.append(counts)
            suffix.append(number[ends[first]] if n > 1 else np.zeros(len(unique), np.int64))
            number = np.full(len(tokens), -1)
            number[ends] = inverse
        self._orders = []
        for n, (keys, counts) in enumerate(zip(keys_of, raw, strict=True), start=1):
            if n < len(keys_of):
                # Below the highest order: in how many different contexts an n-gram occurs. One that only opens
                # documents has no context; it keeps its count.
                kinds = np.bincount(suffix[n], minlength=len(keys))
                counts = np.where(kinds > 0, kinds, counts)
            self._orders.append(self._smooth(keys, counts, len(keys_of[n - 2]) if n > 1 else 1))
        self.num_ngrams = sum(len(item.keys) for item in self._orders)

    def _smooth(self, keys: np.ndarray, counts: np.ndarray, num_contexts: int) -> _Order:
        contexts = keys // self.vocab_size
        discounts = np.array([0.0, *_discounts(counts)])[np.minimum(counts, 3)]
        totals = np.bincount(contexts, weights=counts, minlength=num_contexts)
        left = np.bincount(contexts, weights=discounts, minlength=num_contexts)
        return _Order(keys, counts - discounts, totals, left)

    def log_probabilities(self, documents: Sequence[np.ndarray]) -> list[Float[np.ndarray, " n"]]:
        """Natural logarithms of the probability of every token but the first of each document."""
        tokens, index = _flatten(documents)
        probability = np.full(len(tokens), 1 / self.vocab_size)
        context = np.zeros(len(tokens), np.int64)  # number of the n - 1 tokens before each; -1 unknown
        for n, table in enumerate(self._orders, start=1):
            known = (context >= 0) & (index >= n - 1)
            found, number = _find(table.keys, context * self.vocab_size + tokens)
            number = np.where(known & found, number, -1)
            total = np.where(known, table.totals[np.where(known, context, 0)], 0)
            counted = total > 0  # elsewhere the context was never followed by anything: the order below decides
            discounted = np.where(number >= 0, table.discounted[np.maximum(number, 0)], 0)
            left = table.left[np.where(known, context, 0)]
            probability = np.where(
                counted, (discounted + left * probability) / np.where(counted, total, 1), probability
            )
            context = np.concatenate([[-1], number[:-1]])
        ends = np.cumsum([len(document) for document in documents])[:-1]
        return [part[1:] for part in np.split(np.log(probability), ends)]

    def document_bits(self, documents: Sequence[np.ndarray]) -> Float[np.ndarray, " n"]:
        """Bits of each document, without its first token."""
        return np.array([-part.sum() / math.log(2) for part in self.log_probabilities(documents)])


def _flatten(documents: Sequence[np.ndarray]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """All tokens, and the index of each within its document."""
    tokens = np.concatenate([np.zeros(0, np.int64), *(np.asarray(document, np.int64) for document in documents)])
    index = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(document)) for document in documents)])
    return tokens, index


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each wanted key is among the sorted keys, and where."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return keys[place] == wanted, place
