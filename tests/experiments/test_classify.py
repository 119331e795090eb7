import dataclasses
import io
import json
import re

import pytest

from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.curation.classifier import ClassifierConfig
from cpm_jax.curation.fasttext_classifier import FastTextConfig
from experiments import classify
from experiments.classify import ClassifyConfig, run
from tests.curation.test_classifier import cut_off
from tests.curation.test_fasttext_classifier import SMALL


@pytest.fixture(scope="module")
def trained(pool_files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("classify")
    run(
        ClassifyConfig(
            positive=pool_files["prose"],
            negative=pool_files["code"],
            classifier=ClassifierConfig(scorer=FastTextConfig(**SMALL)),
        ),
        workdir,
    )
    return workdir


@pytest.fixture
def scoring(trained, pool_files):
    return ClassifyConfig(
        mode="score",
        trained=str(trained / "classifier"),
        input=(pool_files["prose"], pool_files["code"]),
        part_documents=100,
        num_workers=0,
    )


def rows(workdir):
    return [json.loads(line) for part in sorted(workdir.glob("scored/*.jsonl")) for line in part.open()]


def test_training_leaves_a_classifier_and_a_page(trained):
    assert {path.name for path in (trained / "classifier").iterdir()} == {"classifier.json", "model.ftz", "tokenizer"}
    page = (trained / "report.html").read_text()
    for said in ("Average precision", "The words that decide", "Its worst mistakes", "Quantisation"):
        assert said in page


def test_a_second_training_has_nothing_to_do(trained, pool_files, capsys):
    before = (trained / "classifier" / "model.ftz").stat().st_mtime_ns
    (trained / "report.html").unlink()  # as a kill between the classifier and its page does
    run(ClassifyConfig(positive=pool_files["prose"], negative=pool_files["code"]), trained)
    assert (trained / "report.html").exists()
    assert "nothing to do" in capsys.readouterr().out
    assert (trained / "classifier" / "model.ftz").stat().st_mtime_ns == before


def test_scoring_keeps_every_document_with_its_score(scoring, tmp_path, pool_texts):
    run(scoring, tmp_path)
    found = rows(tmp_path)
    assert [row["text"] for row in found] == [*pool_texts["prose"], *pool_texts["code"]]
    assert all((row["scores"]["classifier"] < 0.5) == (row["dropped"] == "classifier") for row in found)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["documents"] == len(found) == sum(summary["histogram"])
    assert summary["kept"] == sum(not row["dropped"] for row in found)
    assert "Scored documents" in (tmp_path / "report.html").read_text()


def test_scores_are_the_same_in_a_pool_in_other_batches_and_after_a_kill(scoring, tmp_path, monkeypatch):
    run(scoring, tmp_path / "alone")
    run(dataclasses.replace(scoring, num_workers=2), tmp_path / "pool")
    monkeypatch.setattr(classify, "_BATCH", 7)
    run(scoring, tmp_path / "batches")
    # A kill leaves whole parts only; the next start reads past them.
    run(scoring, tmp_path / "killed")
    for part in sorted((tmp_path / "killed" / "scored").glob("part-*"))[2:]:
        part.unlink()
    (tmp_path / "killed" / "summary.json").unlink()
    run(scoring, tmp_path / "killed")
    for name in ("pool", "batches", "killed"):
        assert rows(tmp_path / name) == rows(tmp_path / "alone")


def test_other_settings_in_the_same_workdir_are_refused(scoring, tmp_path):
    run(scoring, tmp_path)
    with pytest.raises(ConfigError, match="part_documents: 100 at the last start, now 50"):
        run(dataclasses.replace(scoring, part_documents=50), tmp_path)


def test_a_file_that_breaks_off_is_named_in_the_summary_and_on_the_page(scoring, tmp_path, pool_files, pool_texts):
    cut = cut_off(tmp_path, pool_texts["prose"])
    run(dataclasses.replace(scoring, input=(cut, pool_files["code"])), tmp_path / "run")
    assert [row["text"] for row in rows(tmp_path / "run")] == pool_texts["code"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (damaged,) = summary["quarantined"]
    assert (damaged["source"], damaged["reason"]) == (cut, "truncated")
    assert summary["set_aside"] == {}
    assert damaged["id"] in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(InputError, match=r"can be used; set aside: none; damaged: cut\.jsonl\.gz:\d+ \(truncated\)"):
        run(dataclasses.replace(scoring, input=cut), tmp_path / "nothing")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"positive": "a"}, "ClassifyConfig.negative = (): mode 'train' needs positive and negative"),
        ({"mode": "score", "input": "a"}, "ClassifyConfig.trained = '': mode 'score' needs trained and input"),
    ],
)
def test_what_a_mode_needs_is_said(settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        ClassifyConfig(**settings)


def test_a_folder_without_a_classifier_is_said(tmp_path, pool_files):
    with pytest.raises(InputError, match="holds no classifier"):
        run(ClassifyConfig(mode="score", trained=str(tmp_path), input=pool_files["code"]), tmp_path / "out")


def test_sources_without_a_usable_document_are_said(scoring, tmp_path):
    source = tmp_path / "wrong.jsonl"
    source.write_text('{"content": "no such field"}\n{"text": ""}\n')
    with pytest.raises(InputError, match=r"no document of .*wrong.jsonl can be used; set aside: .*missing field"):
        run(dataclasses.replace(scoring, input=str(source)), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


def test_scoring_shows_documents_per_second_and_the_time_left(scoring, tmp_path, monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr("sys.stderr", err)
    monkeypatch.setattr("cpm_jax.common.progress.LINE_INTERVAL", 0.0)
    monkeypatch.setattr(classify, "_BATCH", 50)
    run(scoring, tmp_path)
    lines = err.getvalue().splitlines()
    assert len(lines) > len(rows(tmp_path)) // 50
    found = [re.fullmatch(r"classify: (\S+)/(\S+), ETA \d+:\d\d, documents/s \S+", line) for line in lines]
    assert all(found)
    assert all(match[2] == found[-1][1] for match in found)  # at last all bytes are done
    assert len({match[1] for match in found}) > 5  # also within a file
