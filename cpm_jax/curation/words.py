"""Words of a text, as every filter counts them, and the hashes of their n-grams."""

import functools
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt64

from cpm_jax.curation.extra import import_extra

# Punctuation stands alone, a contraction is two words ("do", "n't"); an address, a number, an abbreviation and a file
# name are one each: what tokenizers of English give, to which the published thresholds refer. What may fail at its end
# has a greatest length, or a line of nothing but underscores would take time in proportion to its length squared.
_WORDS = re.compile(
    r"(?:(?:https?|ftp)://|www\.)\S*[\w/]"
    r"|[\w.+-]{1,64}+@[\w-]+(?:\.[\w-]+)+"
    r"|(?:[^\W\d_]\.){2,}"
    r"|\w{1,64}?(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b"
    r"|\d+(?:[.,:]\d+)*\w*"
    r"|(?:(?<!\S)[./-]+)?[^\W_](?:\w*[^\W_])?(?:(?:[.|@+^~\\(]|(?<=[^\W\d_])-(?=\d))[^\W_]\w*)*"
    r"|\.{2,}|-{2,}|[^\w\s]|_",
    re.IGNORECASE,
)
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_PLAIN_WORDS = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
_SENTENCE_ENDS = re.compile(r"(?<![.!?])[.!?]++(?=[\s\"'”’)\]]|$)|[。！？]+")
_KNOWN_WORDS = 1 << 19  # hashes that a process remembers
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@functools.lru_cache(maxsize=2)  # filters ask for the words of one document one after another
def split_words(text: str, language: str = "") -> tuple[str, ...]:
    """The words of a text; each mark of punctuation is one of them.

    Args:
        text: the text.
        language: "zh" divides by jieba's dictionary; all others by blanks and punctuation.

    Raises:
        DataError: the text is Chinese, and the extra `curate` is not installed.
    """
    if language == "zh":
        return tuple(word for word in import_extra("rjieba").cut(text) if not word.isspace())
    return tuple(_WORDS.findall(text))


def count_sentences(text: str) -> int:
    """The number of sentences; a text that is not empty has one at least."""
    return max(len(_SENTENCE_ENDS.findall(text)), 1) if text.strip() else 0


def normal_words(text: str) -> list[str]:
    """Words for comparing texts: lower case, without punctuation; each Chinese character is one."""
    text = text.lower()
    # The simple pattern is much faster, and right for every text without Chinese characters.
    return _PLAIN_WORDS.findall(text) if _HAN.search(text) else re.findall(r"[^\W_]+", text)


class _Hashes(dict[str, int]):
    """The hash of each word; the commonest are remembered, as they are most of every text."""

    def __missing__(self, word: str) -> int:
        value = import_extra("xxhash").xxh3_64_intdigest(word.encode())
        if len(self) < _KNOWN_WORDS:
            self[word] = value
        return value


_hashes = _Hashes()


def hash_words(words: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """The hash of each word, the same in every process."""
    return np.fromiter(map(_hashes.__getitem__, words), np.uint64, len(words))


def hash_ngrams(hashes: UInt64[np.ndarray, " n"], n: int) -> UInt64[np.ndarray, " m"]:
    """Hashes of the n-grams of words, from those of the words; none if there are fewer than n words."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    value = hashes[:count].copy()
    for shift in range(1, n):
        value *= _MULTIPLIER
        value += hashes[shift : shift + count]
    # Spread what the sum has in its high bits: sets of n-grams are compared by their smallest hashes.
    value ^= value >> np.uint64(32)
    value *= _MULTIPLIER
    value ^= value >> np.uint64(29)
    return value


def lengths(words: Sequence[str]) -> Int[np.ndarray, " n"]:
    """Characters of each word."""
    return np.fromiter(map(len, words), np.int64, len(words))
