"""The parts of the study of verification, and a small study of its own, cut off and gone on with."""

import dataclasses
import json
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import verification_trust_study
from benchmarks.results import Benchmark
from benchmarks.verification_corpora import CHUNK, QUALITY, Corpora, chunks, shuffled, templated, with_boilerplate
from benchmarks.verification_trust import GIN_FILE, Sized, claim, read_recipe
from benchmarks.verification_trust_report import add_rows, analyse, null_case
from benchmarks.verification_trust_study import Batches, Recipe, Rows, Study, prepare, small_model
from cpm_jax.common.config import ConfigError
from cpm_jax.common.gin_files import list_gin_files
from cpm_jax.curation.verification import BITS_PER_BYTE, Scores
from cpm_jax.data.records import PackedRecord
from cpm_jax.modeling.model_size import count_params

SMOKE = Recipe(
    model=small_model(512, 1, 32, 1, 128),
    peak_lr=0.01,
    seq_len=64,
    batch_size=10,
    stable_steps=6,
    decay_steps=2,
    verify_seeds=2,
    scratch_seeds=1,
    characters=60_000,
    parts=2,
    passages=10,
    passage=150,
)


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


def test_every_size_is_a_gin_file_and_the_larger_ones_are_larger():
    folder = GIN_FILE.rpartition("/")[0]
    files = [path for path in list_gin_files(folder) if path.name.startswith("verification_trust")]
    found = {path.stem: read_recipe(f"{folder}/{path.name}", []).recipe for path in files}
    size = {name: (count_params(r.model).total, r.stable_steps * r.batch_size * r.seq_len) for name, r in found.items()}
    base, hours, gpu = (f"verification_trust{end}" for end in ("", "_3h", "_gpu"))
    assert set(size) == {base, hours, gpu}
    assert size[base] == (229_696, 512_000)
    assert 0.5e6 < size[hours][0] < 5e6
    assert 5e6 < size[hours][1] < 20e6
    assert 10 < size[gpu][0] / size[base][0] < 100
    assert read_recipe(GIN_FILE, ["--gin.DECAY_STEPS=7"]).recipe == dataclasses.replace(found[base], decay_steps=7)


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match=r"Recipe.batch_size = 12: must be divisible by 10"):
        dataclasses.replace(SMOKE, batch_size=12)


def test_a_workdir_knows_its_study_and_refuses_another(tmp_path):
    with pytest.raises(ConfigError, match="give a --gin_file"):
        claim(tmp_path, None)
    asked = Sized("mine", SMOKE)
    assert claim(tmp_path, asked) == claim(tmp_path, None) == claim(tmp_path, asked) == asked
    with pytest.raises(ConfigError, match="decay_steps: 2 there, now 3"):
        claim(tmp_path, Sized("mine", dataclasses.replace(SMOKE, decay_steps=3)))


@pytest.mark.slow
def test_a_study_that_was_cut_off_goes_on_and_says_what_it_found(pool_texts, tmp_path, monkeypatch):
    prose, code = pool_texts["prose"], pool_texts["code"]
    texts = Corpora(
        default=code,
        candidates={n: [shuffled(t, random.Random(1)) for t in prose] if q else prose for n, q in QUALITY.items()},
        parts=[prose[::2], prose[1::2]],
        held_out={"prose": [text[:150] for text in prose[:30]], "code": [text[:150] for text in code[:30]]},
    )
    monkeypatch.setattr(verification_trust_study, "read_corpora", lambda *_, **__: texts)
    prepare(SMOKE, tmp_path, tmp_path / "corpora.npz")
    assert not Study(SMOKE, tmp_path).run(deadline=time.monotonic() - 1)  # the base, and no cell
    study = Study(SMOKE, tmp_path)
    assert study.run(deadline=float("inf"))
    first = study.path(*study.cells()[0])
    written = first.read_text()
    first.unlink()
    assert Study(SMOKE, tmp_path).run(deadline=float("inf"))
    assert json.loads(first.read_text())["bits"] == json.loads(written)["bits"]
    result = analyse(study)
    assert result["figures"]["shuffled"]["verify"] == result["figures"]["french"]["verify"]  # here the same text
    assert result["compute_ratio"] == 4
    bench = Benchmark("verification_trust", "test")
    add_rows(bench, result)
    assert any(row.baseline == 0.05 for row in bench.rows)


def test_documents_that_all_seeds_share_are_told_apart_and_halves_of_their_set_are_not():
    """Parts differ by what happens to be in them; halves of which each seed reads another part do not."""
    rng, seeds, items = np.random.default_rng(0), 4, 100
    effects = 0.05 * rng.standard_normal(8)
    passages = rng.standard_normal(items)  # the same for all: comparisons are paired
    values = {
        f"part{i}": {"texts": passages + effect + 0.02 * rng.standard_normal((seeds, items))}
        for i, effect in enumerate(effects)
    }
    scores = Scores(BITS_PER_BYTE, {"texts": np.ones(items)}, values)
    study = SimpleNamespace(
        sets=values, recipe=dataclasses.replace(SMOKE, verify_seeds=seeds), scores=lambda kind, names: scores
    )
    found = null_case(study, redraws=1, halvings=20)
    assert found["parts"]["significant_after_holm"] > 20  # of 28
    assert found["halves"]["pairs"] == 20
    assert found["halves"]["significant_at_5_percent"] <= 3
