"""The quality classifier with the paper's settings on real text, English and Chinese: how good, how fast, how big.

`python -m benchmarks.classify [--corpora DIR]`. English: essays and manuals against spam mails; Chinese: a manual
against quotations and poems. Subjects differ between the classes, which makes both easy: the figures show that the
tool works, not that quality is told from its lack.
"""

import argparse
import re
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Benchmark
from benchmarks.verification_corpora import (
    ESSAYS,
    MAILS,
    MANUALS,
    chunks,
    essays,
    mail_chunks,
    mails_of,
    package,
    pages,
)
from cpm_jax.curation.classifier import ClassifierConfig, load_classifier, train_classifier
from cpm_jax.curation.document import Document
from cpm_jax.curation.pools import Pool
from cpm_jax.curation.text_normalization import TextNormalizer
from cpm_jax.data.tokenizer import Tokenizer

CHINESE = "fortunes-zh"


def english(folder: Path) -> tuple[list[str], list[str]]:
    """Essays and manuals, and spam."""
    good = [*essays(package(folder, ESSAYS)), *pages(package(folder, MANUALS) / f"{_BOOK}/en-US")[0]]
    return [c for text in good for c in chunks(text)], mail_chunks(mails_of(package(folder, MAILS), "spam-*"))


def chinese(folder: Path) -> tuple[list[str], list[str]]:
    """A manual, and quotations and poems."""
    manual = "\n\n".join(pages(package(folder, MANUALS) / f"{_BOOK}/zh-CN")[0])
    files = sorted((package(folder, CHINESE) / "usr/share/games/fortunes").glob("*"))
    quotations = "".join(path.read_text("utf-8") for path in files if path.suffix == "" and path.is_file())
    return _pieces(manual), _pieces(re.sub(r"\x1b\[[0-9;]*m", "", quotations).replace("\n%\n", "\n\n"))


_BOOK = "usr/share/doc/debian-handbook/html"


def _pieces(text: str) -> list[str]:
    """Pieces of 500 characters that are Chinese: translations leave some pages in English."""
    cut = [text[i : i + 500] for i in range(0, len(text) - 500, 500)]
    return [piece for piece in cut if sum("\u4e00" <= c <= "\u9fff" for c in piece) > 150]


def published(texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """The published preprocessing, step by step and one text at a time."""
    lines = []
    for text in texts:
        text = re.sub(r"\n{3,}", "\n\n", text).lower()
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")
        text = " ".join(tokenizer.decode([token]) for token in tokenizer.encode(text))
        text = text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
        lines.append(re.sub(" +", " ", text).strip())
    return lines


def measure(bench: Benchmark, language: str, good: Sequence[str], bad: Sequence[str], folder: Path) -> None:
    """Trains on two pools and adds what was measured."""
    positive, negative = (
        Pool(name, [Document(text, id=str(i)) for i, text in enumerate(dict.fromkeys(texts))], Counter())
        for name, texts in (("positive", good), ("negative", bad))
    )
    begin = time.perf_counter()
    result = train_classifier(ClassifierConfig(), positive, negative, folder)
    examples = sum(result["examples"].values())
    bench.add(f"{language}, {examples} examples: training", "s", time.perf_counter() - begin, larger_is_better=False)
    chance = result["held_out"]["positive"] / sum(result["held_out"].values())
    for name, found in (("quantised", result), ("before", result["before_quantization"])):
        bench.add(
            f"{language}, average precision, {name}",
            "of 1",
            found["average_precision"],
            larger_is_better=True,
            baseline_name="chance",
            baseline=chance,
        )
    bench.add(f"{language}, calibration error", "of 1", result["expected_calibration_error"], larger_is_better=False)
    bench.add(f"{language}, size of the model", "MB", result["model"]["bytes"] / 1e6, larger_is_better=False)
    scorer, _ = load_classifier(folder)
    texts = [document.text for pool in (positive, negative) for document in pool.documents][:4000]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    begin = time.perf_counter()
    scorer(texts)
    bench.add(
        f"{language}, scoring in one process", "MB/s", megabytes / (time.perf_counter() - begin), larger_is_better=True
    )
    tokenizer = Tokenizer.load(folder / "tokenizer")
    normalizer = TextNormalizer(tokenizer)
    begin = time.perf_counter()
    ours = normalizer(texts)
    between = time.perf_counter()
    theirs = published(texts, tokenizer)
    end = time.perf_counter()
    assert ours == theirs
    bench.add(
        f"{language}, preprocessing, to the same lines",
        "MB/s",
        megabytes / (between - begin),
        larger_is_better=True,
        baseline_name="the published steps, a text at a time",
        baseline=megabytes / (end - between),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures both languages and writes `results/classify.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=Path("runs/corpora"), help="where packages are unpacked")
    args = parser.parse_args(argv)
    bench = Benchmark("classify", "python -m benchmarks.classify")
    with tempfile.TemporaryDirectory() as temporary:
        for language, read in (("English", english), ("Chinese", chinese)):
            measure(bench, language, *read(args.corpora), Path(temporary) / language)
    bench.write()


if __name__ == "__main__":
    main()
