import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from cpm_jax.checkpoints.manager import CheckpointConfig, CheckpointError, list_steps, read_meta, restore_params
from cpm_jax.common.config import ConfigError, config_from_dict
from cpm_jax.common.metrics import read_metrics
from cpm_jax.data.mixture import Component, MixtureConfig, Stage, from_folders
from cpm_jax.data.prepare import PrepareConfig, prepare
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.loop import TrainConfig
from cpm_jax.training.schedules import Phase, ScheduleConfig
from experiments.pretrain import PretrainConfig, run

SEQ_LEN, VOCAB = 32, 300


def make_dataset(folder: Path, room: str, validation_fraction: float = 0.2) -> Path:
    source = Path(__file__).parents[2] / "cpm_jax" / room
    config = PrepareConfig(
        sources=str(source),
        extensions=(".py",),
        seq_len=SEQ_LEN,
        vocab_size=VOCAB,
        validation_fraction=validation_fraction,
        num_workers=0,
    )
    prepare(config, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data") / "code", "common")


def config(dataset, **changes):
    model = ModelConfig(
        vocab_size=VOCAB,
        num_layers=1,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        d_ff=64,
        max_position_embeddings=SEQ_LEN,
        dtype="float32",
        scan_layers=False,
    )
    base = PretrainConfig(
        model=model,
        mixture=from_folders(str(dataset)),
        schedule=ScheduleConfig((Phase(2, 1e-2, "linear"), Phase(100, 1e-2))),
        train=TrainConfig(steps=6, batch_size=4, log_every=1, eval_every=3, eval_batches=1),
        checkpoint=CheckpointConfig(every=3),
    )
    nested = {
        name: dataclasses.replace(getattr(base, name), **changes.pop(name))
        for name in ("model", "train")
        if name in changes
    }
    return dataclasses.replace(base, **nested, **changes)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    run(config(dataset), workdir)
    return workdir


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir / "metrics.jsonl") if "loss" in row]


def test_leaves_what_the_next_verbs_need(dataset, trained):
    assert list_steps(trained / "checkpoints") == [3, 6]
    assert (trained / "tokenizer" / "tokenizer.json").read_bytes() == (
        dataset / "tokenizer" / "tokenizer.json"
    ).read_bytes()
    meta = read_meta(trained / "checkpoints" / "6")
    assert config_from_dict(ModelConfig, meta["model"]) == config(dataset).model
    page = (trained / "report.html").read_text()
    assert "Held-out loss" in page
    assert "d_model" in page


def test_says_that_it_is_done(dataset, trained, capsys):
    before = losses(trained)
    run(config(dataset), trained)
    assert "nothing to do: this run is done" in capsys.readouterr().out
    assert losses(trained) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"vocab_size": 299}}, r"ModelConfig.vocab_size = 299: the tokenizer of .* has 300 ids"),
        ({"model": {"max_position_embeddings": 16}}, r"max_position_embeddings = 16: the rows of .* have 32 tokens"),
        ({"train": {"batch_size": 3, "num_microbatches": 2}}, r"batch_size = 3: must be a multiple"),
    ],
)
def test_what_does_not_fit_is_named(dataset, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        run(config(dataset, **change), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_evaluation_needs_held_out_data(tmp_path):
    bare = make_dataset(tmp_path / "bare", "training", validation_fraction=0)
    with pytest.raises(ConfigError, match=r"eval_every = 3: .*bare has no validation split; set it to 0"):
        run(config(bare), tmp_path / "run")
    run(config(bare, train={"eval_every": 0, "steps": 1}), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 1


def test_other_settings_are_refused_and_named(dataset, trained):
    for change, message in [
        ({"train": {"seed": 1, "steps": 9}}, r"train.seed: 0 at the last start, now 1"),
        ({"train": {"batch_size": 8}}, r"train.batch_size: 4 at the last start, now 8"),
        ({"init_from": "elsewhere"}, r"init_from: '' at the last start, now 'elsewhere'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run(config(dataset, **change), trained)


def test_a_moved_dataset_is_the_same_and_another_is_not(dataset, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(dataset, tmp_path / "elsewhere" / "code")
    run(config(tmp_path / "elsewhere" / "code", train={"steps": 7}), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 7
    other = make_dataset(tmp_path / "other" / "code", "modeling")
    with pytest.raises(ConfigError, match=r"data.components.code: '[0-9a-f]{64}' at the last start"):
        run(config(other, train={"steps": 8}), tmp_path / "run")


def test_stages_of_a_mixture_may_not_change(dataset, tmp_path):
    def mixture(*stages):
        components = (Component("a", str(dataset)), Component("b", str(dataset)))
        return MixtureConfig(components, tuple(Stage(*stage) for stage in stages))

    run(config(dataset, mixture=mixture((0, (1.0, 1.0)), (2, (1.0, 3.0)))), tmp_path)
    with pytest.raises(ConfigError, match=r"data.stages: .*3.0.* at the last start"):
        run(config(dataset, mixture=mixture((0, (1.0, 1.0)), (2, (1.0, 2.0))), train={"steps": 9}), tmp_path)
    assert {"loss/a", "loss/b"} <= read_metrics(tmp_path / "metrics.jsonl")[0].keys()


def test_init_from_params_starts_at_step_0(dataset, trained, tmp_path):
    run(config(dataset, init_from=str(trained), train={"steps": 1, "eval_every": 0}), tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["step"] == 1
    assert rows[0]["lr"] == 0.0  # the warm-up begins anew
    assert rows[0]["loss"] < 0.9 * losses(trained)[0]
    for a, b in zip(*(jax.tree.leaves(restore_params(place)[0]) for place in (trained, tmp_path)), strict=True):
        np.testing.assert_array_equal(a, b)  # with a learning rate of 0, and only then


def test_init_from_state_goes_on_as_the_run_itself_would(dataset, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "itself")
    run(config(dataset, train={"steps": 9}), tmp_path / "itself")
    run(config(dataset, train={"steps": 9}, init_from=str(trained), init="state"), tmp_path / "stage")
    assert losses(tmp_path / "stage") == losses(tmp_path / "itself")[6:]
    last = [read_metrics(tmp_path / name / "metrics.jsonl")[-2] for name in ("stage", "itself")]
    assert last[0]["tokens_seen"] == last[1]["tokens_seen"]


def test_init_from_another_model_is_named(dataset, trained, tmp_path):
    with pytest.raises(CheckpointError, match=r"of another model: at params/.*d_ff|of another model: at params/layers"):
        run(config(dataset, init_from=str(trained), model={"d_ff": 32}), tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run(config(dataset, init_from=str(dataset)), tmp_path)
