import json

import pytest

from cpm_jax.common.config import InputError
from cpm_jax.curation.pools import PoolError
from cpm_jax.curation.rounds import (
    Pools,
    Seeds,
    choose_seeds,
    compare_scored,
    margin,
    next_pools,
    sample_scored,
    split_scored,
)

POOLS = Pools({"books": "/b", "forum": "/f"}, {"raw": "/r", "spam": "/s"})


def scored(folder, scores, part=3):
    """Documents t0, t1, … with these scores, kept from 0.5 on, in parts."""
    folder.mkdir()
    rows = [
        {"id": f"d{i}", "text": f"t{i}", "scores": {"c": s}, "dropped": "" if s >= 0.5 else "c"}
        for i, s in enumerate(scores)
    ]
    for number in range(0, len(rows), part):
        lines = "".join(json.dumps(row) + "\n" for row in rows[number : number + part])
        (folder / f"part-{number // part:05d}.jsonl").write_text(lines)
    return folder


def test_the_best_positive_and_the_worst_negative_pool_are_the_seeds():
    assert choose_seeds(POOLS, ["forum", "raw", "default", "books", "spam"]) == Seeds(("forum",), ("spam",))
    assert choose_seeds(POOLS, ["raw", "spam", "books", "forum"]) == Seeds(("books",), ("spam",))


def test_without_a_ranking_all_pools_are_seeds():
    assert choose_seeds(POOLS, None) == Seeds(("books", "forum"), ("raw", "spam"))


def test_the_next_round_chooses_between_the_seeds_and_what_was_inferred(tmp_path):
    found = next_pools(POOLS, Seeds(("forum",), ("spam",)), 1, {"kept": 50, "dropped": 50}, tmp_path)
    assert found == Pools(
        {"forum": "/f", "kept_1": str(tmp_path / "kept")}, {"spam": "/s", "dropped_1": str(tmp_path / "dropped")}
    )


def test_the_raw_documents_are_not_negative_once_some_are_kept(tmp_path):
    found = next_pools(POOLS, Seeds(("forum",), ("raw",)), 3, {"kept": 50, "dropped": 50}, tmp_path)
    assert list(found.negative) == ["dropped_3"]


def test_too_few_dropped_documents_are_said(tmp_path):
    with pytest.raises(PoolError, match=r"round 2: the negative pool dropped_1 has 19 documents.* kept 81 of 100"):
        next_pools(POOLS, Seeds(("forum",), ("raw",)), 1, {"kept": 81, "dropped": 19}, tmp_path)


def test_a_margin_is_that_of_the_first_whichever_is_better():
    pair = {"first": "a", "second": "b", "value": 2.0, "interval": [-1.0, 5.0]}
    results = {"pairs": [pair | {"adjusted_p_value": 0.2, "significant": False}]}
    assert margin(results, "a", "b")["interval"] == [-1.0, 5.0]
    turned = margin(results, "b", "a")
    assert (turned["value"], turned["interval"]) == (-2.0, [-5.0, 1.0])


def test_every_scored_document_is_on_one_side_as_it_was(tmp_path):
    source = scored(tmp_path / "scored", [0.9, 0.1, 0.5, 0.8, 0.7, 0.6, 0.2])
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / ".part-00000.jsonl.x.tmp").write_text("a kill left this")
    split_scored(source, tmp_path)
    kept, dropped = ([p.read_text() for p in sorted((tmp_path / name).iterdir())] for name in ("kept", "dropped"))
    assert [json.loads(line)["id"] for text in kept for line in text.splitlines()] == ["d0", "d2", "d3", "d4", "d5"]
    assert [json.loads(line)["id"] for text in dropped for line in text.splitlines()] == ["d1", "d6"]
    assert sorted("".join(kept + dropped)) == sorted("".join(p.read_text() for p in source.iterdir()))
    assert len(dropped) == 2  # the second part has no dropped document, and no file of them


def test_the_text_of_pools_is_called_as_in_other_pools(tmp_path):
    split_scored(scored(tmp_path / "scored", [0.9, 0.1]), tmp_path, "content")
    row = json.loads((tmp_path / "kept" / "part-00000.jsonl").read_text())
    assert row["content"] == "t0"
    assert "text" not in row


def test_changes_are_counted_and_the_largest_shown(tmp_path):
    before = scored(tmp_path / "before", [0.9, 0.9, 0.1, 0.4, 0.2, 0.8])
    now = scored(tmp_path / "now", [0.9, 0.3, 0.1, 0.6, 0.9, 0.7], part=4)
    found = compare_scored(before, now, "c")
    assert {name: found[name] for name in ("both", "only_now", "only_before", "neither")} == {
        "both": 2,
        "only_now": 2,
        "only_before": 1,
        "neither": 1,
    }
    assert found["overlap"] == 2 / 5
    assert [(e["id"], e["score_before"]) for e in found["examples"]["kept"]] == [("d4", 0.2), ("d3", 0.4)]
    assert [(e["id"], e["score"]) for e in found["examples"]["dropped"]] == [("d1", 0.3)]


@pytest.mark.parametrize("scores", [[0.9, 0.1], [0.9, 0.1, 0.2, 0.3]])
def test_rounds_over_different_documents_are_refused(tmp_path, scores):
    before, now = scored(tmp_path / "before", [0.9, 0.1, 0.2]), scored(tmp_path / "now", scores)
    with pytest.raises(InputError, match="the raw sources have changed between two rounds"):
        compare_scored(before, now, "c")


def test_a_sample_has_both_sides_and_does_not_depend_on_parts(tmp_path):
    values = [i / 40 for i in range(40)]
    found = sample_scored(scored(tmp_path / "a", values), "c")
    assert found == sample_scored(scored(tmp_path / "b", values, part=7), "c")
    assert [len(found[name]) for name in ("kept", "dropped")] == [5, 5]
    assert min(e["score"] for e in found["kept"]) >= 0.5 > max(e["score"] for e in found["dropped"])
