"""The packed record: the bytes that a shard holds for each row of a batch.

Layout, little-endian: uint32 number of tokens n, uint32 number of documents k, n × uint32 tokens, k × uint32 starts of
documents, and, only when some tokens are not to be learned, a bit per token (1: learn it). Padding is not stored.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt32

from cpm_jax.data.errors import DataError

_U32 = np.dtype("<u4")


@dataclasses.dataclass(frozen=True, eq=False)
class PackedRecord:
    """At most seq_len + 1 tokens of one or more documents.

    Attributes:
        tokens: the tokens.
        document_starts: where in `tokens` each document (or its continuation from the record before) begins; the
            first is 0.
        loss_mask: whether a token is to be learned when it is a target; False for what a user said in a conversation.
    """

    tokens: UInt32[np.ndarray, " n"]
    document_starts: UInt32[np.ndarray, " k"]
    loss_mask: Bool[np.ndarray, " n"]


def encode_record(record: PackedRecord) -> bytes:
    """The bytes of a record.

    Raises:
        ValueError: the parts of the record do not fit together.
    """
    tokens, starts, mask = record.tokens, record.document_starts, record.loss_mask
    if len(mask) != len(tokens):
        raise ValueError(f"{len(mask)} mask values for {len(tokens)} tokens")
    if len(tokens) == 0 or len(starts) == 0 or starts[0] != 0 or starts[-1] >= len(tokens):
        raise ValueError(f"document starts {starts.tolist()} do not fit {len(tokens)} tokens")
    parts = [np.array([len(tokens), len(starts)], _U32), tokens.astype(_U32), starts.astype(_U32)]
    data = b"".join(part.tobytes() for part in parts)
    return data if mask.all() else data + np.packbits(mask).tobytes()


def decode_record(data: bytes) -> PackedRecord:
    """The inverse of `encode_record`.

    Raises:
        DataError: the bytes are not a packed record.
    """
    if len(data) < 8:
        raise DataError(f"not a packed record: {len(data)} bytes")
    num_tokens, num_starts = (int(x) for x in np.frombuffer(data, _U32, 2))
    end = 8 + 4 * (num_tokens + num_starts)
    if len(data) not in (end, end + (num_tokens + 7) // 8):
        raise DataError(f"not a packed record: {len(data)} bytes for {num_tokens} tokens, {num_starts} documents")
    tokens = np.frombuffer(data, _U32, num_tokens, offset=8)
    starts = np.frombuffer(data, _U32, num_starts, offset=8 + 4 * num_tokens)
    if len(data) == end:
        mask = np.ones(num_tokens, np.bool_)
    else:
        mask = np.unpackbits(np.frombuffer(data, np.uint8, offset=end), count=num_tokens).view(np.bool_)
    return PackedRecord(tokens, starts, mask)


def to_rows(records: Sequence[PackedRecord], seq_len: int) -> dict[str, np.ndarray]:
    """Rows of a batch, as docs/architecture.md describes it (all keys but `source_ids`), padded to `seq_len`.

    Raises:
        DataError: a record is longer than `seq_len` + 1.
    """
    shape = (len(records), seq_len + 1)
    tokens, is_start = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    is_token, learned = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    for row, record in enumerate(records):
        num_tokens = len(record.tokens)
        if num_tokens > seq_len + 1:
            raise DataError(f"a record of {num_tokens} tokens does not fit seq_len {seq_len}")
        tokens[row, :num_tokens] = record.tokens
        is_start[row, record.document_starts] = 1
        is_token[row, :num_tokens] = True
        learned[row, :num_tokens] = record.loss_mask
    segment_ids = np.where(is_token, np.cumsum(is_start, axis=1, dtype=np.int32), 0)
    index = np.arange(seq_len + 1, dtype=np.int32)
    positions = index - np.maximum.accumulate(np.where(is_start, index, 0), axis=1)
    # A target counts when it continues the document of its input.
    weights = learned[:, 1:] & is_token[:, 1:] & (segment_ids[:, 1:] == segment_ids[:, :-1])
    # The last stored token is only a target; as an input it would be a row's (seq_len + 1)-th.
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights.astype(np.float32),
        "segment_ids": segment_ids[:, :-1],
        "positions": np.where(is_token[:, :-1], positions[:, :-1], 0).astype(np.int32),
    }
