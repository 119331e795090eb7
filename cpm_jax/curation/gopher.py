"""The rules of Gopher (Rae et al. 2021, arXiv 2112.11446, appendix A.1): quality, and repetition within a document.

Where the paper leaves room, the reading is FineWeb's: punctuation counts as words, but not for the number and the
length of words. Blocks of code and formulas are not measured.
"""

import collections
import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from cpm_jax.common.config import ConfigError, config_dataclass
from cpm_jax.curation.code_and_math import prose
from cpm_jax.curation.document import Document
from cpm_jax.curation.filters import TextFilter
from cpm_jax.curation.words import hash_ngrams, hash_words, lengths, split_words

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_ELLIPSES = ("...", "…")
_PARAGRAPH_ENDS = re.compile(r"\n{2,}")
_LINE_ENDS = re.compile(r"\n+")


def _is_symbol(word: str) -> bool:
    """Whether a word is punctuation only."""
    return all(unicodedata.category(char)[0] == "P" or char in "$+<=>^`|~" for char in word)


@config_dataclass
class GopherQuality(TextFilter):
    """Drops documents whose words and lines are not those of prose.

    Attributes:
        min_words: fewest words.
        max_words: most words.
        min_word_length: least mean length of words, in characters.
        max_word_length: greatest mean length of words.
        max_symbol_ratio: most hash signs, or ellipses, per word.
        max_bullet_lines: largest share of lines that begin with a bullet.
        max_ellipsis_lines: largest share of lines that end with an ellipsis.
        min_alphabetic_words: smallest share of words with a letter in them.
        stop_words: words of which prose has some.
        min_stop_words: how many different ones.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3
    max_word_length: float = 10
    max_symbol_ratio: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    stop_words: tuple[str, ...] | list[str] = STOP_WORDS
    min_stop_words: int = 2

    def __post_init__(self) -> None:
        """Checks what the types do not say."""
        self.check_fractions("max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words")
        if self.min_words < 1:
            raise ConfigError(
                f"GopherQuality.min_words = {self.min_words}: must be at least 1: other rules are shares of the words",
                "GopherQuality.min_words",
            )

    def apply(self, document: Document) -> Document:
        """Drops the document, or returns it as it is."""
        text = prose(document.text)
        words = collections.Counter(split_words(text, document.language))
        number = words.total()
        proper = [(len(word), count) for word, count in words.items() if word.isalnum() or not _is_symbol(word)]
        num_proper = sum(count for _, count in proper)
        if num_proper < self.min_words:
            return document.drop("gopher: too few words")
        if num_proper > self.max_words:
            return document.drop("gopher: too many words")
        mean_length = sum(length * count for length, count in proper) / num_proper
        if not self.min_word_length <= mean_length <= self.max_word_length:
            return document.drop("gopher: word length")
        if text.count("#") / number > self.max_symbol_ratio:
            return document.drop("gopher: hash signs")
        if sum(text.count(mark) for mark in _ELLIPSES) / number > self.max_symbol_ratio:
            return document.drop("gopher: ellipses")
        lines = text.splitlines()
        if sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > self.max_bullet_lines:
            return document.drop("gopher: bullet lines")
        if sum(line.rstrip().endswith(_ELLIPSES) for line in lines) / len(lines) > self.max_ellipsis_lines:
            return document.drop("gopher: lines end with ellipses")
        alphabetic = sum(count for word, count in words.items() if word.isalpha() or any(map(str.isalpha, word)))
        if alphabetic / number < self.min_alphabetic_words:
            return document.drop("gopher: words without letters")
        if len(set(self.stop_words).intersection(words)) < self.min_stop_words:
            return document.drop("gopher: too few stop words")
        return document


@config_dataclass
class GopherRepetition(TextFilter):
    """Drops documents that repeat themselves. Each limit is a share, and None lifts it.

    Attributes:
        max_duplicate_lines: of lines that are repetitions of an earlier one.
        max_duplicate_paragraphs: of paragraphs that are.
        max_duplicate_line_characters: of characters in such lines.
        max_duplicate_paragraph_characters: of characters in such paragraphs.
        max_top_ngram_characters: (n, share) of characters in all occurrences of the most frequent n-gram.
        max_duplicate_ngram_characters: (n, share) of characters in n-grams that occurred before, none counted twice.
    """

    max_duplicate_lines: float | None = 0.3
    max_duplicate_paragraphs: float | None = 0.3
    max_duplicate_line_characters: float | None = 0.2
    max_duplicate_paragraph_characters: float | None = 0.2
    max_top_ngram_characters: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
    max_duplicate_ngram_characters: tuple[tuple[int, float], ...] = (
        (5, 0.15),
        (6, 0.14),
        (7, 0.13),
        (8, 0.12),
        (9, 0.11),
        (10, 0.10),
    )

    def __post_init__(self) -> None:
        """Checks what the types do not say."""
        self.check_fractions(
            "max_duplicate_lines",
            "max_duplicate_paragraphs",
            "max_duplicate_line_characters",
            "max_duplicate_paragraph_characters",
        )

    def apply(self, document: Document) -> Document:
        """Drops the document, or returns it as it is."""
        text = prose(document.text)
        if not text.strip():
            return document  # nothing but code: whether that is wanted is for other filters to say
        paragraphs = self.max_duplicate_paragraphs, self.max_duplicate_paragraph_characters
        lines = self.max_duplicate_lines, self.max_duplicate_line_characters
        for name, pieces, (most, most_characters) in (
            ("paragraph", _PARAGRAPH_ENDS.split(text.strip()), paragraphs),
            ("line", _LINE_ENDS.split(text), lines),
        ):
            count, characters = duplicates(pieces)
            if most is not None and count / len(pieces) > most:
                return document.drop(f"repetition: {name}s")
            if most_characters is not None and characters / len(text) > most_characters:
                return document.drop(f"repetition: {name} characters")
        return self._apply_ngrams(document, text)

    def _apply_ngrams(self, document: Document, text: str) -> Document:
        words = split_words(text, document.language)
        hashes, sizes = hash_words(words), lengths(words)
        for n, share in self.max_top_ngram_characters:
            if _top_ngram_characters(_numbered(hash_ngrams(hashes, n)), sizes, n) / len(text) > share:
                return document.drop(f"repetition: top {n}-gram")
        for n, share in self.max_duplicate_ngram_characters:
            numbers = _numbered(hash_ngrams(hashes, n))
            if _is_unique(numbers):
                break  # then longer ones are, too
            if _duplicate_ngram_characters(numbers, sizes, n, share * len(text)) / len(text) > share:
                return document.drop(f"repetition: {n}-grams")
        return document


def duplicates(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces repeat an earlier one, and the characters of those."""
    seen: set[str] = set()
    count = characters = 0
    for piece in pieces:
        if piece in seen:
            count += 1
            characters += len(piece)
        seen.add(piece)
    return count, characters


def _numbered(hashes: np.ndarray) -> Int[np.ndarray, " n"]:
    """For each n-gram the place of its first occurrence."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse]


def _is_unique(numbers: Int[np.ndarray, " n"]) -> bool:
    return bool((numbers == np.arange(len(numbers))).all())


def _top_ngram_characters(numbers: Int[np.ndarray, " n"], sizes: Int[np.ndarray, " w"], n: int) -> int:
    """Characters in the most frequent n-gram, blanks between words included, times its occurrences."""
    if not len(numbers):
        return 0
    counts = np.bincount(numbers)
    first = int(counts.argmax())  # of equally frequent ones the first that occurs
    return int(sizes[first : first + n].sum() + n - 1) * int(counts[first])


def _duplicate_ngram_characters(
    numbers: Int[np.ndarray, " n"], sizes: Int[np.ndarray, " w"], n: int, enough: float
) -> int:
    """Characters in n-grams that occurred before; after each the search goes on behind it.

    Args:
        numbers: as `_numbered` gives them.
        sizes: characters of each word.
        n: words per n-gram.
        enough: where no more than this many can be found, they are not counted exactly.
    """
    # What any repeated n-gram covers bounds the sum from above, and for most documents that is all there is to know.
    covered = np.zeros(len(sizes) + 1, np.int64)
    again = np.flatnonzero(numbers != np.arange(len(numbers)))
    np.add.at(covered, again, 1)
    np.add.at(covered, again + n, -1)
    bound = int(sizes[np.cumsum(covered)[:-1] > 0].sum())
    if bound <= enough:
        return bound
    ends = list(itertools.accumulate(sizes.tolist(), initial=0))
    seen: set[int] = set()
    total = place = 0
    ngrams = numbers.tolist()
    while place < len(ngrams):
        if ngrams[place] in seen:
            total += ends[place + n] - ends[place]
            place += n
        else:
            seen.add(ngrams[place])
            place += 1
    return total
