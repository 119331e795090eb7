"""Rows of associative recall and needles: pairs of a key and a value in a haystack, and at the row's end questions.

    BOS  filler … k7 v3 … filler … k2 v9 … filler …   filler …   k2 v9  k7 v3
    |first block|        the haystack            |    gap     |  questions   |

A question is a key that stood in the haystack; its answer, which is learned and counted, is the value that followed it
there (multi-query associative recall, Arora et al. 2023, arXiv 2312.04927; with one pair a needle in a haystack). All
else is noise. No pair lies in the row's first `head` tokens nor in the `gap` tokens before the questions, so that
attention to the beginning and to a window no longer than the gap has nothing to answer from. Each key is asked once at
most, unless `num_queries` exceeds `num_pairs`, so that no answer repeats an earlier one either.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Split = Literal["train", "validation", "test"]
BOS = 0


@dataclass(frozen=True)
class Vocabulary:
    """Token ids: BOS, then keys, values and filler."""

    num_keys: int = 32
    num_values: int = 32
    num_filler: int = 16

    @property
    def first_value(self) -> int:
        """The first id of a value; keys begin at 1."""
        return 1 + self.num_keys

    @property
    def first_filler(self) -> int:
        """The first id of filler."""
        return self.first_value + self.num_values

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.first_filler + self.num_filler


@dataclass(frozen=True)
class RecallTask:
    """What rows look like.

    Attributes:
        seq_len: T, inputs of a row.
        num_pairs: pairs in the haystack; (least, most) to draw it anew for every row.
        num_queries: questions of a row; with fewer pairs than that each is asked once and the first questions are left
            out, unless `repeat`.
        gap: tokens between the last pair and the first question, at least.
        head: tokens at the row's beginning that hold no pair.
        repeat: whether each question is drawn by itself, so that there are always `num_queries`.
        copy_weight: loss weight of all tokens but answers, whose targets then are the tokens before them. A model that
            learns recall alone first learns to guess among the row's values, and stays there: what finds a value needs
            a layer that tells each token the one before it, and a layer that uses it, and neither helps alone. This
            target makes the first.
        vocabulary: the token ids.

    Raises:
        ValueError: the parts do not fit into the row or the vocabulary; names the field.
    """

    seq_len: int
    num_pairs: int | tuple[int, int] = 16
    num_queries: int = 16
    gap: int = 0
    head: int = 8
    repeat: bool = False
    copy_weight: float = 0.0
    vocabulary: Vocabulary = Vocabulary()

    def __post_init__(self) -> None:
        fewest, most = self.pairs
        known = min(self.vocabulary.num_keys, self.vocabulary.num_values)
        if not 1 <= fewest <= most <= known:
            raise ValueError(
                f"RecallTask.num_pairs = {self.num_pairs}: must be from 1 to the vocabulary's {known} keys and values"
            )
        if self.num_queries < 1:
            raise ValueError(f"RecallTask.num_queries = {self.num_queries}: must be at least 1")
        if self.head < 1:
            raise ValueError(f"RecallTask.head = {self.head}: must be at least 1, the row's first token")
        if most > self.slots:
            raise ValueError(
                f"RecallTask.seq_len = {self.seq_len}: head {self.head}, gap {self.gap} and {self.num_queries} "
                f"questions leave room for {max(self.slots, 0)} pairs; must hold {most}"
            )

    @property
    def pairs(self) -> tuple[int, int]:
        """Fewest and most pairs of a row."""
        return self.num_pairs if isinstance(self.num_pairs, tuple) else (self.num_pairs, self.num_pairs)

    @property
    def first_question(self) -> int:
        """Where the questions begin; the row's last answer is token T, only a target."""
        return self.seq_len + 1 - 2 * self.num_queries

    @property
    def slots(self) -> int:
        """Places of two tokens in the haystack, which begin at even or odd positions."""
        return (self.first_question - self.gap - self.head - 1) // 2


def _distinct(key: jax.Array, rows: int, of: int, count: int) -> Int[Array, "B n"]:
    """Draws for each row `count` different numbers below `of`, in random order."""
    return jnp.argsort(jax.random.uniform(key, (rows, of)), axis=1)[:, :count]


def batch_key(split: Split, seed: int | Int[Array, ""], index: int | Int[Array, ""]) -> jax.Array:
    """What the rows of a batch are drawn by.

    Args:
        split: rows of each are drawn from a stream of their own.
        seed: of the run.
        index: of the batch within the run.
    """
    stream = jax.random.fold_in(jax.random.key(get_args(Split).index(split)), seed)
    return jax.random.fold_in(stream, index)


def make_tokens(task: RecallTask, num_rows: int, key: jax.Array) -> tuple[Int[Array, "B T1"], Float[Array, "B T1"]]:
    """Draws rows of T + 1 tokens, and 1 where a token is an answer.

    Args:
        task: what rows look like.
        num_rows: B.
        key: from `batch_key`.
    """
    words, (fewest, most), rows = task.vocabulary, task.pairs, jnp.arange(num_rows)[:, None]
    filler, keys, values, counts, places, parity, asked = jax.random.split(key, 7)
    tokens = words.first_filler + jax.random.randint(filler, (num_rows, task.seq_len + 1), 0, words.num_filler)
    tokens = tokens.at[:, 0].set(BOS)
    keys = 1 + _distinct(keys, num_rows, words.num_keys, most)
    values = words.first_value + _distinct(values, num_rows, words.num_values, most)
    counts = jax.random.randint(counts, (num_rows, 1), fewest, most + 1)
    places = task.head + 2 * _distinct(places, num_rows, task.slots, most)
    places += jax.random.randint(parity, (num_rows, 1), 0, 2)
    # A row's first pairs are in use; what stood where the others would be stays filler.
    places = jnp.where(jnp.arange(most) < counts, places, task.seq_len + 1)
    tokens = tokens.at[rows, places].set(keys, mode="drop").at[rows, places + 1].set(values, mode="drop")
    # Questions are numbered from the end of the row: the last ones are always there. Repeated ones are drawn each by
    # itself: were every pair asked once before any is asked again, the answers so far would tell much of the next.
    shape = num_rows, task.num_queries
    question = jnp.broadcast_to(jnp.arange(task.num_queries)[::-1], shape)
    if task.repeat:
        there, pair = question >= 0, jax.random.randint(asked, shape, 0, counts)
    else:
        there = question < counts
        unused = jnp.arange(most) >= counts
        order = jnp.argsort(jax.random.uniform(asked, unused.shape) + unused, axis=1)
        pair = jnp.take_along_axis(order, question % counts, axis=1)
    first = task.first_question + 2 * jnp.arange(task.num_queries)
    for at, ids in ((first, keys), (first + 1, values)):
        tokens = tokens.at[:, at].set(jnp.where(there, jnp.take_along_axis(ids, pair, axis=1), tokens[:, at]))
    answers = jnp.zeros(tokens.shape, jnp.float32).at[:, first + 1].set(there)
    return tokens, answers


def make_batch(task: RecallTask, num_rows: int, key: jax.Array) -> dict[str, Array]:
    """Draws tokens, targets and loss_weights, of which answers count (and `copy_weight`).

    Arguments are those of `make_tokens`.
    """
    tokens, answers = make_tokens(task, num_rows, key)
    targets, weights = tokens[:, 1:], answers[:, 1:]
    if task.copy_weight:
        before = jnp.pad(tokens[:, :-2], ((0, 0), (1, 0)))
        targets = jnp.where(weights > 0, targets, before)
        weights = jnp.where(weights > 0, weights, task.copy_weight)
    return {"tokens": tokens[:, :-1], "targets": targets, "loss_weights": weights}


LONG_VOCABULARY = Vocabulary(num_keys=512, num_values=512, num_filler=256)


def long_task(seq_len: int) -> RecallTask:
    """Rows for models beyond this machine: up to 32 questions, a pair in 128 tokens at most.

    From 8,192 tokens on a gap of 6,144 lies before the questions, the 96 blocks of the published `sparse_config`.
    """
    return RecallTask(
        seq_len,
        num_pairs=(1, max(seq_len // 128, 2)),
        num_queries=min(seq_len // 4, 32),
        gap=6144 if seq_len >= 8192 else 0,
        head=min(max(seq_len // 16, 1), 64),
        repeat=seq_len < 256,
        vocabulary=LONG_VOCABULARY,
    )
