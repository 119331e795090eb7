"""The rules that FineWeb added (Penedo et al. 2024, arXiv 2406.17557, section 3.6)."""

import functools
import re
from typing import Any

from cpm_jax.common.config import config_dataclass
from cpm_jax.curation.code_and_math import prose
from cpm_jax.curation.document import Document
from cpm_jax.curation.extra import import_extra
from cpm_jax.curation.filters import TextFilter
from cpm_jax.curation.gopher import duplicates
from cpm_jax.curation.words import split_words

_NOT_BLANK = re.compile(r"\S")


@functools.cache
def _terminal() -> Any:
    """Unicode's marks that end a sentence, in any script."""
    return import_extra("regex").compile(r"\p{Sentence_Terminal}\Z")


@config_dataclass
class FineWebQuality(TextFilter):
    """Drops documents that are lists rather than prose. Blocks of code and formulas are not measured.

    Attributes:
        min_terminal_lines: smallest share of lines that end with a mark that ends a sentence.
        max_short_lines: largest share of short lines.
        short_line: most characters of a short line.
        max_duplicate_line_characters: largest share of characters in lines that repeat an earlier one.
        max_lines_per_word: most line ends per word.
    """

    min_terminal_lines: float = 0.12
    max_short_lines: float = 0.67
    short_line: int = 30
    max_duplicate_line_characters: float = 0.01
    max_lines_per_word: float = 0.3

    def __post_init__(self) -> None:
        """Checks what the types do not say."""
        self.check_fractions("min_terminal_lines", "max_short_lines", "max_duplicate_line_characters")

    def apply(self, document: Document) -> Document:
        """Drops the document, or returns it as it is."""
        text = prose(document.text)
        lines = [line for line in text.split("\n") if _NOT_BLANK.search(line)]
        if not lines:
            return document  # nothing but code
        if sum(bool(_terminal().search(line)) for line in lines) / len(lines) < self.min_terminal_lines:
            return document.drop("fineweb: lines without terminal punctuation")
        if sum(len(line) <= self.short_line for line in lines) / len(lines) > self.max_short_lines:
            return document.drop("fineweb: short lines")
        if duplicates(lines)[1] / len(text.replace("\n", "")) > self.max_duplicate_line_characters:
            return document.drop("fineweb: duplicate lines")
        if text.count("\n") / len(split_words(text, document.language)) > self.max_lines_per_word:
            return document.drop("fineweb: list")
        return document
