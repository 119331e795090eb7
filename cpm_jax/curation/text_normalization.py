r"""What a classifier sees of a text: Ultra-FineWeb's preprocessing, the same at training and at scoring.

The steps and their order are those of the published classifier (openbmb/Ultra-FineWeb-classifier, its inference
script): three and more line breaks become two; lower case; NFKD without combining marks; tokens of a language model's
tokenizer, each decoded by itself, joined by spaces; line breaks and tabs written as `\n`, `\r`, `\t`, so that a text is
one line and keeps its structure; runs of spaces become one. A tokenizer needs no spaces between words, so Chinese goes
the same way as English.
"""

import functools
import re
import sys
import unicodedata
from collections.abc import Sequence

import numpy as np

from cpm_jax.data.tokenizer import Tokenizer

_BLANK_LINES = re.compile(r"\n{3,}")
_SPACES = re.compile(" +")
_ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})


def fold(text: str) -> str:
    """The steps before the tokenizer: blank lines, lower case, accents."""
    text = _BLANK_LINES.sub("\n\n", text).lower()
    if text.isascii():
        return text
    return _marks().sub("", unicodedata.normalize("NFKD", text))


@functools.cache
def _marks() -> re.Pattern[str]:
    """Runs of nonspacing marks, to search for instead of looking at each character."""
    found = (chr(code) for code in range(sys.maxunicode + 1))
    return re.compile(f"[{''.join(c for c in found if unicodedata.category(c) == 'Mn')}]+")


def escape(text: str) -> str:
    """The steps after it: line breaks and tabs in letters, single spaces, none at the ends."""
    return _SPACES.sub(" ", text.translate(_ESCAPES)).strip()


class TextNormalizer:
    """Makes texts into lines for fastText. Calls with one text, or with many, give the same lines."""

    def __init__(self, tokenizer: Tokenizer):
        """Decodes the whole vocabulary once: a text's tokens are then looked up.

        Args:
            tokenizer: any; it need not be that of the model that will be trained on the texts.
        """
        self._tokenizer = tokenizer
        # Each token may be escaped alone: it is joined by a space, across which no step reaches. Parts of a character
        # decode to U+FFFD, as they do in the published script.
        self._pieces = np.array(
            [escape_piece(tokenizer.decode([token])) for token in range(tokenizer.vocab_size)], dtype=object
        )

    def __call__(self, texts: Sequence[str]) -> list[str]:
        """The line of each text; "" for one that has nothing but spaces."""
        pieces = self._pieces
        rows = self._tokenizer.encode_batch([fold(text) for text in texts])
        return [" ".join(filter(None, pieces[row].tolist())).strip() if row else "" for row in rows]


def escape_piece(piece: str) -> str:
    """As `escape`, of a part of a line: other white space than " " at its ends is inside the line, and stays."""
    return _SPACES.sub(" ", piece.translate(_ESCAPES)).strip(" ")
