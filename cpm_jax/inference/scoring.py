"""Log-likelihoods of given tokens: continuations of contexts, in batches of a few static shapes.

Requests are padded on the right to the next of a ladder of lengths (`bucket_length`) and wait until a batch of their
length is full, so that a run compiles at most two programs per rung, whatever it is given. A request's rung depends on
its own length alone and rows never see each other, so neither the other requests nor their order change a result (up to
float rounding).

Only positions that predict a scored token reach the head, a fixed number at a time: logits of a batch never exist
together. The loss kernel would give the negative log-likelihoods too, but not whether each token is the most probable
one, which needs the same logits.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cpm_jax.common.config import InputError
from cpm_jax.common.progress import Progress
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, bind

# A context and its continuation.
Pair = tuple[Sequence[int], Sequence[int]]

SHORTEST_BUCKET = 32
# Tokens of a batch at most: longer rows come in smaller batches.
MAX_BATCH_TOKENS = 8192
# Positions whose logits exist together, and what those may take in float32.
HEAD_ROWS = 256
MAX_LOGITS_BYTES = 2**28


class Score(NamedTuple):
    """The score of one continuation.

    Attributes:
        log_likelihood: natural logarithm of its probability given the context.
        is_greedy: whether each of its tokens is the most probable one.
        num_truncated: tokens of the context that the model did not see, as they did not fit.
    """

    log_likelihood: float
    is_greedy: bool
    num_truncated: int


@dataclasses.dataclass(frozen=True)
class _Row:
    """What the model reads once, for all requests that need it: choices of one token differ only in the target."""

    inputs: tuple[int, ...]
    requests: list[int]


def bucket_length(length: int, config: ModelConfig) -> int:
    """The padded length of a row of `length` tokens: the next of 32, 48, 64, 96, 128, 192, …

    It never exceeds max_position_embeddings, nor, as long as the row does not, a length above which the model computes
    in another way (rotary frequencies, sparse attention): it goes by the length of the row.
    """
    power = max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())
    slots = power * 3 // 4 if length <= power * 3 // 4 and power > SHORTEST_BUCKET else power
    switches = (switch for switch in config.switch_lengths if length <= switch)
    return min(slots, config.max_position_embeddings, *switches)


@functools.partial(jax.jit, static_argnames="config")
def _head_inputs(
    params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], *, config: ModelConfig
) -> Float[Array, "B*T D"]:
    model = bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    hidden = model.head_inputs(model(tokens, positions, segment_ids))
    return hidden.reshape(-1, hidden.shape[-1])


@functools.partial(jax.jit, static_argnames="config")
def _token_scores(
    params: Params,
    head_inputs: Float[Array, "B*T D"],
    places: Int[Array, " R"],
    targets: Int[Array, " R"],
    *,
    config: ModelConfig,
) -> tuple[Float[Array, " R"], Bool[Array, " R"]]:
    """Log-probability of each target at its place, and whether it is the most probable token there."""
    kernel = bind(config, params).lm_head_kernel().astype(head_inputs.dtype)
    logits = jnp.einsum("rd,dv->rv", head_inputs[places], kernel, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


class Scorer:
    """Scores continuations with a model."""

    def __init__(self, config: ModelConfig, params: Params, *, batch_size: int = 8):
        """Keeps what scoring needs; MTP layers, which only serve training, are left out.

        Args:
            config: the model.
            params: its parameters, as in a checkpoint or as `Generator.params`.
            batch_size: rows that are read together, fewer where they are long (`MAX_BATCH_TOKENS`).
        """
        self.config = dataclasses.replace(config, num_nextn_predict_layers=0)
        self._params = {name: value for name, value in params.items() if name != "mtp_layers"}
        self._batch_size = batch_size
        self._head_rows = max(1, min(HEAD_ROWS, MAX_LOGITS_BYTES // (4 * config.vocab_size)))

    def score(self, requests: Sequence[Pair], *, progress: bool = False) -> list[Score]:
        """Scores continuations, each given its context.

        Args:
            requests: as in `stream`. The longest are read first: memory runs out at once or never.
            progress: whether to show how far it is.

        Returns:
            A score for each request, in their order.

        Raises:
            InputError: as in `stream`.
        """
        self._check(requests)
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][0]) - len(requests[index][1]))
        scores = [Score(0.0, True, 0)] * len(requests)
        with Progress("score", len(requests), enabled=progress) as bar:
            for done, (place, score) in enumerate(self._stream([requests[index] for index in order]), start=1):
                scores[order[place]] = score
                bar.update(done)
        return scores

    def stream(self, requests: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        """Scores continuations, each given its context, yielding each as soon as it is known.

        Requests are read about in the order given; one waits until there are enough of its length to fill a batch. Of a
        context that does not fit, the end is kept: the model reads the last max_position_embeddings tokens before the
        last one of the continuation.

        Args:
            requests: pairs of context and continuation, as token ids; a context has at least one.

        Returns:
            An iterator of the index of a request and its score. An empty continuation has log-likelihood 0. The
            requests are checked before it begins.

        Raises:
            InputError: an empty context, a continuation longer than max_position_embeddings, or a token that the model
                does not have; names the request.
        """
        self._check(requests)
        return self._stream(requests)

    def _stream(self, requests: Sequence[Pair]) -> Iterator[tuple[int, Score]]:
        waiting: dict[int, list[_Row]] = {}
        for row in self._rows(requests):
            if not row.inputs:
                yield from ((index, Score(0.0, True, 0)) for index in row.requests)
                continue
            length = bucket_length(len(row.inputs), self.config)
            batch = waiting.setdefault(length, [])
            batch.append(row)
            if len(batch) == self._num_rows(length):
                yield from self._score_batch(length, waiting.pop(length), requests)
        for length in sorted(waiting, reverse=True):
            yield from self._score_batch(length, waiting[length], requests)

    def _check(self, requests: Sequence[Pair]) -> None:
        longest, size = self.config.max_position_embeddings, self.config.vocab_size
        for index, (context, continuation) in enumerate(requests):
            if not context:
                raise InputError(f"request {index} has no context: give at least a BOS or EOS token")
            if len(continuation) > longest:
                raise InputError(
                    f"request {index} has a continuation of {len(continuation)} tokens: must not be longer than the "
                    f"model's max_position_embeddings = {longest}"
                )
            for token in (*context, *continuation):
                if not 0 <= token < size:
                    raise InputError(
                        f"request {index} has token id {token}: must be from 0 to below the model's vocab_size = {size}"
                    )

    def _rows(self, requests: Sequence[Pair]) -> Iterable[_Row]:
        """What is to be read, in the order in which requests first ask for it; empty continuations read nothing."""
        rows: dict[tuple[int, ...], _Row] = {}
        for index, (context, continuation) in enumerate(requests):
            tokens = (*context, *continuation)[-(self.config.max_position_embeddings + 1) :] if continuation else ()
            rows.setdefault(tokens[:-1], _Row(tokens[:-1], [])).requests.append(index)
        return rows.values()

    def _num_rows(self, length: int) -> int:
        return min(self._batch_size, max(1, MAX_BATCH_TOKENS // length))

    def _score_batch(self, length: int, rows: Sequence[_Row], requests: Sequence[Pair]) -> list[tuple[int, Score]]:
        tokens = np.zeros((self._num_rows(length), length), np.int32)
        lengths = np.zeros(len(tokens), np.int32)
        places, targets, sizes = list[int](), list[int](), list[tuple[int, int]]()
        for number, row in enumerate(rows):
            tokens[number, : len(row.inputs)] = row.inputs
            lengths[number] = len(row.inputs)
            end = number * length + len(row.inputs)
            for index in row.requests:
                continuation = requests[index][1]
                places.extend(range(end - len(continuation), end))
                targets.extend(continuation)
                sizes.append((index, len(row.inputs)))
        head_inputs = _head_inputs(self._params, tokens, lengths, config=self.config)
        log_probs, greedy = self._head(head_inputs, places, targets)
        scores, begin = [], 0
        for index, seen in sizes:
            context, continuation = requests[index]
            end = begin + len(continuation)
            truncated = len(context) + len(continuation) - 1 - seen
            scores.append((index, Score(float(log_probs[begin:end].sum()), bool(greedy[begin:end].all()), truncated)))
            begin = end
        return scores

    def _head(
        self, head_inputs: Array, places: Sequence[int], targets: Sequence[int]
    ) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
        """Scores of single tokens, `_head_rows` at a time."""
        number, rows = len(places), self._head_rows
        padded = np.zeros((2, -(-number // rows) * rows), np.int32)
        padded[:, :number] = places, targets
        parts = [
            _token_scores(self._params, head_inputs, *padded[:, first : first + rows], config=self.config)
            for first in range(0, number, rows)
        ]
        log_probs = np.concatenate([np.asarray(part, np.float64) for part, _ in parts])
        return log_probs[:number], np.concatenate([np.asarray(part) for _, part in parts])[:number]
