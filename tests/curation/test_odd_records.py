"""Records that are legal and yet odd: none ends a run, none is lost without a word."""

import json
import random

import pyarrow.parquet
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.curation import statistics
from cpm_jax.curation.cleaning import FixEncoding
from cpm_jax.curation.document import Document, FilterError
from cpm_jax.curation.gopher import GopherQuality
from cpm_jax.curation.pipeline import CARD, PipelineConfig, curate
from cpm_jax.curation.statistics import Statistics, common
from cpm_jax.curation.writers import load_dump


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(sources, folder, **settings):
    return curate(PipelineConfig(str(sources), num_workers=0, **settings), folder, progress=False)


def drop_bad(document):
    return document.drop("bad") if "bad" in document.text else document


def rows_of(folder):
    paths = sorted((folder / "data").iterdir())
    return [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]


def test_integers_that_no_column_holds_and_scores_that_are_no_numbers_stay_as_json(tmp_path):
    numbers = [5, 2**63 - 1, -(2**63), 2**63, 10**400]
    rows = [{"text": f"text {n}", "hash": number, "size": n, "score": 10**400} for n, number in enumerate(numbers)]
    rows[0]["score"] = 0.5
    rows[1]["score"] = float("nan")
    write(tmp_path / "a.jsonl", rows)
    manifest = run(tmp_path / "a.jsonl", tmp_path / "out")
    assert manifest["documents"] == len(numbers)
    written = rows_of(tmp_path / "out")
    assert [row["size"] for row in written] == [0, 1, 2, 3, 4]
    assert [row["score"] for row in written] == [0.5, None, None, None, None]
    assert [json.loads(row["metadata"])["hash"] for row in written] == numbers
    write(tmp_path / "b.jsonl", rows[:3])
    run(tmp_path / "b.jsonl", tmp_path / "fits")
    assert [row["hash"] for row in rows_of(tmp_path / "fits")] == numbers[:3]


@pytest.mark.parametrize("text", ["kept", "bad"])
def test_lone_surrogates_in_any_field_become_question_marks(tmp_path, text):
    odd = {"id": "\ud800", "source": "s\ud800", "url": "u\ud800", "language": "l\ud800", "key\ud800": ["v\ud800"]}
    write(tmp_path / "a.jsonl", [{"text": text} | odd, {"text": "another"}])
    run(tmp_path / "a.jsonl", tmp_path / "out", filters=(drop_bad,), output_format="jsonl.zst")
    (path,) = (tmp_path / "out" / "dropped").iterdir()
    if text == "bad":
        (found,) = load_dump(path)
        assert found == Document("bad", "?", "s?", "u?", "l?", {"key?": ["v?"]}, dropped="bad")
    assert "`?`" in (tmp_path / "out" / CARD).read_text()


def test_files_that_count_their_records_from_0_lose_none(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.jsonl", [{"text": f"{name} {n}", "id": n, "source": "s"} for n in range(5)])
    write(tmp_path / "in" / "c.jsonl", [{"text": "a 1", "id": 1, "source": "s"}])
    manifest = run(tmp_path / "in", tmp_path / "out")
    assert (manifest["documents"], manifest["repeated_ids"], manifest["drops"]) == (10, 5, {"exact duplicate": 1})
    ids = [row["id"] for row in rows_of(tmp_path / "out")]
    assert ids == [*"01234", *(f"{n}#00001-{n}" for n in range(5))]
    assert "5 had the id of an earlier document" in (tmp_path / "out" / CARD).read_text()


def fail_at_bad(document):
    return document if "bad" not in document.text else 1 / 0


def test_a_filter_that_fails_names_the_file_and_the_document_and_a_mended_one_goes_on(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "in" / f"{name}.jsonl", [{"text": f"{name} {n}", "id": f"{name}{n}"} for n in range(3)])
    write(tmp_path / "in" / "c.jsonl", [{"text": "good"}, {"text": "bad", "id": "c7"}])
    with pytest.raises(FilterError, match=r"^c\.jsonl: filter fail_at_bad, document 'c7' of .*ZeroDivisionError"):
        run(tmp_path / "in", tmp_path / "out", filters=(fail_at_bad,))
    monkeypatch.setattr(fail_at_bad, "__code__", (lambda document: document).__code__)
    assert run(tmp_path / "in", tmp_path / "out", filters=(fail_at_bad,))["documents"] == 8


def test_a_text_of_which_filters_leave_nothing_is_dropped(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "\x00\x01\x02"}, {"text": "good"}])
    manifest = run(tmp_path / "a.jsonl", tmp_path / "out", filters=(FixEncoding(),))
    assert (manifest["documents"], manifest["drops"]) == (1, {"empty text": 1})


def test_gopher_quality_asks_for_a_word_since_its_rules_are_shares_of_words():
    with pytest.raises(ConfigError, match=r"GopherQuality.min_words = 0: must be at least 1"):
        GopherQuality(min_words=0)
    assert GopherQuality(min_words=1)(Document("```\nx\n```", "1")).dropped == "gopher: too few words"


def counted(names, parts):
    """The statistics of documents from sources of these names, counted in so many shards."""
    total = Statistics()
    for part in range(parts):
        shard = Statistics()
        for number, name in enumerate(names[part * len(names) // parts : (part + 1) * len(names) // parts]):
            shard.add(Document("text", f"{part}/{number}", source=name, metadata={"license": name * 300}))
        total.merge(Statistics.from_json(json.loads(json.dumps(shard.to_json()))))
    return total


def test_counts_by_name_are_exact_for_a_few_and_bounded_for_many(monkeypatch):
    monkeypatch.setattr(statistics, "_MOST_NAMES", 120)
    draw = random.Random(0)
    few = [f"source {draw.randrange(90)}" for _ in range(300)]
    assert counted(few, 1).sources == counted(few, 7).sources
    assert sum(counted(few, 7).sources.values()) == 300
    many = [f"http://site/{n}" if n % 3 else f"common {n % 4}" for n in range(900)]
    total = counted(many, 5)
    assert len(total.sources) <= 240
    assert sum(total.sources.values()) == 900
    assert len(total.to_json()["licences"]) <= 240
    assert max(map(len, total.licences)) == 200
    shown = common(total.sources)
    assert len(shown) == 101
    assert list(shown)[:4] == [f"common {n}" for n in range(4)]
    assert shown["other"] == 900 - 300 - 96
    assert common({"a": 1, "other": 5, "b": 2}) == {"b": 2, "a": 1, "other": 5}
