"""Packing loses no token and mixes no documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_jax.data.packing import BestFitDecreasing, ConcatThenSplit, TokenizedDocuments, best_fit_decreasing
from cpm_jax.data.records import decode_record, encode_record, to_rows

documents_lists = st.lists(st.integers(0, 40), max_size=30)


def make_documents(lengths):
    """Documents of distinct tokens, so that each can be told apart."""
    total = sum(lengths)
    return TokenizedDocuments(
        np.arange(1, total + 1, dtype=np.uint32), np.array(lengths, np.uint32), np.arange(total) % 3 == 0
    )


def pack(packer, *chunks):
    records = [record for chunk in chunks for record in packer.add(chunk)]
    return records + list(packer.flush())


@settings(max_examples=200, deadline=None)
@given(lengths=documents_lists, seq_len=st.integers(1, 50), cut=st.integers(0, 30))
def test_every_token_of_a_stream_is_a_target_once(lengths, seq_len, cut):
    documents = make_documents(lengths)
    records = pack(ConcatThenSplit(seq_len), documents)
    targets = np.concatenate([np.zeros(0, np.uint32), *(record.tokens[1:] for record in records)])
    assert targets.tolist() == documents.tokens[1:].tolist()
    assert all(len(record.tokens) == seq_len + 1 for record in records[:-1])
    starts = set(np.cumsum([0, *lengths]).tolist())
    for index, record in enumerate(records):
        found = {index * seq_len + start for start in record.document_starts.tolist()}
        span = range(index * seq_len, index * seq_len + len(record.tokens))
        expected = {start for start in starts & set(span) if start < len(documents.tokens)}
        assert found == expected | {span[0]}
        assert record.document_starts[0] == 0
        assert record.loss_mask.all()
    # The stream does not depend on how the documents arrived.
    again = pack(ConcatThenSplit(seq_len), make_documents(lengths[:cut]), *_rest(lengths, cut))
    assert [encode_record(record) for record in again] == [encode_record(record) for record in records]


def _rest(lengths, cut):
    """The documents after the first `cut`, one chunk each, with the tokens they have among all."""
    begin = sum(lengths[:cut])
    for length in lengths[cut:]:
        yield TokenizedDocuments(
            np.arange(begin + 1, begin + length + 1, dtype=np.uint32), np.array([length], np.uint32)
        )
        begin += length


@settings(max_examples=200, deadline=None)
@given(lengths=documents_lists, seq_len=st.integers(39, 100))
def test_best_fit_keeps_documents_whole(lengths, seq_len):
    documents = make_documents(lengths)
    records = pack(BestFitDecreasing(seq_len), documents)
    assert all(len(record.tokens) <= seq_len + 1 for record in records)
    found = [
        (tokens.tolist(), mask.tolist())
        for record in records
        for tokens, mask in zip(
            np.split(record.tokens, record.document_starts[1:]),
            np.split(record.loss_mask, record.document_starts[1:]),
            strict=True,
        )
    ]
    ends = np.cumsum(lengths)[:-1].astype(int)
    whole = zip(np.split(documents.tokens, ends), np.split(documents.loss_mask, ends), strict=True)
    assert sorted(found) == [(tokens.tolist(), mask.tolist()) for tokens, mask in whole if len(tokens)]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=8))
def test_best_fit_is_within_its_bound(lengths):
    bins = best_fit_decreasing(lengths, 20)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    assert len(bins) <= 11 / 9 * _fewest_bins(lengths, 20) + 6 / 9


def _fewest_bins(lengths, capacity):
    """By trying everything."""

    def place(remaining, rooms):
        if not remaining:
            return len(rooms)
        first, rest = remaining[0], remaining[1:]
        options = [place(rest, (*rooms, capacity - first))]
        for index, room in enumerate(rooms):
            if room >= first and room not in rooms[:index]:
                options.append(place(rest, (*rooms[:index], room - first, *rooms[index + 1 :])))
        return min(options)

    return place(tuple(lengths), ())


def test_best_fit_prefers_the_fullest_bin():
    assert best_fit_decreasing([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert best_fit_decreasing([6, 7, 3], 10) == [[0], [1, 2]]


def test_too_long_a_document_is_an_error():
    with pytest.raises(ValueError, match="11 tokens does not fit a record of 10"):
        list(BestFitDecreasing(9).add(make_documents([11])))


def test_no_documents():
    for packer in (ConcatThenSplit(8), BestFitDecreasing(8)):
        assert pack(packer) == []
        assert pack(packer, make_documents([])) == []


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20), seq_len=st.integers(19, 40))
def test_loss_weights_of_a_row(lengths, seq_len):
    """A target counts when it is learned and follows its input in the same document: checked token by token."""
    for packer in (ConcatThenSplit(seq_len), BestFitDecreasing(seq_len)):
        for record in pack(packer, make_documents(lengths)):
            rows = to_rows([decode_record(encode_record(record))], seq_len)
            example = {key: values[0] for key, values in rows.items()}
            assert {len(row) for row in example.values()} == {seq_len}
            starts = record.document_starts.tolist()
            document = position = -1
            for i in range(seq_len):
                if i >= len(record.tokens):
                    assert [int(example[key][i]) for key in ("tokens", "segment_ids", "positions")] == [0, 0, 0]
                    assert example["loss_weights"][i] == 0
                    continue
                document, position = (document + 1, 0) if i in starts else (document, position + 1)
                assert example["tokens"][i] == record.tokens[i]
                assert (example["segment_ids"][i], example["positions"][i]) == (document + 1, position)
                follows = i + 1 < len(record.tokens) and i + 1 not in starts
                assert example["loss_weights"][i] == float(follows and record.loss_mask[i + 1])
                if follows:
                    assert example["targets"][i] == record.tokens[i + 1]
