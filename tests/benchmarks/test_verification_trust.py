"""The parts of the study of verification, and a small study of its own, cut off and gone on with."""

import dataclasses
import json
import random
import time

import numpy as np
import pytest

from benchmarks import verification_trust
from benchmarks.results import Benchmark
from benchmarks.verification_corpora import CHUNK, QUALITY, Corpora, chunks, shuffled, templated, with_boilerplate
from benchmarks.verification_trust import RECIPES, Batches, Rows, Study, add_rows, analyse, prepare
from cpm_jax.data.records import PackedRecord


def test_shuffling_keeps_the_words_and_nothing_else(pool_texts):
    text = pool_texts["prose"][0]
    mixed = shuffled(text, random.Random(0))
    assert sorted(mixed.split()) == sorted(text.split())
    assert mixed.split() != text.split()


def test_boilerplate_is_about_half_and_the_text_stays_in_order(pool_texts):
    text = "\n\n".join(pool_texts["prose"][:20])
    mixed = with_boilerplate(text, ["Home", "Next page", "All rights reserved"], random.Random(0))
    assert 1.7 < len(mixed) / len(text) < 2.6
    places = [mixed.index(paragraph) for paragraph in dict.fromkeys(text.split("\n\n"))]
    assert places == sorted(places)


def test_templates_have_the_length_of_the_text_but_not_its_sentences(pool_texts):
    documents = pool_texts["prose"][:30]
    found = templated(documents, random.Random(0))
    assert sum(map(len, found)) >= sum(map(len, documents))
    assert not set(" ".join(found).split(". ")) & set(" ".join(documents).split(". "))


def test_chunks_are_a_text_in_order():
    text = "\n\n".join(f"paragraph {i} " + "word " * 60 for i in range(40))
    found = chunks(text)
    assert all(len(chunk) >= CHUNK for chunk in found)
    assert (text + "\n\n").startswith("".join(found))


def rows(name, count=7):
    records = [PackedRecord(np.full(5, i, np.uint32), np.zeros(1, np.uint32), np.ones(5, bool)) for i in range(count)]
    return Rows(records, name)


def test_each_epoch_has_every_row_once_and_batches_are_addressed_by_step():
    taken = [int(r.tokens[0]) for r in rows(0).take(3, 0, 14)]
    assert sorted(taken[:7]) == sorted(taken[7:]) == list(range(7))
    assert taken[:7] != taken[7:]
    sets = [(rows(0), 3), (rows(1), 2)]
    ahead = Batches(sets, 3, 0, 4)
    for _ in range(4):
        batch = next(ahead)
    np.testing.assert_array_equal(batch["tokens"], next(Batches(sets, 3, 3, 4))["tokens"])
    assert batch["source_ids"].tolist() == [0, 0, 0, 1, 1]


@pytest.mark.slow
def test_a_study_that_was_cut_off_goes_on_and_says_what_it_found(pool_texts, tmp_path, monkeypatch):
    prose, code = pool_texts["prose"], pool_texts["code"]
    texts = Corpora(
        default=code,
        candidates={n: [shuffled(t, random.Random(1)) for t in prose] if q else prose for n, q in QUALITY.items()},
        parts=[prose[::2], prose[1::2]],
        held_out={"prose": [text[:150] for text in prose[:30]], "code": [text[:150] for text in code[:30]]},
    )
    monkeypatch.setattr(verification_trust, "read_corpora", lambda *_, **__: texts)
    recipe = dataclasses.replace(RECIPES["smoke"], stable_steps=6, decay_steps=2)
    prepare(recipe, tmp_path, tmp_path / "corpora.npz")
    assert not Study(recipe, tmp_path).run(deadline=time.monotonic() - 1)  # the base, and no cell
    study = Study(recipe, tmp_path)
    assert study.run(deadline=float("inf"))
    first = study.path(*study.cells()[0])
    written = first.read_text()
    first.unlink()
    assert Study(recipe, tmp_path).run(deadline=float("inf"))
    assert json.loads(first.read_text())["bits"] == json.loads(written)["bits"]
    result = analyse(study)
    assert result["figures"]["shuffled"]["verify"] == result["figures"]["french"]["verify"]  # here the same text
    assert result["compute_ratio"] == 4
    bench = Benchmark("verification_trust", "test")
    add_rows(bench, result)
    assert any(row.baseline == 0.05 for row in bench.rows)
