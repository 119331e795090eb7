"""Our filters beside datatrove's own, on the same documents: do they decide alike, and how fast are they.

    pip install datatrove spacy jieba   # in an environment of its own
    python -m benchmarks.filters SOURCE [SOURCE ...] [--limit 2000]

A source is what `prepare` and `curate` read. Each English or Chinese document is put to the rules of its language, by
both. Chinese thresholds are FineWeb 2's.
"""

import argparse
import collections
import itertools
import time
from collections.abc import Callable, Sequence

from benchmarks.results import Benchmark
from cpm_jax.curation.c4 import C4Quality
from cpm_jax.curation.code_and_math import prose
from cpm_jax.curation.document import Document, Filter
from cpm_jax.curation.fineweb import FineWebQuality
from cpm_jax.curation.gopher import GopherQuality, GopherRepetition
from cpm_jax.curation.language import LanguageId
from cpm_jax.curation.readers import Reading, plan_shards, read_shard

STOP_WORDS_ZH = tuple("的年在月是和日了於·為有被人中为他與後也而由")
DUPLICATE_ZH = ((5, 0.198), (6, 0.182), (7, 0.167), (8, 0.154), (9, 0.14), (10, 0.127))
TOP_ZH = ((2, 0.256), (3, 0.201), (4, 0.171))

MAX_CHARACTERS = 50_000  # datatrove's words of Chinese take quadratic time

Judge = Callable[[Document], tuple[bool, str]]


def ours(judge: Filter) -> Judge:
    """Our filter as a decision with its reason."""

    def decide(document: Document) -> tuple[bool, str]:
        judged = judge(document)
        return not judged.dropped, judged.dropped

    return decide


def theirs(judge: object) -> Judge:
    """A filter of datatrove as a decision with its reason."""
    from datatrove.data import Document as TheirDocument

    def decide(document: Document) -> tuple[bool, str]:
        result = judge.filter(TheirDocument(text=document.text, id=document.id))  # type: ignore[attr-defined]
        return result if isinstance(result, tuple) else (result, "")

    return decide


def pairs() -> dict[str, tuple[str, Judge, Judge]]:
    """The filters that are compared: language, ours, theirs."""
    from datatrove.pipeline import filters as datatrove

    gopher_zh = GopherQuality(
        min_word_length=1, max_word_length=5, min_alphabetic_words=0.735, stop_words=STOP_WORDS_ZH
    )
    return {
        "Gopher quality": ("en", ours(GopherQuality()), theirs(datatrove.GopherQualityFilter())),
        "Gopher repetition": ("en", ours(GopherRepetition()), theirs(datatrove.GopherRepetitionFilter())),
        "C4 quality": ("en", ours(C4Quality()), theirs(datatrove.C4QualityFilter())),
        "FineWeb quality": ("en", ours(FineWebQuality()), theirs(datatrove.FineWebQualityFilter())),
        "Gopher quality, Chinese": (
            "zh",
            ours(gopher_zh),
            theirs(
                datatrove.GopherQualityFilter(
                    language="cmn_Hani",
                    max_avg_word_length=5,
                    min_avg_word_length=1,
                    stop_words=list(STOP_WORDS_ZH),
                    max_non_alpha_words_ratio=0.735,
                )
            ),
        ),
        "Gopher repetition, Chinese": (
            "zh",
            ours(
                GopherRepetition(
                    max_duplicate_lines=0.287,
                    max_duplicate_paragraphs=None,
                    max_duplicate_line_characters=None,
                    max_duplicate_paragraph_characters=None,
                    max_top_ngram_characters=TOP_ZH,
                    max_duplicate_ngram_characters=DUPLICATE_ZH,
                )
            ),
            theirs(
                datatrove.GopherRepetitionFilter(
                    language="cmn_Hani",
                    dup_para_frac=0,
                    dup_line_char_frac=0,
                    dup_para_char_frac=0,
                    dup_line_frac=0.287,
                    top_n_grams=TOP_ZH,
                    dup_n_grams=DUPLICATE_ZH,
                )
            ),
        ),
        "FineWeb quality, Chinese": (
            "zh",
            ours(
                FineWebQuality(
                    min_terminal_lines=0.106,
                    max_short_lines=1.0,
                    max_duplicate_line_characters=0.1,
                    max_lines_per_word=0.178,
                )
            ),
            theirs(
                datatrove.FineWebQualityFilter(
                    language="cmn_Hani",
                    line_punct_thr=0.106,
                    short_line_thr=999,
                    char_duplicates_ratio=0.1,
                    new_line_ratio=0.178,
                )
            ),
        ),
    }


def timed(decide: Judge, documents: Sequence[Document]) -> tuple[list[tuple[bool, str]], float]:
    """All decisions, and the seconds that they took."""
    decide(documents[0])  # loads what it needs
    start = time.perf_counter()
    decisions = [decide(document) for document in documents]
    return decisions, time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    """Compares, and writes results/filters.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="what curate reads")
    parser.add_argument("--limit", type=int, default=2000, help="documents of each source")
    parser.add_argument("--show", action="store_true", help="print each document that is judged differently")
    args = parser.parse_args(argv)
    identify = LanguageId()
    documents: dict[str, list[Document]] = collections.defaultdict(list)
    for source in args.sources:
        shards, _ = plan_shards([source])
        items = (item for shard in shards for item in read_shard(shard, Reading()) if isinstance(item, Document))
        for item in itertools.islice(items, args.limit):
            found = identify(item)
            if not found.dropped and len(found.text) <= MAX_CHARACTERS:
                documents[found.language].append(found)
    benchmark = Benchmark("filters", "python -m benchmarks.filters SOURCES, see docs/curate.md")
    for name, (language, mine, other) in pairs().items():
        texts = documents[language]
        if not texts:
            continue
        (decided, seconds), (expected, their_seconds) = timed(mine, texts), timed(other, texts)
        differ = [index for index, (a, b) in enumerate(zip(decided, expected, strict=True)) if a[0] != b[0]]
        if args.show:
            for index in differ:
                print(name, "|", texts[index].id, "| ours:", decided[index], "| theirs:", expected[index])
        print(name, collections.Counter(reason for _, reason in decided).most_common(12))
        benchmark.add(f"{name}, documents", "", len(texts), larger_is_better=True)
        benchmark.add(
            f"{name}, kept",
            "documents",
            sum(kept for kept, _ in decided),
            larger_is_better=True,
            baseline_name="datatrove",
            baseline=sum(kept for kept, _ in expected),
        )
        benchmark.add(f"{name}, same decision", "%", 100 * (1 - len(differ) / len(texts)), larger_is_better=True)
        plain = {index for index, document in enumerate(texts) if prose(document.text) == document.text}
        same = 100 * (1 - len(plain.intersection(differ)) / len(plain))
        benchmark.add(f"{name}, same decision where there is no code", "%", same, larger_is_better=True)
        benchmark.add(
            f"{name}, speed",
            "documents/s/core",
            len(texts) / seconds,
            larger_is_better=True,
            baseline_name="datatrove",
            baseline=len(texts) / their_seconds,
        )
    benchmark.write()


if __name__ == "__main__":
    main()
