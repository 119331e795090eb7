import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from cpm_jax.checkpoints.manager import CheckpointConfig
from cpm_jax.common.config import ConfigError, InputError
from cpm_jax.common.metrics import read_metrics
from cpm_jax.curation.dedup import DedupConfig
from cpm_jax.curation.gopher import GopherQuality
from cpm_jax.curation.pipeline import PipelineConfig
from cpm_jax.data.manifest import Manifest, Shard, Split
from cpm_jax.data.prepare import PrepareConfig
from cpm_jax.training.loop import TrainConfig
from cpm_jax.training.schedules import wsd
from experiments import quickstart
from experiments.curate import CurateConfig
from experiments.quickstart import QuickstartConfig, Stages, pretrain_config, run, stage_names
from export.checks import verify_export
from export.manifest import read_manifest


@pytest.fixture
def text(tmp_path):
    """Twenty short texts, half of them Chinese, and a file that is no text."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(10):
        words = " ".join(f"word{(number * i) % 7}" for i in range(60))
        (folder / f"en{number}.txt").write_text(f"Text {number}: {words}\n")
        (folder / f"zh{number}.txt").write_text(f"第{number}篇。" + "学而时习之,不亦说乎?" * (number + 3) + "\n")
    (folder / "broken.bin").write_bytes(b"\x00\x01\x02" * 50)
    return folder


@pytest.fixture
def curation(text) -> CurateConfig:
    """Drops the Chinese texts, and what is a duplicate."""
    filters = (GopherQuality(stop_words=("word0", "word1", "word2")),)
    return CurateConfig(PipelineConfig(str(text), filters, DedupConfig(bands=0), num_workers=0))


@pytest.fixture
def config(text, tiny_config) -> QuickstartConfig:
    return QuickstartConfig(
        prepare=PrepareConfig(
            sources=str(text), seq_len=32, vocab_size=400, validation_fraction=0.3, num_workers=0, max_bytes=10**6
        ),
        model=dataclasses.replace(tiny_config, vocab_size=400, scan_layers=False),
        schedule=wsd(peak_lr=0.01, train_steps=40, warmup_steps=4, decay_steps=10),
        train=TrainConfig(steps=40, batch_size=4, log_every=1, eval_every=20, eval_batches=2),
        checkpoint=CheckpointConfig(every=20),
        num_samples=2,
        prompt_tokens=8,
        sample_tokens=8,
    )


def _manifest(records: int) -> Manifest:
    shard = Shard("x", "", 0, records=records, tokens=32 * records, documents=1, text_bytes=1)
    return Manifest(32, "text", "", 400, {"train": Split((shard,))}, {}, 0, 0, {"x": 1}, {})


def test_little_text_shortens_the_training_and_its_schedule(config, tmp_path):
    plenty = pretrain_config(config, _manifest(10_000), tmp_path)
    assert plenty.train.steps == 40
    assert plenty.schedule == config.schedule
    little = pretrain_config(config, _manifest(8), tmp_path)
    assert little.train.steps == 8 * config.max_epochs // 4
    assert [phase.steps for phase in little.schedule.phases] == [2, 13, 5]
    tiny = pretrain_config(dataclasses.replace(config, max_epochs=1), _manifest(1), tmp_path)
    assert tiny.train.steps == tiny.train.eval_every == tiny.checkpoint.every == 1


def test_a_stage_is_done_once_and_again_under_another_config(tmp_path):
    calls = []

    def stage():
        calls.append(1)
        return {"answer": 42}

    assert Stages(tmp_path, "a").do("prepare", stage) == {"answer": 42}
    assert Stages(tmp_path, "a").do("prepare", stage) == {"answer": 42}
    assert len(calls) == 1
    assert not Stages(tmp_path, "a").complete
    Stages(tmp_path, "b").do("prepare", stage)
    assert len(calls) == 2


def test_a_stage_that_fails_is_not_done_and_its_time_counts(tmp_path):
    stages = Stages(tmp_path, "a")
    with pytest.raises(ZeroDivisionError):
        stages.do("pretrain", lambda: {"x": 1 // 0})
    before = stages.seconds["pretrain"]
    again = Stages(tmp_path, "a")
    assert again.do("pretrain", lambda: {"x": 1}) == {"x": 1}
    assert again.seconds["pretrain"] >= before > 0


def test_curation_needs_its_settings_and_verification_needs_curation(config):
    with pytest.raises(ConfigError, match="curation = None: with curate = True a CurateConfig"):
        dataclasses.replace(config, curate=True)
    with pytest.raises(ConfigError, match=r"verify = True: .* needs curate = True"):
        dataclasses.replace(config, verify=True)


def test_the_stages_are_those_that_are_asked_for(config, curation):
    assert stage_names(config) == quickstart.STAGES
    curated = dataclasses.replace(config, curate=True, curation=curation)
    assert stage_names(curated) == ("curate", *quickstart.STAGES)
    verified = dataclasses.replace(curated, verify=True)
    assert stage_names(verified) == ("curate", *quickstart.STAGES[:-1], "verify", "report")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"format": "chat"}, "PrepareConfig.format"),
        ({"validation_fraction": 0.0}, "PrepareConfig.validation_fraction"),
        ({"vocab_size": 401}, "ModelConfig.vocab_size"),
        ({"seq_len": 300}, "ModelConfig.max_position_embeddings"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(config, changes, field):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(config, prepare=dataclasses.replace(config.prepare, **changes))
    assert caught.value.field == field
    assert field in str(caught.value)


def test_an_empty_folder_is_refused_by_name(config, tmp_path):
    (tmp_path / "empty").mkdir()
    nothing = dataclasses.replace(config.prepare, sources=str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"no document found in .*empty"):
        run(dataclasses.replace(config, prepare=nothing), tmp_path / "run")


@pytest.mark.slow
def test_from_text_to_report_interrupted_and_resumed(config, tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "run"

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "draw_samples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config, workdir)
    first = capsys.readouterr().out
    assert "[2/7] pre-train" in first
    assert "zstd" not in (workdir / "report.html").read_text("utf-8")  # only that of the training so far
    trained = read_metrics(workdir / "metrics.jsonl")

    run(config, workdir)
    second = capsys.readouterr().out
    assert "[3/7] evaluate: bits per byte beside zstd and an n-gram model: done before" in second
    assert "done in" in second
    assert read_metrics(workdir / "metrics.jsonl") == trained
    assert [row["step"] for row in trained if "loss" in row] == list(range(1, 41))

    found = json.loads((workdir / "stages.json").read_text())["stages"]
    assert list(found) == list(quickstart.STAGES)
    assert found["check"]["result"].get("max_error", 0.0) <= 1e-4
    assert found["evaluate"]["result"]["model"]["value"] < 8
    assert [check.name for check in read_manifest(workdir / "hf").checks[:2]] == ["read_back", "source"]
    assert "as they were written" in verify_export(workdir / "hf")[0]
    page = (workdir / "report.html").read_text("utf-8")
    for words in (
        "zstd -19",
        "5-gram",
        "学而时习之",
        "1 binary content",
        "held-out bits per byte",
        "GraniteForCausalLM",
    ):
        assert words in page

    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    run(config, workdir)
    assert f"this quickstart is done; its report is {workdir / 'report.html'}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


@pytest.mark.slow
def test_curated_text_is_trained_on_and_compared_with_the_raw_one(config, curation, text, tmp_path, capsys):
    for number in range(40):
        words = " ".join(f"word{(number + i) % 7}" for i in range(60))
        (text / f"more{number}.txt").write_text(f"Text {number} of more: {words}\n")
    workdir = tmp_path / "run"
    config = dataclasses.replace(
        config, curate=True, verify=True, curation=curation, verify_steps=3, verify_seeds=1, num_samples=1
    )
    run(config, workdir)
    said = capsys.readouterr().out
    assert "[1/9] curate" in said
    assert "[8/9] verify" in said
    found = json.loads((workdir / "stages.json").read_text())["stages"]
    assert list(found) == list(stage_names(config))
    curated = found["curate"]["result"]
    assert curated["documents"] == 48
    assert sum(curated["drops"].values()) == 12  # the Chinese ones, and two of a single word
    assert curated["train"] + curated["held_out"] == 48
    assert curated["candidates"]["raw"] > curated["candidates"]["curated"] > 0
    trained_on = Manifest.load(workdir / "data")
    assert sum(split.documents for split in trained_on.splits.values()) == curated["train"]
    verified = found["verify"]["result"]
    assert set(verified["scores"]) == {"curated", "raw", "default"}
    assert verified["items"] == {"held_out": curated["held_out"]}
    page = (workdir / "report.html").read_text("utf-8")
    for words in ("Is the curated text better than the raw one?", "48 of 60 documents are kept", "gopher:"):
        assert words in page
    assert verified["verdict"].split(" (")[0] in page


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["quickstart", "DATA=my texts"], '"--gin.DATA=my texts"'),
        (["quickstart", "DATA=('a', 'b c')"], "\"--gin.DATA=('a', 'b c')\""),
        (["bench", "NAME=dedup", "ARGS=--limit 5 texts"], "-m benchmarks.dedup --limit 5 texts\n"),
    ],
)
def test_make_hands_on_what_it_is_given(arguments, expected):
    root = Path(quickstart.__file__).parents[1]
    done = subprocess.run(["make", "-n", *arguments], cwd=root, capture_output=True, text=True, check=True)
    assert expected in done.stdout
