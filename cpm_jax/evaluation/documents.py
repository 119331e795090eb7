"""The documents of a dataset folder, put together again from its packed records, so that all scores are of one text."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python import array_record_module
from jaxtyping import UInt32

from cpm_jax.data.errors import DataError
from cpm_jax.data.manifest import Manifest
from cpm_jax.data.records import PackedRecord, decode_record
from cpm_jax.data.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one split.

    Attributes:
        tokens: of each document, as the model is trained on them: with its BOS and EOS, if it has them.
        texts: the text of each, exact where the tokenizer can be undone (`text_bytes` shows whether it can).
        text_bytes: bytes of the original texts in UTF-8, by the manifest.
    """

    tokens: list[UInt32[np.ndarray, " n"]]
    texts: list[str]
    text_bytes: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def document_bytes(self) -> np.ndarray:
        """Bytes of each document's text, int64."""
        return np.array([len(text.encode("utf-8", "replace")) for text in self.texts], np.int64)


def read_split(folder: str | Path, split: str, max_tokens: int | None = None) -> Documents:
    """Reads the documents of a split of packed text.

    Args:
        folder: a dataset folder.
        split: "train" or "validation".
        max_tokens: stops after the document that reaches this number; `text_bytes` then counts the decoded texts.

    Raises:
        DataError: the folder has no such split, holds conversations, or does not have its tokenizer.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    if manifest.format != "text":
        raise DataError(f"{folder} holds {manifest.format} records: bits per byte are of running text")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    tokens: list[np.ndarray] = []
    total = 0
    complete = True
    for path in manifest.shard_paths(folder, split):
        for document in _shard_documents(path):
            if max_tokens is not None and total >= max_tokens:
                complete = False
                break
            tokens.append(document)
            total += len(document)
    special = {tokenizer.bos_id, tokenizer.eos_id} if tokenizer.add_bos else {tokenizer.eos_id}
    texts = [tokenizer.decode(_strip(document, special)) for document in tokens]
    if not complete:
        return Documents(tokens, texts, sum(len(text.encode("utf-8", "replace")) for text in texts))
    return Documents(tokens, texts, manifest.splits[split].text_bytes)


def _strip(document: np.ndarray, special: set[int | None]) -> np.ndarray:
    """Without the BOS and EOS that `prepare` put around the text."""
    first = 1 if len(document) and int(document[0]) in special else 0
    last = len(document) - 1 if len(document) > first and int(document[-1]) in special else len(document)
    return document[first:last]


def _shard_documents(path: str) -> list[np.ndarray]:
    reader = array_record_module.ArrayRecordReader(path)
    try:
        records = [decode_record(data) for data in reader.read_all()] if reader.num_records() else []
    finally:
        reader.close()
    return _split_documents(records)


def _split_documents(records: list[PackedRecord]) -> list[np.ndarray]:
    """Undoes `packing.ConcatThenSplit`: a record begins with the token that the one before ended with."""
    if not records:
        return []
    pieces, starts, length = [], [], 0
    for index, record in enumerate(records):
        repeated = int(index > 0)
        # Index 0 of a later record is the end of the one before, which has already said whether a document starts.
        own = record.document_starts[repeated:].astype(np.int64)
        starts.append(own + length - repeated)
        pieces.append(record.tokens[repeated:])
        length += len(record.tokens) - repeated
    return np.split(np.concatenate(pieces), np.concatenate(starts)[1:])
