"""The rules of C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2), line by line."""

import re

from cpm_jax.common.config import config_dataclass
from cpm_jax.curation.code_and_math import blocks, without_inline
from cpm_jax.curation.document import Document
from cpm_jax.curation.filters import TextFilter, with_text
from cpm_jax.curation.words import count_sentences

_TERMINAL = (".", "?", "!", '"', "'")
_CITATIONS = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


@config_dataclass
class C4Quality(TextFilter):
    """Takes lines away that are not sentences; drops documents that are no prose at all.

    A document of which a line has a curly bracket or "lorem ipsum" is dropped; brackets in code and formulas do not
    count, and blocks of them stay as they are. Lines that name JavaScript or a policy go. The list of bad words is not
    part of it.

    Attributes:
        terminal_punctuation: whether lines that do not end with such a mark go. FineWeb left this rule out, as it costs
            30% of all tokens.
        min_sentences: fewest sentences in the lines that stay.
        min_words: fewest words of a line.
        max_word_length: most characters of a word of a line.
        curly_brackets: whether a curly bracket drops the document.
    """

    terminal_punctuation: bool = True
    min_sentences: int = 5
    min_words: int = 3
    max_word_length: int = 1000
    curly_brackets: bool = True

    def apply(self, document: Document) -> Document:
        """Drops the document, or returns it with the lines that stay."""
        kept: list[str] = []
        sentences = end = 0
        for begin, block_end in [*blocks(document.text), (len(document.text), len(document.text))]:
            for line in document.text[end:begin].splitlines():
                line, reason = self._line(line)
                if reason:
                    return document.drop(reason)
                if line:
                    kept.append(line)
                    sentences += count_sentences(line)
            if block_end > begin:
                kept.append(document.text[begin:block_end])
            end = block_end
        if sentences < self.min_sentences:
            return document.drop("c4: too few sentences")
        return with_text(document, "\n".join(kept))

    def _line(self, line: str) -> tuple[str, str]:
        """What stays of a line, and why the whole document goes, if it does."""
        line = line.strip()
        words = line.split()
        if any(len(word) > self.max_word_length for word in words):
            return "", ""
        line = _CITATIONS.sub("", line)
        if self.terminal_punctuation and (not line.endswith(_TERMINAL) or line.endswith("...")):
            return "", ""
        if len(words) < self.min_words:
            return "", ""
        lower = line.lower()
        if "lorem ipsum" in lower:
            return "", "c4: lorem ipsum"
        if "javascript" in lower:
            return "", ""
        if self.curly_brackets and "{" in without_inline(line):
            return "", "c4: curly bracket"
        if any(phrase in lower for phrase in _POLICY):
            return "", ""
        return line, ""
