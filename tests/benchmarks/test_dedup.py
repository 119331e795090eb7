"""What the benchmark of deduplication plants, and what it says of it."""

import random

import pytest

from benchmarks import dedup
from benchmarks.results import Benchmark
from cpm_jax.curation.document import Document


@pytest.fixture(scope="module")
def documents():
    draw = random.Random(0)

    def paragraph():
        return " ".join(f"{draw.choice(['sea', 'light', 'storm'])}{draw.randrange(10_000)}" for _ in range(60))

    return [Document("\n\n".join(paragraph() for _ in range(3)), str(number)) for number in range(30)]


def test_paragraphs_are_found_and_passages_within_others_are_not(documents):
    benchmark = Benchmark("dedup", "command")
    dedup.measure_paragraphs(benchmark, documents)
    assert {row.metric: row.ours for row in benchmark.rows} == {
        "recall, paragraphs (30 planted)": 100.0,
        "precision, paragraphs": 100.0,
        "recall, a passage within another paragraph (30 planted)": 0.0,
    }


def test_the_precision_of_exact_duplicates_is_by_the_texts(documents, monkeypatch):
    def precision():
        benchmark = Benchmark("dedup", "command")
        dedup.measure_documents(benchmark, documents[:10])
        rows = {row.metric: row.ours for row in benchmark.rows}
        return rows["precision: exact duplicates whose very text occurred before"]

    assert precision() == 100.0
    right = dedup.dedup.find_duplicates

    def one_wrong(keys):
        fates = right(keys)
        fates[0] = dedup.dedup.EXACT  # nothing is before it
        return fates

    monkeypatch.setattr(dedup.dedup, "find_duplicates", one_wrong)
    assert precision() < 100.0
