"""How documents are grouped; the writing of shards is in test_prepare_resume.py."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from cpm_jax.data import shards
from cpm_jax.data.corpus import CleanDocument
from cpm_jax.data.shards import group_documents
from cpm_jax.data.sources import Document, Reject


def make_items(sizes):
    """A document for each positive size, held out where it is odd; a reject for each 0."""
    for number, size in enumerate(sizes):
        if size:
            document = Document("x" * size, str(number), "source")
            yield CleanDocument(document, size, str(number).encode(), 0.1 if size % 2 else 0.9)
        else:
            yield Reject("empty text", str(number), "source")


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 12), max_size=60), shard_bytes=st.integers(1, 60), chunk_bytes=st.integers(1, 20))
def test_groups_hold_every_document_once_in_order(sizes, shard_bytes, chunk_bytes):
    saved, shards._CHUNK_BYTES = shards._CHUNK_BYTES, chunk_bytes
    try:
        rejects = []
        chunks = list(group_documents(make_items(sizes), 0.5, shard_bytes, rejects.append))
    finally:
        shards._CHUNK_BYTES = saved
    assert [int(reject.id) for reject in rejects] == [i for i, size in enumerate(sizes) if size == 0]
    for split, parity in (("validation", 1), ("train", 0)):
        in_split = [chunk for chunk in chunks if chunk.split == split]
        found = [int(document.document.id) for chunk in in_split for document in chunk.documents]
        assert found == [i for i, size in enumerate(sizes) if size and size % 2 == parity]
        groups = [list(group) for _, group in itertools.groupby(in_split, key=lambda chunk: chunk.shard)]
        assert [group[0].shard for group in groups] == list(range(len(groups)))
        for group in groups:
            assert [chunk.last for chunk in group] == [False] * (len(group) - 1) + [True]
            documents = [document.num_bytes for chunk in group for document in chunk.documents]
            # A shard is full with the document that reaches its size; only the last may be smaller.
            assert sum(documents[:-1]) < shard_bytes
            assert sum(documents) >= shard_bytes or group is groups[-1]


def test_the_digest_of_a_shard_tells_its_texts():
    def digests(sizes):
        chunks = group_documents(make_items(sizes), 0.0, 10, lambda reject: None)
        return [chunk.input_digest for chunk in chunks if chunk.last]

    assert digests([4, 6, 8, 2]) == digests([4, 6, 8, 2])
    assert len(set(digests([4, 6, 8, 2]))) == 2
    # The second shard is the same only if the same documents are in it.
    assert digests([4, 6, 8, 2])[0] == digests([4, 6, 10])[0]
    assert digests([4, 6, 8, 2])[1] != digests([4, 6, 10])[1]
