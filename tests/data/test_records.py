"""The bytes of a packed record."""

import numpy as np
import pytest

from cpm_jax.data.errors import DataError
from cpm_jax.data.records import PackedRecord, decode_record, encode_record, to_rows


def record(num_tokens=11, mask=None):
    mask = np.ones(num_tokens, np.bool_) if mask is None else mask
    return PackedRecord(np.arange(num_tokens, dtype=np.uint32) + 2**31, np.array([0, 4], np.uint32), mask)


def test_round_trip():
    for mask in (None, np.arange(11) % 2 == 0, np.zeros(11, np.bool_)):
        found = decode_record(encode_record(record(mask=mask)))
        expected = record(mask=mask)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.document_starts, expected.document_starts)
        np.testing.assert_array_equal(found.loss_mask, expected.loss_mask)
        assert (found.tokens.dtype, found.document_starts.dtype, found.loss_mask.dtype) == ("uint32", "uint32", "bool")


def test_layout():
    """Other programs may read shards: the layout is a promise."""
    data = encode_record(PackedRecord(np.array([7, 300], np.uint32), np.array([0], np.uint32), np.array([True, True])))
    assert data == bytes([2, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 44, 1, 0, 0, 0, 0, 0, 0])
    data = encode_record(PackedRecord(np.array([7, 300], np.uint32), np.array([0], np.uint32), np.array([False, True])))
    assert data[-1] == 0b01000000


def test_what_is_no_record_is_refused():
    whole = encode_record(record(mask=np.arange(11) % 2 == 0))
    for data in (b"", b"short", whole[:-1], whole + b"xx", b"\xff" * 20):
        with pytest.raises(DataError, match="not a packed record"):
            decode_record(data)
    with pytest.raises(DataError, match="a record of 11 tokens does not fit seq_len 9"):
        to_rows([record()], 9)


@pytest.mark.parametrize("starts", [[], [1], [0, 11]])
def test_starts_must_fit(starts):
    with pytest.raises(ValueError, match="do not fit"):
        encode_record(PackedRecord(record().tokens, np.array(starts, np.uint32), record().loss_mask))
