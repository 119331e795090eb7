"""Batches for training tests."""

from typing import Any

import numpy as np
import pytest


def _make_batch(seed: int = 0, rows: int = 4, length: int = 32, vocab: int = 128, sources: int = 2) -> dict[str, Any]:
    """Two packed documents and some padding in each row, of lengths that differ by row."""
    rng = np.random.default_rng(seed)
    stream = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    ends = np.sort(rng.integers(4, length, (rows, 2)), axis=1)
    at = np.arange(length)
    segments = np.where(at < ends[:, :1], 1, np.where(at < ends[:, 1:], 2, 0)).astype(np.int32)
    starts = np.where(segments == 2, ends[:, :1], np.where(segments == 0, ends[:, 1:], 0))
    following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
    return {
        "tokens": stream[:, :-1],
        "targets": stream[:, 1:],
        "loss_weights": ((segments == following) & (segments > 0)).astype(np.float32),
        "segment_ids": segments,
        "positions": (at - starts).astype(np.int32),
        "source_ids": (np.arange(rows) % sources).astype(np.int32),
    }


@pytest.fixture
def make_batch():
    return _make_batch


@pytest.fixture
def batch() -> dict[str, Any]:
    return _make_batch()
