"""Rows of associative recall and needles: pairs of a key and a value in a haystack, and at the row's end questions.

    BOS  filler … k7 v3 … filler … k2 v9 … filler …   filler …   k2 v9  k7 v3
    |first block|        the haystack            |    gap     |  questions   |

A question is a key that stood in the haystack; its answer, which is learned and counted, is the value that followed it
there (multi-query associative recall, Arora et al. 2023, arXiv 2312.04927; with one pair a needle in a haystack). All
else is noise. No pair lies in the row's first `head` tokens nor in the `gap` tokens before the questions, so that
attention to the beginning and to a window no longer than the gap has nothing to answer from. Each key is asked once at
most, unless `num_queries` exceeds `num_pairs`, so that no answer repeats an earlier one either.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import tokenizers
from array_record.python import array_record_module
from jaxtyping import Float, Int

from cpm_jax.common.files import sha256
from cpm_jax.data.manifest import Manifest, Shard
from cpm_jax.data.manifest import Split as SplitShards
from cpm_jax.data.records import PackedRecord, encode_record
from cpm_jax.data.tokenizer import Tokenizer

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


def _distinct(rng: np.random.Generator, rows: int, of: int, count: int) -> Int[np.ndarray, "B n"]:
    """Draws for each row `count` different numbers below `of`, in random order."""
    return np.argsort(rng.random((rows, of)), axis=1)[:, :count]


def make_tokens(
    task: RecallTask, num_rows: int, split: Split, seed: int, index: int
) -> tuple[Int[np.ndarray, "B T1"], Float[np.ndarray, "B T1"]]:
    """Draws rows of T + 1 tokens, and 1 where a token is an answer.

    Args:
        task: what rows look like.
        num_rows: B.
        split: rows of each are drawn from a stream of their own.
        seed: of the run.
        index: of the batch within the run.
    """
    rng = np.random.default_rng([get_args(Split).index(split), seed, index])
    words, (fewest, most), rows = task.vocabulary, task.pairs, np.arange(num_rows)[:, None]
    tokens = words.first_filler + rng.integers(words.num_filler, size=(num_rows, task.seq_len + 1))
    answers = np.zeros(tokens.shape, np.float32)
    tokens[:, 0] = BOS
    keys = 1 + _distinct(rng, num_rows, words.num_keys, most)
    values = words.first_value + _distinct(rng, num_rows, words.num_values, most)
    counts = rng.integers(fewest, most + 1, size=(num_rows, 1))
    places = task.head + 2 * _distinct(rng, num_rows, task.slots, most) + rng.integers(2, size=(num_rows, 1))
    # A row's first pairs are in use; what stood where the others would be stays filler.
    used = np.arange(most) < counts
    tokens[np.where(used, rows, 0), np.where(used, places, 0)] = np.where(used, keys, BOS)
    tokens[np.where(used, rows, 0), np.where(used, places + 1, 0)] = np.where(used, values, BOS)
    # Questions are numbered from the end of the row: the last ones are always there. Repeated ones are drawn each by
    # itself: were every pair asked once before any is asked again, the answers so far would tell much of the next.
    question = np.arange(task.num_queries)[::-1][None, :]
    if task.repeat:
        asked, pair = question >= 0, rng.integers(counts, size=(num_rows, task.num_queries))
    else:
        asked = question < counts
        order = np.argsort(rng.random((num_rows, most)) + ~used, axis=1)
        pair = np.take_along_axis(order, np.broadcast_to(question % counts, (num_rows, task.num_queries)), axis=1)
    first = task.first_question + 2 * np.arange(task.num_queries)
    for at, ids in ((first, keys), (first + 1, values)):
        tokens[:, at] = np.where(asked, np.take_along_axis(ids, pair, axis=1), tokens[:, at])
    answers[:, first + 1] = np.broadcast_to(asked, (num_rows, task.num_queries))
    return tokens.astype(np.int32), answers


def make_batch(task: RecallTask, num_rows: int, split: Split, seed: int, index: int) -> dict[str, np.ndarray]:
    """Draws a batch as docs/architecture.md describes it, in which answers count (and `copy_weight`).

    Arguments are those of `make_tokens`.
    """
    tokens, answers = make_tokens(task, num_rows, split, seed, index)
    shape = (num_rows, task.seq_len)
    targets, weights = tokens[:, 1:], answers[:, 1:]
    if task.copy_weight:
        before = np.pad(tokens[:, :-2], ((0, 0), (1, 0)))
        targets = np.where(weights > 0, targets, before)
        weights = np.where(weights > 0, weights, np.float32(task.copy_weight))
    return {
        "tokens": tokens[:, :-1],
        "targets": targets,
        "loss_weights": weights,
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(task.seq_len, dtype=np.int32), shape),
        "source_ids": np.zeros(num_rows, np.int32),
    }


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


def write_dataset(folder: Path, task: RecallTask, num_rows: int, copies: float = 0.0, seed: int = 0) -> None:
    """Writes a dataset folder as `prepare` does, whose loss is on the answers: for the verb `pretrain`.

    Args:
        folder: what to write; its validation split has a fiftieth as many rows, 64 at least.
        task: what rows look like.
        num_rows: rows to train on.
        copies: share of the training rows that instead are documents of three tokens, x y x, of which the last is
            learned: what `RecallTask.copy_weight` does, as a next token.
        seed: of the rows.
    """
    words = task.vocabulary
    spelled = ["<s>", *(f"k{i}" for i in range(words.num_keys)), *(f"v{i}" for i in range(words.num_values))]
    spelled += [f"f{i}" for i in range(words.num_filler)]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(spelled)}, "<s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "<s>"})
    tokenizer.save(folder / "tokenizer")
    splits: dict[str, tuple[Split, int, float]] = {
        "train": ("train", num_rows, copies),
        "validation": ("validation", max(num_rows // 50, 64), 0.0),
    }
    manifest = Manifest(
        seq_len=task.seq_len,
        format="text",
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=words.size,
        splits={name: _write_split(folder, name, task, *split, seed) for name, split in splits.items()},
        rejects={},
        duplicates=0,
        truncated=0,
        sources={"benchmarks.recall_data": num_rows},
        arguments={**dataclasses.asdict(task), "rows": num_rows, "copies": copies, "seed": seed},
    )
    manifest.save(folder)


def _write_split(
    folder: Path, name: str, task: RecallTask, split: Split, num_rows: int, copies: float, seed: int
) -> SplitShards:
    path = folder / f"{name}-00000-of-00001.array_record"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    chunk, place, one = 64, np.arange(task.seq_len + 1), np.zeros(1, np.uint32)
    num_copies = num_documents = 0
    for index in range(-(-num_rows // chunk)):
        tokens, answers = make_tokens(task, min(chunk, num_rows - chunk * index), split, seed, index)
        for number, (row, mask) in enumerate(zip(tokens, answers, strict=True), chunk * index):
            starts = one
            if num_copies < copies * (number + 1):  # spread evenly over the rows
                row, mask, starts = np.where(place % 3 == 2, np.roll(row, 2), row), place % 3 == 2, place[::3]
                num_copies += 1
            record = PackedRecord(row.astype(np.uint32), starts.astype(np.uint32), mask.astype(np.bool_))
            writer.write(encode_record(record))
            num_documents += len(starts)
    writer.close()
    num_tokens, size = num_rows * (task.seq_len + 1), path.stat().st_size
    shard = Shard(path.name, sha256(path), size, num_rows, num_tokens, num_documents, text_bytes=num_tokens)
    return SplitShards((shard,))
