"""Code in web pages: how much of it comes through extraction unchanged, beside trafilatura alone.

python -m benchmarks.extraction FOLDER_OF_PAGES
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import trafilatura

from benchmarks.results import Benchmark
from cpm_jax.curation.html import Extractor, extract_text


def blocks(page: bytes) -> list[str]:
    """The text of every `<pre>` of a page."""
    tree = trafilatura.load_html(page)
    found = [] if tree is None else [element.text_content() for element in tree.iter("pre")]
    return [text.replace("\r\n", "\n").strip("\n").rstrip() for text in found if text.strip()]


def measure(pages: Sequence[bytes], extractor: Extractor) -> tuple[float, int]:
    """Pages per second, and how many blocks of code are in the texts."""
    start = time.perf_counter()
    texts = [extract_text(page, extractor) for page in pages]
    rate = len(pages) / (time.perf_counter() - start)
    return rate, sum(block in text for page, text in zip(pages, texts, strict=True) for block in blocks(page))


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and writes results/extraction.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with .html files")
    pages = [path.read_bytes() for path in sorted(parser.parse_args(argv).folder.rglob("*.html"))]
    extract_text(pages[0])  # loads what it needs
    rate, whole = measure(pages, "keep_code_and_math")
    their_rate, their_whole = measure(pages, "prose")
    benchmark = Benchmark("extraction", "python -m benchmarks.extraction debian-handbook/html/en-US")
    total = sum(len(blocks(page)) for page in pages)
    benchmark.add("blocks of code in the pages", "", total, larger_is_better=True)
    for metric, unit, ours, theirs in (
        ("blocks that come through unchanged", "", whole, their_whole),
        ("pages", "pages/s/core", rate, their_rate),
    ):
        benchmark.add(metric, unit, ours, larger_is_better=True, baseline_name="trafilatura alone", baseline=theirs)
    benchmark.write()


if __name__ == "__main__":
    main()
