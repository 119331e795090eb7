"""The verb `rounds`, end to end on a model that learns in seconds: prose in a heap of code."""

import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from cpm_jax.common import files
from cpm_jax.common.config import ConfigError
from cpm_jax.curation.classifier import ClassifierConfig
from cpm_jax.curation.fasttext_classifier import FastTextConfig
from cpm_jax.curation.pools import PoolError
from cpm_jax.evaluation.errors import TaskError
from experiments import rounds, verify
from experiments.rounds import RoundsConfig, run
from tests.curation.test_fasttext_classifier import SMALL
from tests.experiments.test_verify import setting, write  # noqa: F401 (the first is a fixture)


@pytest.fixture(scope="module")
def recipe(setting, pool_texts, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("recipe")
    prose, code = pool_texts["prose"], pool_texts["code"]
    rng = random.Random(0)
    shuffled = [" ".join(rng.sample(text.split(" "), len(text.split(" ")))) for text in prose[100:200]]
    raw = [text for pair in zip(prose[:100], code[:100], strict=True) for text in pair]
    positive = {
        "prose": write(folder / "prose.jsonl", prose[100:200]),
        "shuffled": write(folder / "shuffled.jsonl", shuffled),
    }
    return RoundsConfig(
        raw=write(folder / "raw.jsonl", raw),
        verification=dataclasses.replace(setting, candidates=positive, decay_steps=15, limit=8, num_seeds=1),
        negative={"code": write(folder / "code.jsonl", code[100:200])},
        classifier=ClassifierConfig(scorer=FastTextConfig(**SMALL, quantize=False)),
        part_documents=50,
        num_workers=0,
    )


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rounds")
    return workdir, run(recipe, workdir)


def ranked(monkeypatch, *ranking):
    """Lets verifications find this ranking, without training anything; returns the candidates of each."""
    asked = []

    def found(config, workdir):
        asked.append(dict(config.candidates))
        names = [*(name for name in ranking if name in config.candidates), "default"]
        names += [name for name in config.candidates if name not in names]
        facts = {"value": 1.0, "interval": [0.5, 1.5], "adjusted_p_value": 0.01, "significant": True}
        pairs = [{"first": a, "second": b, **facts} for i, a in enumerate(names) for b in names[i + 1 :]]
        unit = {"name": "bits per byte", "digits": 4, "higher_is_better": False}
        return {"ranking": names, "pairs": pairs, "verdict": f"{names[0]} is best.", "unit": unit}

    monkeypatch.setattr(verify, "run", found)
    return asked


def texts(folder):
    return [json.loads(line)["text"] for part in sorted(folder.glob("*.jsonl")) for line in part.open()]


def undated(manifest):
    return {n: value for n, value in manifest.items() if n not in ("date", "git_revision", "verification")}


def test_prose_is_found_in_the_heap(made, pool_texts):
    workdir, results = made
    first, second = results["rounds"]
    assert first["seeds"] == {"positive": ["prose"], "negative": ["code"]}
    assert list(second["candidates"]["positive"]) == ["prose", "kept_1"]
    assert list(second["candidates"]["negative"]) == ["code", "dropped_1"]
    kept = texts(workdir / "round2" / "kept")
    assert sorted(kept + texts(workdir / "round2" / "dropped")) == sorted(texts_of_raw(pool_texts))
    assert len(set(kept) & set(pool_texts["prose"])) > 0.8 * len(kept)
    against = {m["second"]: m for m in results["margins"]}
    assert against.keys() == {"raw", "kept_1", "default"}
    assert against["default"]["first"] == "kept_2"
    assert against["default"]["value"] > 0


def texts_of_raw(pool_texts):
    return [*pool_texts["prose"][:100], *pool_texts["code"][:100]]


def test_a_manifest_can_be_audited(made):
    workdir, results = made
    for number, manifest in enumerate(results["rounds"], 1):
        folder = workdir / f"round{number}"
        assert json.loads((folder / "round.json").read_text()) == manifest
        assert {path: files.sha256(folder / path) for path in manifest["files"]} == manifest["files"]
        counts, change = manifest["counts"], manifest["change"]
        assert counts["kept"] == len(texts(folder / "kept"))
        assert [m["first"] for m in manifest["margins"]] == [manifest["seeds"]["positive"][0]] * len(
            manifest["margins"]
        )
        if change:
            before, now = (set(texts(workdir / f"round{n}" / "kept")) for n in (number - 1, number))
            assert change["overlap"] == len(before & now) / len(before | now)
            assert change["only_now"] == len(now - before)
    assert results["rounds"][0]["change"] is None


def test_the_page_says_who_won_what_changed_and_shows_both_sides(made):
    page = (made[0] / "report.html").read_text()
    for said in ("prose better than", "shuffled", "95% interval", "Overlap with the round before", "<th>dropped"):
        assert said in page
    assert made[1]["verification"]["verdict"].split(":")[0] in page


def test_a_pool_is_annealed_once(made):
    cells = {path.name for path in (made[0] / "verification" / "cells").iterdir()}
    assert cells == {"default", "prose", "shuffled", "code", "kept_1", "dropped_1", "raw", "kept_2"}


def test_killed_before_any_file_is_replaced_it_ends_with_the_same_rounds(recipe, tmp_path, monkeypatch):
    ranked(monkeypatch, "prose", "kept_1")
    whole = run(recipe, tmp_path / "whole")
    replace, budget, kills = files.os.replace, 0, 0

    def until_killed(*paths):
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(files.os, "replace", until_killed)
    while kills < 60:
        budget = 4  # two of them for the summary and the page of what is scored
        try:
            again = run(recipe, tmp_path / "killed")
            break
        except KeyboardInterrupt:
            kills += 1
    assert 5 < kills < 60
    strip = str(tmp_path / "killed"), str(tmp_path / "whole")
    assert json.loads(json.dumps([undated(m) for m in again["rounds"]]).replace(*strip)) == [
        undated(m) for m in whole["rounds"]
    ]


def test_random_seeds_are_one_setting(recipe, tmp_path, monkeypatch):
    asked = ranked(monkeypatch, "kept_2")
    config = dataclasses.replace(recipe, seeds="random", max_documents=60, negative={})
    results = run(config, tmp_path)
    first, second = results["rounds"]
    assert first["seeds"] == {"positive": ["prose", "shuffled"], "negative": ["raw"]}
    assert second["seeds"] == {"positive": ["prose", "shuffled", "kept_1"], "negative": ["dropped_1"]}
    assert sum(first["classifier"]["pools"][n]["documents"] for n in ("positive", "negative")) == 120
    assert [list(candidates) for candidates in asked] == [["raw", "kept_1", "kept_2"]]
    assert "seeds by chance" in (tmp_path / "report.html").read_text()


def test_rounds_and_comparisons_may_be_added_and_nothing_else_changed(recipe, tmp_path, monkeypatch):
    asked = ranked(monkeypatch, "prose", "kept_1")
    run(dataclasses.replace(recipe, num_rounds=1), tmp_path)
    run(dataclasses.replace(recipe, compare={"other": recipe.raw + "?"}), tmp_path)
    assert len(asked) == 4  # the first round was not made again
    assert list(asked[-1]) == ["raw", "kept_1", "kept_2", "other"]
    changed = dataclasses.replace(recipe, classifier=dataclasses.replace(recipe.classifier, threshold=0.6))
    with pytest.raises(ConfigError, match=r"was made with classifier.threshold = 0.5, now classifier.threshold = 0.6"):
        run(changed, tmp_path)
    with pytest.raises(ConfigError, match="now raw = '/elsewhere'"):
        run(dataclasses.replace(recipe, raw="/elsewhere"), tmp_path)


@pytest.mark.parametrize(
    ("threshold", "said"),
    [
        (1.0, r"round 1: the positive pool kept_1 has \d+ of 200 documents, needed are at least 20"),
        (0.0, r"round 2: the negative pool dropped_1 has 0 documents.* kept 200 of 200"),
    ],
)
def test_a_pool_that_becomes_too_small_is_said(recipe, tmp_path, monkeypatch, threshold, said):
    ranked(monkeypatch, "prose")
    classifier = dataclasses.replace(recipe.classifier, threshold=threshold)
    with pytest.raises(PoolError, match=said):
        run(dataclasses.replace(recipe, classifier=classifier), tmp_path)


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        (["one", "two", "three"], r"has 3 usable documents, needed are at least 20; set aside: none"),
        (["the same text"] * 100, r"has 1 usable documents, .* set aside: \{'duplicate': 99\}"),
        ([" "] * 30, r"has 0 usable documents, .* set aside: \{'empty text': 30\}"),
    ],
)
@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_a_pool_that_is_too_small_is_said_before_anything_is_annealed(
    recipe, tmp_path, monkeypatch, kind, documents, said
):
    """Also where it would not be chosen: the ranking has others as the best and the worst."""
    asked = ranked(monkeypatch, "prose", "few")
    few = {"few": write(tmp_path / "few.jsonl", documents)}
    verification = recipe.verification
    if kind == "positive":
        verification = dataclasses.replace(verification, candidates={**verification.candidates, **few})
    config = dataclasses.replace(
        recipe, verification=verification, negative=recipe.negative | (few if kind == "negative" else {})
    )
    workdir = tmp_path / "rounds"
    with pytest.raises(PoolError, match=rf"^round 1: the pool few \(.*few\.jsonl\) {said}"):
        run(config, workdir)
    assert not asked
    assert not workdir.exists()  # another recipe may still take it


def test_a_pool_that_becomes_one_text_is_said_before_the_next_annealing(recipe, tmp_path, monkeypatch):
    asked = ranked(monkeypatch, "prose", "kept_1")
    split = rounds.split_scored

    def split_into_copies(scored, folder, text_field):
        split(scored, folder, text_field)
        for part in (folder / "kept").glob("*.jsonl"):
            first, *others = part.read_text().splitlines(keepends=True)
            part.write_text(first * (1 + len(others)))

    monkeypatch.setattr(rounds, "split_scored", split_into_copies)
    with pytest.raises(PoolError, match=r"^round 2: the pool kept_1 \(.*round1/kept\) has \d usable documents"):
        run(recipe, tmp_path)
    assert len(asked) == 1


def test_a_wrong_task_is_said_first_with_random_seeds_too(recipe, tmp_path):
    verification = dataclasses.replace(recipe.verification, tasks="hellaswog")
    with pytest.raises(TaskError, match="no task 'hellaswog'"):
        run(dataclasses.replace(recipe, seeds="random", verification=verification), tmp_path)
    assert not (tmp_path / "round1").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"negative": {"prose": "/x"}}, "RoundsConfig.candidates has 'prose': it is named twice"),
        ({"negative": {"kept_1": "/x"}}, "RoundsConfig.candidates has 'kept_1': raw, kept_<round>"),
        ({"negative": {"a": "/x", "b": "/x"}}, "RoundsConfig.candidates has 'a': /x has another name too"),
        ({"negative": {"a": "RAW"}}, "RoundsConfig.negative has 'a': that is the raw documents"),
        ({"negative": {"a": "DATASET"}}, "is a dataset folder; a classifier needs documents"),
        ({"negative": {"a/b": "/x"}}, "VerifyConfig.candidates has the name 'a/b'"),
    ],
)
def test_what_cannot_be_a_pool_is_said(recipe, changes, said):
    places = {"RAW": recipe.raw, "DATASET": recipe.verification.default}
    negative = {name: places.get(source, source) for name, source in changes["negative"].items()}
    with pytest.raises(ConfigError, match=re.escape(said)):
        dataclasses.replace(recipe, negative=negative)


def test_a_keep_rate_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"keep_rate = 0.2: it is a share of a round's negative pool"):
        dataclasses.replace(recipe, classifier=dataclasses.replace(recipe.classifier, keep_rate=0.2))


@pytest.mark.slow
def test_a_killed_process_goes_on_and_ends_with_the_same(recipe, tmp_path):
    config = recipe.verification
    flags = {
        "CHECKPOINT": config.checkpoint,
        "DATA": config.default,
        "TASKS": config.tasks,
        "DECAY_STEPS": config.decay_steps,
        "SHARE": config.share,
        "LIMIT": config.limit,
        "NUM_SEEDS": 1,
        "RAW": recipe.raw,
        "POSITIVE": config.candidates,
        "NEGATIVE": recipe.negative,
        "NUM_WORKERS": 0,
        "QUANTIZE": False,
        "RoundsConfig.part_documents": 50,
    }
    flags |= {f"FastTextConfig.{name}": value for name, value in SMALL.items()}
    command = [sys.executable, "-m", "experiments.run", "rounds"]
    command += [f"--gin.{name}={value}" for name, value in flags.items()]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, f"--workdir={whole}"], check=True, capture_output=True)
    command.append(f"--workdir={killed}")
    for marker in ("verification/cells/prose", "round1/train", "round1/kept", "round2/score", "verification/cells/raw"):
        job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while job.poll() is None and not (killed / marker).exists():
            time.sleep(0.02)
        assert job.poll() is None, job.stderr.read().decode()
        job.send_signal(signal.SIGKILL)
        job.wait()
        job.stderr.close()
    subprocess.run(command, check=True, capture_output=True)
    results = json.loads((whole / "results.json").read_text())
    again = json.loads((killed / "results.json").read_text().replace(str(killed), str(whole)))
    assert again["margins"] == results["margins"]
    for now, then in zip(again["rounds"], results["rounds"], strict=True):
        assert now["verification"]["pairs"] == then["verification"]["pairs"]
        assert now.keys() == then.keys()
        changed = {name: (now[name], then[name]) for name in undated(then) if now[name] != then[name]}
        assert not changed
