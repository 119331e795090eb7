"""Rows of real text as tokens, to measure and to train on: `sparse_quality` reads them from one file.

    python -m benchmarks.sparse_quality_texts --work DIR

They can be made on a machine with a network and be read on one without.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from benchmarks.long_texts import long_texts
from benchmarks.pretrained import smollm2_path
from cpm_jax.data.tokenizer import Tokenizer
from cpm_jax.inference.load import load_model

LENGTH, LONG = 8192, 16_384  # of measured rows: the model's limit, and beyond
ROWS = 3  # of each text
TRAIN_LENGTH = 2048
TRAIN_ROWS = 400  # of each kind of text at most


class Excerpt(NamedTuple):
    """A row of a text: `LONG` tokens and the one after.

    Attributes:
        name: its kind of text and its number among that text's rows.
        tokens: of which shorter rows take the first.
        byte_ends: up to the end of each token, the bytes of the text.
    """

    name: str
    tokens: Int[np.ndarray, " LONG+1"]
    byte_ends: Int[np.ndarray, " LONG+1"]

    @property
    def number(self) -> int:
        """Which of its text's rows."""
        return int(self.name[-1])

    def num_bytes(self, begin: int, end: int) -> int:
        """Bytes of the targets from position `begin` to before `end`."""
        return int(self.byte_ends[end] - self.byte_ends[begin])


class Rows(NamedTuple):
    """What is measured and what is trained on."""

    excerpts: list[Excerpt]
    training: Int[np.ndarray, "n TRAIN_LENGTH+1"]


def excerpts(kind: str, tokens: Sequence[int], byte_ends: Sequence[int]) -> list[Excerpt]:
    """Cuts rows out of a text, as far apart as they can be.

    Raises:
        ValueError: the text is too short for them not to overlap.
    """
    size = LONG + 1
    if len(tokens) < ROWS * size:
        raise ValueError(f"the text {kind} has {len(tokens)} tokens: {ROWS} rows need {ROWS * size}")
    starts = [(len(tokens) - size) * number // max(ROWS - 1, 1) for number in range(ROWS)]
    cuts = [slice(start, start + size) for start in starts]
    return [
        Excerpt(f"{kind}{number}", np.asarray(tokens[cut], np.int32), np.asarray(byte_ends[cut], np.int64))
        for number, cut in enumerate(cuts)
    ]


def token_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> Int[np.ndarray, " T"]:
    """Bytes of the text up to the end of each token.

    Args:
        text: what was tokenised.
        offsets: of each token, its first character and the one after its last.
    """
    ends = np.cumsum([0, *(len(character.encode("utf-8")) for character in text)])
    return ends[[end for _, end in offsets]]


def make_rows(work: Path, tokenizer: Tokenizer) -> Rows:
    """Tokenises the texts, or reads what an earlier call made of them.

    Training rows of the kinds are mixed, in an order that is always the same.
    """
    path = work / "rows.npz"
    if not path.exists():
        measured, training = [], []
        for kind, text in long_texts(work / "texts").items():
            tokens, offsets = tokenizer.encode_with_offsets(text.evaluation)
            measured += excerpts(kind, tokens, token_bytes(text.evaluation, offsets).tolist())
            stream = tokenizer.encode("\n\n".join(text.training)[: 6 * TRAIN_ROWS * TRAIN_LENGTH])
            count = min(len(stream) // (TRAIN_LENGTH + 1), TRAIN_ROWS)
            training.append(np.asarray(stream[: count * (TRAIN_LENGTH + 1)], np.int32).reshape(count, -1))
        mixed = np.random.default_rng(0).permutation(np.concatenate(training))
        np.savez_compressed(
            path,
            names=np.array([row.name for row in measured]),
            tokens=np.stack([row.tokens for row in measured]),
            byte_ends=np.stack([row.byte_ends for row in measured]),
            training=mixed,
        )
    return read_rows(work)


def read_rows(work: Path) -> Rows:
    """Reads what `make_rows` made."""
    with np.load(work / "rows.npz") as file:
        measured = zip(file["names"], file["tokens"], file["byte_ends"], strict=True)
        return Rows([Excerpt(str(name), *arrays) for name, *arrays in measured], file["training"])


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the file of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the texts, and of the file")
    rows = make_rows(parser.parse_args(argv).work, load_model(smollm2_path()).tokenizer)
    print(f"{len(rows.excerpts)} rows of {LONG} tokens to measure, {len(rows.training)} of {TRAIN_LENGTH} to train on")


if __name__ == "__main__":
    main()
