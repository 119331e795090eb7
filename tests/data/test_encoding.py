"""Documents as tokens; conversations are in test_chat.py."""

import numpy as np
import pytest

from cpm_jax.data import encoding
from cpm_jax.data.encoding import Encoder
from cpm_jax.data.errors import DataError
from cpm_jax.data.tokenizer import Tokenizer

TEXTS = ["a b\nc", "", "one line that is long\nand\n\nanother é数🙂" * 3, "x" * 50]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


def test_documents_begin_and_end(tokenizer):
    documents = Encoder(tokenizer, "text", 8, "reject")(TEXTS).documents
    ends = np.cumsum(documents.lengths)
    for text, tokens in zip(TEXTS, np.split(documents.tokens, ends[:-1]), strict=True):
        assert tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    assert ends[-1] == len(documents.tokens)


def test_no_documents(tokenizer):
    for format in ("text", "chat"):
        documents = Encoder(tokenizer, format, 8, "reject")([]).documents
        assert (len(documents.tokens), len(documents.lengths)) == (0, 0)


@pytest.mark.parametrize("limit", [1, 7, 30])
def test_long_documents_are_tokenised_in_parts(tokenizer, monkeypatch, limit):
    monkeypatch.setattr(encoding, "_LONG_DOCUMENT", limit)
    documents = Encoder(tokenizer, "text", 8, "reject")(TEXTS).documents
    for text, tokens in zip(TEXTS, np.split(documents.tokens, np.cumsum(documents.lengths)[:-1]), strict=True):
        assert tokenizer.decode(tokens) == f"<s>{text}</s>"


def test_tokenizer_without_end_of_document(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="has no eos_token, with which documents end"):
        Encoder.load(tmp_path, "text", 8, "reject")


def test_documents_of_a_range_of_lengths(tokenizer):
    """With their first and last token; what is left out is said, and all ranges together have every document once."""
    every = Encoder(tokenizer, "text", 8, "reject")(TEXTS).documents.lengths
    most = int(sorted(every)[1])
    assert most < sorted(every)[2]
    short, long = (Encoder(tokenizer, "text", 8, "reject", *ends)(TEXTS) for ends in ((None, most), (most + 1, None)))
    assert (short.documents.lengths + long.documents.lengths == every).all()
    assert (short.documents.lengths[every > most] == 0).all()
    assert len(short.documents.tokens) == short.documents.lengths.sum() == every[every <= most].sum()
    assert [(index, reason) for index, reason, _ in long.rejects] == [
        (index, f"fewer than {most + 1} tokens") for index in np.flatnonzero(every <= most)
    ]
    assert [reject[1:] for reject in short.rejects] == [
        (f"more than {most} tokens", f"{length} tokens") for length in every if length > most
    ]
