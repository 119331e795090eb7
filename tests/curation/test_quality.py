"""A classifier as a filter: the scores of `classify`, whoever runs it."""

import json
import shutil

import pyarrow.parquet
import pytest

from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.curation.classifier import ClassifierConfig, load_classifier
from cpm_jax.curation.document import Document
from cpm_jax.curation.fasttext_classifier import FastTextConfig
from cpm_jax.curation.filters import ExceptSourceFiles
from cpm_jax.curation.pipeline import PipelineConfig, curate
from cpm_jax.curation.quality import ClassifierScore
from cpm_jax.curation.writers import load_dump
from cpm_jax.data.errors import DataError
from experiments.classify import ClassifyConfig, run
from experiments.run import main
from tests.curation.test_fasttext_classifier import SMALL
from tests.curation.test_spark import settings  # noqa: F401  # those of Spark

ODD = ["只有中文的一段文字。", "__label__neg __label__pos", "Crème\r\n\r\n\r\n\r\nbrûlée\t\u0301 \u2028 end", "x"]


@pytest.fixture(scope="module")
def trained(pool_files, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("quality")
    scorer = FastTextConfig(**SMALL)
    pools = {"positive": pool_files["prose"], "negative": pool_files["code"]}
    run(ClassifyConfig(**pools, classifier=ClassifierConfig(scorer=scorer)), workdir)
    return workdir / "classifier"


@pytest.fixture(scope="module")
def corpus(pool_texts, tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    texts = [*pool_texts["prose"][:60], *ODD, *pool_texts["code"][:60]]
    for shard in range(3):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[shard::3])
        (root / f"{shard}.jsonl").write_text("".join(lines))
    return root


def curated(folder):
    """Score and reason of a drop of each document, by its id."""
    found = {}
    for path in sorted((folder / "data").iterdir()):
        found |= {row["id"]: (row["classifier"], "") for row in pyarrow.parquet.read_table(path).to_pylist()}
    for path in sorted((folder / "dropped").iterdir()):
        found |= {d.id: (d.scores["classifier"], d.dropped) for d in load_dump(path)}
    return found


def test_scores_are_the_same_alone_in_classify_in_a_pool_and_on_spark(trained, corpus, tmp_path):
    scorer, threshold = load_classifier(trained)
    expected = {}
    for path in sorted(corpus.iterdir()):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            score = float(scorer([json.loads(line)["text"]])[0])
            expected[f"{path.name}:{number}"] = (score, "classifier" if score < threshold else "")
    assert len({score for score, _ in expected.values()}) > 100
    assert 20 < sum(not dropped for _, dropped in expected.values()) < 110
    for num_workers in (0, 2):
        workdir = tmp_path / f"classify {num_workers}"
        run(ClassifyConfig(mode="score", trained=str(trained), input=str(corpus), num_workers=num_workers), workdir)
        rows = [json.loads(line) for part in sorted(workdir.glob("scored/part-*")) for line in part.open()]
        assert {row["id"]: (row["scores"]["classifier"], row["dropped"]) for row in rows} == expected
    filters = (ClassifierScore(folder=str(trained)),)
    for name, runner in (
        ("this process", {"num_workers": 0}),
        ("pool", {"num_workers": 2}),
        ("spark", {"spark_master": "local[2]"}),
    ):
        curate(PipelineConfig(str(corpus), filters, None, **runner), tmp_path / name, progress=False)
        assert curated(tmp_path / name) == expected, name


def test_the_verb_takes_it_among_the_filters(trained, corpus, tmp_path, capsys):
    flags = [f"--workdir={tmp_path / 'out'}", f"--gin.DATA={corpus}", f"--gin.CLASSIFIER={trained}"]
    flags += ["--gin.FILTERS=(@quality.ClassifierScore(),)", "--gin.EVALUATION_SETS=()", "--gin.NUM_WORKERS=0"]
    assert main(["curate", *flags]) == 0
    assert "dropped, classifier: " in capsys.readouterr().out


def test_threshold_name_and_languages(trained, pool_texts):
    code = Document(pool_texts["code"][0], "1", language="en")
    dropped = ClassifierScore(folder=str(trained))(code)
    assert (dropped.dropped, set(dropped.scores)) == ("classifier", {"classifier"})
    score = dropped.scores["classifier"]
    assert not ClassifierScore(folder=str(trained), threshold=score)(code).dropped  # at least this score
    kept = ClassifierScore(folder=str(trained), name="maths", drop=False)(code)
    assert (kept.dropped, kept.scores) == ("", {"maths": score})
    assert ClassifierScore(folder=str(trained), languages=("zh",))(code) is code


def test_a_run_is_of_one_classifier_wherever_it_lies(trained, corpus, tmp_path):
    def start(folder, wrap=lambda filters: filters):
        filters = wrap((ClassifierScore(folder=str(folder)),))
        return curate(PipelineConfig(str(corpus), filters, None, num_workers=0), tmp_path / "out", progress=False)

    manifest = start(trained)
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    assert start(moved) == manifest
    about = json.loads((moved / "classifier.json").read_text())
    (moved / "classifier.json").write_text(json.dumps(about | {"threshold": 0.9}))
    with pytest.raises(DataError, match=r"was made with filters = .*classifier_sha256"):
        start(moved)
    with pytest.raises(DataError, match="was made with filters"):
        start(trained, lambda filters: (ExceptSourceFiles(filters),))
    # Another classifier in the same folder is loaded, in this process too.
    code = Document(json.loads((corpus / "2.jsonl").read_text().splitlines()[-1])["text"], "1")
    keep_all = ClassifierScore(folder=str(moved))
    assert keep_all(code).dropped
    (moved / "classifier.json").write_text(json.dumps(about | {"threshold": 0.0}))
    assert not keep_all(code).dropped


def test_the_identity_is_seen_within_other_filters(trained):
    def identity(**changes):
        return ExceptSourceFiles((ClassifierScore(folder=str(trained), **changes),)).identity()["filters"][0]

    assert identity()["filter"] == "ClassifierScore"
    assert len(identity()["classifier_sha256"]) == 64
    assert identity(threshold=0.1) != identity()


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"ClassifierScore.folder = '': must not be empty"):
        ClassifierScore()
    with pytest.raises(ConfigError, match=r"ClassifierScore.threshold = 2"):
        ClassifierScore(folder="a", threshold=2)
    with pytest.raises(InputError, match="holds no classifier"):
        ClassifierScore(folder=str(tmp_path))(Document("text", "1"))
    (tmp_path / "classifier.json").write_text('{"kind": "judge"}')
    with pytest.raises(InputError, match="kind 'judge' asks a server"):
        ClassifierScore(folder=str(tmp_path)).identity()
