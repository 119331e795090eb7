"""What models are evaluated on is found, whatever its case and punctuation, and nothing else is."""

import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.curation.decontamination import SCORE, Decontaminate, build_index, hits_of
from cpm_jax.curation.document import Document
from cpm_jax.data.errors import DataError

QUESTION = "A keeper lights 12 lamps each night; how many lamps does he light in the 30 nights of June?"
CHINESE = "灯塔的看守人每天晚上都要点亮十二盏灯，请问六月份一共点亮多少盏？"
SETS = {"arithmetic": [QUESTION, "too short"], "chinese": [CHINESE], "empty": []}


@pytest.fixture
def judge(tmp_path):
    assert build_index(tmp_path / "index.npz", SETS, 13) == {"arithmetic": 1, "chinese": 1, "empty": 0}
    return Decontaminate(str(tmp_path / "index.npz"))


@pytest.mark.parametrize(
    ("text", "why", "ngrams"),
    [
        (f"Once I read this: {QUESTION} And I knew.", "contaminated: arithmetic", 7),
        (QUESTION.upper().replace(";", " -").replace(" ", "\n"), "contaminated: arithmetic", 7),
        (" ".join(QUESTION.split()[:13]), "contaminated: arithmetic", 1),
        (" ".join(QUESTION.split()[:12]) + " another end", "", 0),
        (f"题目：{CHINESE}", "contaminated: chinese", 18),
        ("too short", "", 0),
        ("", "", 0),
    ],
)
def test_thirteen_words_in_a_row_are_a_hit(judge, text, why, ngrams):
    judged = judge(Document(text, "1"))
    assert judged.dropped == why
    assert judged.scores.get(SCORE, 0) == ngrams


def test_sixteen_words_are_less_strict(tmp_path):
    build_index(tmp_path / "index.npz", SETS, 16)
    judge = Decontaminate(str(tmp_path / "index.npz"))
    words = QUESTION.split()
    assert judge(Document(" ".join(words[:15]), "1")).dropped == ""
    assert judge(Document(" ".join(words[:16]), "1")).dropped == "contaminated: arithmetic"


def test_the_set_with_most_hits_is_named(tmp_path):
    words = [f"w{n}" for n in range(60)]
    sets = {"a": [" ".join(words[:20])], "b": [" ".join(words[10:60])]}
    build_index(tmp_path / "index.npz", sets, 13)
    judged = Decontaminate(str(tmp_path / "index.npz"))(Document(" ".join(words), "1"))
    assert judged.dropped == "contaminated: b"
    assert hits_of({"contaminated: b": 2, "too short": 3}) == {"b": 2}


def test_a_file_that_is_no_index_is_named(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    for name in ("x.npy", "missing.npz"):
        with pytest.raises(DataError, match=name):
            Decontaminate(str(tmp_path / name))(Document("text", "1"))
    with pytest.raises(ConfigError, match="n = 0"):
        build_index(tmp_path / "y.npz", SETS, 0)
