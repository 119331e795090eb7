"""The quality classifier on real texts, English and Chinese: how good, how fast, how big, beside scikit-learn.

`python -m benchmarks.classify [--corpora DIR] [--bucket ROWS]`: the paper's settings, but for the rows of n-grams, of
which the paper says nothing and which decide the memory. In each language one pair of pools that differ in their
subjects, which is easy, and one of the same kind of text: letters and spam, both mails; favourable and unfavourable
reviews. The baseline is logistic regression on tf-idf of words and pairs of words, of the same lines and split.
"""

import argparse
import re
import resource
import tempfile
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from benchmarks import chinese_texts
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
from cpm_jax.curation.classifier import ClassifierConfig, load_classifier, split_pools, train_classifier
from cpm_jax.curation.document import Document
from cpm_jax.curation.fasttext_classifier import FastTextConfig
from cpm_jax.curation.pools import Pool
from cpm_jax.curation.text_normalization import TextNormalizer
from cpm_jax.data.tokenizer import Tokenizer

# Rows that are kept when a model is quantised. Most of the time goes into their codebooks, and grows with them.
_CUTOFF = 20_000


class Texts(NamedTuple):
    """Two pools, the one to keep first."""

    positive: Sequence[str]
    negative: Sequence[str]


def essays_and_spam(folder: Path) -> Texts:
    """Essays and a handbook, and spam."""
    handbook = package(folder, MANUALS) / "usr/share/doc/debian-handbook/html/en-US"
    good = [*essays(package(folder, ESSAYS)), *pages(handbook)[0]]
    return Texts([c for text in good for c in chunks(text)], mail_chunks(mails_of(package(folder, MAILS), "spam-*")))


def letters_and_spam(folder: Path) -> Texts:
    """Single mails: those of people to each other, and spam."""
    mails = package(folder, MAILS)
    return Texts(mails_of(mails, "easy-ham-*"), mails_of(mails, "spam-*"))


TASKS: Mapping[str, Callable[[Path], Texts]] = {
    "English, essays / spam": essays_and_spam,
    "English, letters / spam": letters_and_spam,
    "Chinese, news / reviews": lambda folder: Texts(
        chinese_texts.news(folder),
        chinese_texts.documents(chinese_texts.reviews(folder, "pos") + chinese_texts.reviews(folder, "neg")),
    ),
    "Chinese, favourable / unfavourable reviews": lambda folder: Texts(
        chinese_texts.reviews(folder, "pos"), chinese_texts.reviews(folder, "neg")
    ),
}


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


def measure(bench: Benchmark, task: str, texts: Texts, bucket: int, folder: Path) -> None:
    """Trains on two pools and adds what was measured."""
    positive, negative = (
        Pool(name, [Document(text, id=str(i)) for i, text in enumerate(dict.fromkeys(pool)) if text])
        for name, pool in zip(("positive", "negative"), texts, strict=True)
    )
    config = ClassifierConfig(scorer=FastTextConfig(bucket=bucket, cutoff=_CUTOFF))
    begin = time.perf_counter()
    result = train_classifier(config, positive, negative, folder)
    seconds = time.perf_counter() - begin
    examples, held_out = (sum(result[name].values()) for name in ("examples", "held_out"))
    tokenizer = Tokenizer.load(folder / "tokenizer")
    normalizer = TextNormalizer(tokenizer)
    full = result["before_quantization"]
    about = f"{task}, {held_out} held out"
    for name, figure, other, baseline in (
        (
            "quantised",
            result,
            "tf-idf and logistic regression",
            tfidf_precision(config, positive, negative, normalizer),
        ),
        ("before", full, "chance", result["held_out"]["positive"] / held_out),
    ):
        bench.add(
            f"{about}: average precision, {name}",
            "of 1",
            figure["average_precision"],
            larger_is_better=True,
            baseline_name=other,
            baseline=baseline,
        )
    for name in ("precision", "recall"):
        bench.add(f"{about}: {name} at 0.5", "of 1", result["at_threshold"][name] or 0.0, larger_is_better=True)
    bench.add(f"{about}: calibration error", "of 1", result["expected_calibration_error"], larger_is_better=False)
    bench.add(f"{task}: training, {examples} examples", "s", seconds, larger_is_better=False)
    bench.add(f"{task}: size of the model", "MB", result["model"]["bytes"] / 1e6, larger_is_better=False)
    sample = [document.text for pool in (positive, negative) for document in pool.documents][:4000]
    measure_speed(bench, task, sample, tokenizer, folder)


def tfidf_precision(config: ClassifierConfig, positive: Pool, negative: Pool, normalizer: TextNormalizer) -> float:
    """Average precision of the baseline: the same examples, lines and held-out documents."""
    split = split_pools(config, positive, negative)
    vectorizer = TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2), min_df=5, sublinear_tf=True)
    examples = vectorizer.fit_transform(normalizer(split.texts))
    model = LogisticRegression(C=10.0, max_iter=200).fit(examples, split.labels)
    found = model.decision_function(vectorizer.transform(normalizer([d.text for d in split.held_out])))
    return float(average_precision_score(np.asarray(split.held_out_labels), found))


def measure_speed(bench: Benchmark, task: str, texts: Sequence[str], tokenizer: Tokenizer, folder: Path) -> None:
    """Adds how fast a trained classifier scores, and how fast texts are made lines."""
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    scorer, _ = load_classifier(folder)
    begin = time.perf_counter()
    scorer(texts)
    seconds = time.perf_counter() - begin
    bench.add(f"{task}: scoring in one process", "documents/s", len(texts) / seconds, larger_is_better=True)
    bench.add(f"{task}: scoring in one process", "MB/s", megabytes / seconds, larger_is_better=True)
    normalizer = TextNormalizer(tokenizer)
    begin = time.perf_counter()
    ours = normalizer(texts)
    between = time.perf_counter()
    theirs = published(texts, tokenizer)
    end = time.perf_counter()
    assert ours == theirs
    bench.add(
        f"{task}: preprocessing, to the same lines",
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
    parser.add_argument(
        "--bucket",
        type=int,
        default=1_000_000,
        help="rows of n-grams, 1 KB each and twice in memory while the model is quantised; fastText's default is 2M",
    )
    args = parser.parse_args(argv)
    bench = Benchmark("classify", f"python -m benchmarks.classify --bucket {args.bucket}")
    with tempfile.TemporaryDirectory() as temporary:
        for number, (task, read) in enumerate(TASKS.items()):
            measure(bench, task, read(args.corpora), args.bucket, Path(temporary) / str(number))
            print(f"{task}: done", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux
    bench.add("most memory of all", "GiB", peak, larger_is_better=False)
    bench.write()


if __name__ == "__main__":
    main()
