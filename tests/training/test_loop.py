import dataclasses
import json
import os
import signal
import threading

import jax
import numpy as np
import pytest

from cpm_jax.checkpoints.manager import (
    CheckpointConfig,
    CheckpointError,
    list_steps,
    read_meta,
    restore_params,
    restore_state,
)
from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError, config_to_dict
from cpm_jax.common.metrics import read_metrics
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.training import loop
from cpm_jax.training.loop import NonFiniteError, TrainConfig, TrainData, train
from cpm_jax.training.losses import LossConfig
from cpm_jax.training.optimizer import OptimizerConfig
from cpm_jax.training.schedules import Phase, ScheduleConfig

SEQ_LEN, BATCH_SIZE = 16, 4
TIMES = ("seconds_per_step", "tokens_per_second")


def batch_of(step, poison=()):
    """Two sources of random walks over the vocabulary: quickly learnt."""
    rng = np.random.default_rng([7, step])
    starts = rng.integers(0, 128, (BATCH_SIZE, 1))
    tokens = (starts + np.arange(SEQ_LEN + 1) * 3) % 128
    weights = np.full((BATCH_SIZE, SEQ_LEN), np.nan if step in poison else 1.0, np.float32)
    return {
        "tokens": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "loss_weights": weights,
        "segment_ids": np.ones((BATCH_SIZE, SEQ_LEN), np.int32),
        "positions": np.tile(np.arange(SEQ_LEN, dtype=np.int32), (BATCH_SIZE, 1)),
        "source_ids": np.arange(BATCH_SIZE, dtype=np.int32) % 2,
    }


def data(poison=(), length=10**6, on_batch=lambda step: None):
    def batches(start):
        for step in range(start, length):
            on_batch(step)
            yield batch_of(step, poison)

    return TrainData(batches, lambda: (batch_of(10**6 + i) for i in range(3)), ("web", "code"), SEQ_LEN)


def run(workdir, model, *, steps=12, every=4, read=None, **changes):
    config = {"steps": steps, "batch_size": BATCH_SIZE, "log_every": 2, "eval_every": 6, "watchdog_seconds": 60.0}
    arguments = {
        "model": model,
        "optimizer": OptimizerConfig(),
        "schedule": ScheduleConfig((Phase(2, 1e-2, "linear"), Phase(100, 1e-2, "constant"))),
        "loss": LossConfig(),
        "checkpoint": CheckpointConfig(every=every),
        "data": read or data(),
        "mesh": make_mesh(MeshConfig()),
        "workdir": workdir,
        "fixed": {"data": {"seed": 0}},
    }
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    config |= {name: value for name, value in changes.items() if name in fields}
    arguments |= {name: value for name, value in changes.items() if name not in fields}
    return train(TrainConfig(**config), **arguments)


def figures(workdir):
    rows = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same_params(a, b):
    for x, y in zip(jax.tree.leaves(restore_params(a)[0]), jax.tree.leaves(restore_params(b)[0]), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_trains_logs_evaluates_and_saves(tmp_path, tiny_config):
    assert run(tmp_path, tiny_config, steps=30) == 30
    rows = read_metrics(tmp_path / "metrics.jsonl")
    train_rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in train_rows] == [1, *range(2, 31, 2)]
    assert train_rows[-1]["loss"] < 0.7 * train_rows[0]["loss"]
    assert train_rows[-1]["tokens_seen"] == 30 * BATCH_SIZE * SEQ_LEN
    assert {"loss/web", "loss/code", "grad_norm", "update_norm", "lr", "tokens_per_second"} <= train_rows[-1].keys()
    assert train_rows[-1]["loss"] == pytest.approx((train_rows[-1]["loss/web"] + train_rows[-1]["loss/code"]) / 2)
    eval_rows = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in eval_rows] == [6, 12, 18, 24, 30]
    assert eval_rows[-1]["eval/loss"] < eval_rows[0]["eval/loss"]
    assert eval_rows[-1]["eval/tokens"] == 3 * BATCH_SIZE * SEQ_LEN
    assert list_steps(tmp_path / "checkpoints") == [24, 28, 30]
    assert list((tmp_path / "tensorboard").iterdir())
    meta = read_meta(tmp_path / "checkpoints" / "30")
    assert meta["step"] == 30
    assert meta["tokens_seen"] == 30 * BATCH_SIZE * SEQ_LEN
    assert meta["model"]["d_model"] == tiny_config.d_model
    assert meta["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


def test_stopped_and_continued_equals_unbroken(tmp_path, tiny_config):
    run(tmp_path / "unbroken", tiny_config)
    for steps in (3, 9, 12):  # the last of each is saved; changing the number of steps is allowed
        run(tmp_path / "broken", tiny_config, steps=steps, average_last=0)
    assert_same_params(tmp_path / "unbroken", tmp_path / "broken")
    unbroken, broken = figures(tmp_path / "unbroken"), figures(tmp_path / "broken")
    extra = [row for row in broken if row["step"] in (3, 9)]  # ends of the shorter runs
    assert [row for row in broken if row not in extra] == unbroken


def test_done_is_done(tmp_path, tiny_config):
    run(tmp_path, tiny_config)
    before = figures(tmp_path)
    assert run(tmp_path, tiny_config) == 0
    assert figures(tmp_path) == before


def test_signal_saves_and_stops(tmp_path, tiny_config):
    run(tmp_path / "unbroken", tiny_config)
    for number, at in ((signal.SIGTERM, 5), (signal.SIGINT, 10)):

        def kill(step, number=number, at=at):
            if step == at:
                os.kill(os.getpid(), number)

        with pytest.raises(exit_codes.Stop) as stop:
            run(tmp_path / "broken", tiny_config, read=data(on_batch=kill))
        assert stop.value.code == exit_codes.PREEMPTED
        assert list_steps(tmp_path / "broken" / "checkpoints")[-1] == at + 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(tmp_path / "broken", tiny_config)
    assert_same_params(tmp_path / "unbroken", tmp_path / "broken")
    assert figures(tmp_path / "unbroken") == figures(tmp_path / "broken")


def test_non_finite_steps_are_skipped_and_counted(tmp_path, tiny_config, caplog):
    run(tmp_path, tiny_config, read=data(poison=(4, 5)), max_consecutive_nonfinite=3)
    last = figures(tmp_path)[-2]
    assert last["nonfinite_total"] == 2
    assert last["nonfinite_run"] == 0
    assert "step 5 skipped" in caplog.text
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(restore_params(tmp_path)[0]))


def test_too_many_non_finite_steps_end_the_run(tmp_path, tiny_config):
    with pytest.raises(NonFiniteError, match="3 steps in a row up to step 9") as stop:
        run(tmp_path, tiny_config, read=data(poison=range(6, 20)), max_consecutive_nonfinite=3)
    assert stop.value.code == exit_codes.NON_FINITE
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 9
    assert row["loss"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fixed": {"data": {"seed": 1}}}, r"data.seed: 0 at the last start, now 1"),
        ({"d_model": 32}, r"model.d_model: 64 at the last start, now 32"),
        ({"schedule": ScheduleConfig((Phase(2, 2e-2, "linear"), Phase(100, 1e-2)))}, "the learning rate of step 1 was"),
    ],
)
def test_other_settings_are_refused(tmp_path, tiny_config, change, message):
    run(tmp_path, tiny_config, steps=4)
    change = dict(change)
    model = dataclasses.replace(tiny_config, **{k: change.pop(k) for k in ("d_model",) if k in change})
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, model, **change)


def test_a_setting_that_is_younger_than_the_checkpoint_had_its_default(tmp_path, tiny_config):
    def fixed(**fields):
        return {"optimizer": config_to_dict(OptimizerConfig(**fields))}

    older = fixed()
    del older["optimizer"]["width_independent_decay"]
    run(tmp_path, tiny_config, steps=4, fixed=older)
    assert run(tmp_path, tiny_config, steps=5, fixed=fixed()) == 1
    with pytest.raises(ConfigError, match=r"optimizer.width_independent_decay: False at the last start, now True"):
        run(tmp_path, tiny_config, steps=6, fixed=fixed(width_independent_decay=True))


def test_the_future_may_change(tmp_path, tiny_config):
    run(tmp_path, tiny_config, steps=4)
    longer = ScheduleConfig((Phase(2, 1e-2, "linear"), Phase(4, 1e-2), Phase(3, 0.0, "linear")))
    model = dataclasses.replace(tiny_config, scan_layers=False, remat="full")
    assert run(tmp_path, model, steps=9, every=3, log_every=1, eval_every=0, schedule=longer) == 5
    assert figures(tmp_path)[-1]["lr"] == pytest.approx(1e-2 / 3)


def test_unreadable_checkpoints_are_never_a_fresh_start(tmp_path, tiny_config):
    run(tmp_path, tiny_config, steps=8)
    for step in (4, 8):
        (tmp_path / "checkpoints" / str(step) / "meta" / "metadata").write_text("{")
    with pytest.raises(CheckpointError, match="none is readable"):
        run(tmp_path, tiny_config)
    assert figures(tmp_path)[-1]["step"] == 8


def test_torn_newest_checkpoint(tmp_path, tiny_config):
    run(tmp_path / "unbroken", tiny_config)
    run(tmp_path / "broken", tiny_config, steps=8)
    (tmp_path / "broken" / "checkpoints" / "8" / "state" / "manifest.ocdbt").unlink()
    assert run(tmp_path / "broken", tiny_config) == 8
    assert_same_params(tmp_path / "unbroken", tmp_path / "broken")
    assert figures(tmp_path / "unbroken") == figures(tmp_path / "broken")


def test_batch_that_does_not_divide(tmp_path, tiny_config):
    with pytest.raises(ConfigError, match="batch_size = 4: must be a multiple"):
        run(tmp_path, tiny_config, num_microbatches=3)


def test_data_that_ends(tmp_path, tiny_config):
    with pytest.raises(InputError, match="the data ended at step 5, 12 were asked for"):
        run(tmp_path, tiny_config, read=data(length=5))


def test_initial_state_is_where_training_starts(tmp_path, tiny_config):
    run(tmp_path / "first", tiny_config, steps=4)
    seen = []

    def initial(abstract):
        seen.append(abstract)
        return restore_state(tmp_path / "first", abstract)

    with pytest.raises(ConfigError, match=r"TrainConfig.steps = 4: the state to start from is at step 4 already"):
        run(tmp_path / "second", tiny_config, steps=4, initial_state=initial)
    assert run(tmp_path / "second", tiny_config, initial_state=initial) == 8
    run(tmp_path / "unbroken", tiny_config)
    assert_same_params(tmp_path / "unbroken", tmp_path / "second")
    assert len(seen) == 2
    assert figures(tmp_path / "second")[-2] == figures(tmp_path / "unbroken")[-2]


def test_profile_and_average(tmp_path, tiny_config):
    run(tmp_path, tiny_config, profile_start=3, profile_steps=2, average_last=2, every=6)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    mean = restore_params(tmp_path / "averaged")[0]
    parts = [restore_params(tmp_path / "checkpoints" / step)[0] for step in ("6", "12")]
    for m, a, b in zip(*map(jax.tree.leaves, (mean, *parts)), strict=True):
        np.testing.assert_allclose(m, (np.asarray(a) + np.asarray(b)) / 2, rtol=1e-6, atol=1e-8)


def test_the_device_is_never_waited_for_in_the_newest_step(tmp_path, tiny_config, monkeypatch):
    """Metrics of step n are read only after step n + 1 was handed to the device (save where all must be known)."""
    events = []
    make = loop.make_train_step

    def spying(*args, **kwargs):
        step = make(*args, **kwargs)

        def call(state, batch):
            events.append("step")
            return step(state, batch)

        return call

    get = jax.device_get
    loop._train_step.cache_clear()  # a program of an earlier run of the same sizes would be taken
    monkeypatch.setattr(loop, "make_train_step", spying)
    monkeypatch.setattr(loop.jax, "device_get", lambda x: events.append("read") or get(x))
    run(tmp_path, tiny_config, steps=5, every=100, eval_every=0)
    loop._train_step.cache_clear()
    assert events == ["step", *["step", "read"] * 4, "read"]


def test_watchdog_thread_ends_with_the_run(tmp_path, tiny_config):
    run(tmp_path, tiny_config, steps=2)
    assert "watchdog" not in [thread.name for thread in threading.enumerate() if thread.is_alive()]
