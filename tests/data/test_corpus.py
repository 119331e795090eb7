"""A pass over a corpus; what becomes of it is in test_prepare.py."""

import json
import tracemalloc

import numpy as np
import pytest

from cpm_jax.data.corpus import CleanDocument, Corpus, clean_text


def make_corpus(tmp_path, *sources, **options):
    defaults = {"format": "text", "text_field": "text", "extensions": None, "tfds_data_dir": None, "seed": 0}
    return Corpus(tuple(map(str, sources)), work_dir=tmp_path, **defaults | options)


def write_jsonl(path, texts):
    with open(path, "w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")


def test_clean_text():
    assert clean_text("a\r\nb\rc\x85d\u2028e\u2029f\n\ng\r\r\nh") == "a\nb\nc\nd\ne\nf\n\ng\n\nh"
    assert clean_text("a\0b\tc\x0cd  ") == "ab\tc\x0cd  "


def test_duplicates_are_dropped_across_sources_and_counted(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "one"])
    write_jsonl(tmp_path / "b.jsonl", ["three", "two\0", ""])
    reading = make_corpus(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.jsonl").read()
    found = [item.document.text for item in reading if isinstance(item, CleanDocument)]
    assert found == ["one", "two", "three"]
    assert reading.duplicates == 2
    assert dict(reading.rejects) == {"empty text": 1}
    assert dict(reading.documents) == {str(tmp_path / "a.jsonl"): 2, str(tmp_path / "b.jsonl"): 1}
    assert not list(tmp_path.glob("seen*"))


def test_positions_are_uniform_and_depend_on_id_and_seed_alone(tmp_path):
    positions = {}
    for place, seed in (("x", 0), ("y", 0), ("x", 1)):
        (tmp_path / place).mkdir(exist_ok=True)
        write_jsonl(tmp_path / place / "a.jsonl", [f"{place} {i}" for i in range(4000)])
        items = make_corpus(tmp_path, tmp_path / place / "a.jsonl", seed=seed).read()
        positions[place, seed] = np.array([item.position for item in items if isinstance(item, CleanDocument)])
    np.testing.assert_array_equal(positions["x", 0], positions["y", 0])
    assert not np.any(positions["x", 0] == positions["x", 1])
    ordered = np.sort(positions["x", 0])
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand draws; these are always the same.
    assert np.abs(ordered - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / np.sqrt(4000)


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_the_threshold_is_the_fraction_where_that_holds_something_out(tmp_path, fraction):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(100)])
    assert make_corpus(tmp_path, tmp_path / "a.jsonl").validation_threshold(fraction) == fraction


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    for count in (1000, 8000):
        path = tmp_path / f"{count}.jsonl"
        write_jsonl(path, (f"{i} " + "word " * 400 for i in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in make_corpus(tmp_path, path).read()) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < path.stat().st_size / 10
