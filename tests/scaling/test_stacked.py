"""Trials in one program against trainings of their own: the ordinary step and the ordinary loop."""

import dataclasses
import functools
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from cpm_jax.checkpoints.manager import CheckpointConfig, list_steps, restore_params
from cpm_jax.common import exit_codes
from cpm_jax.common.config import ConfigError, InputError, config_to_dict
from cpm_jax.common.metrics import METRICS_FILE, read_metrics
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.scaling.runs import summarise_run
from cpm_jax.scaling.stacked import train_stacked
from cpm_jax.scaling.stacked_program import StackedProgram, Trial, choose_method, program_key
from cpm_jax.training.loop import NonFiniteError, TrainConfig, TrainData, train
from cpm_jax.training.losses import LossConfig
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import cosine, wsd
from cpm_jax.training.train_state import init_state
from cpm_jax.training.train_step import make_train_step

STEPS = 6
LOSS = LossConfig()


def schedule(peak):
    return wsd(peak_lr=peak, train_steps=STEPS, warmup_steps=2, decay_steps=2)


@pytest.fixture
def small(tiny_config):
    return dataclasses.replace(
        tiny_config,
        num_layers=1,
        d_model=32,
        num_heads=2,
        num_kv_heads=1,
        d_ff=64,
        dim_model_base=16,
        scan_layers=False,
    )


@pytest.fixture
def by_rate(small):
    """Trials that differ in learning rate, weight decay and seed."""
    return tuple(
        Trial(f"lr_{peak}_seed_{seed}", small, OptimizerConfig(weight_decay=decay), schedule(peak), seed)
        for peak, decay, seed in ((0.003, 0.1, 0), (0.01, 0.0, 0), (0.03, 0.3, 1))
    )


@pytest.fixture
def by_everything(small, by_rate):
    """Trials that differ in every scalar, of models with an MTP layer."""
    small = dataclasses.replace(small, num_nextn_predict_layers=1)
    widths = ({"dim_model_base": 0}, {"scale_emb": 3.0, "initializer_range": 0.05}, {"scale_depth": 0.5})
    constants = ({"b1": 0.8}, {"b2": 0.99, "width_independent_decay": True}, {"eps": 1e-6, "decay_embeddings": False})
    return tuple(
        dataclasses.replace(
            trial,
            name=f"{i}",
            model=dataclasses.replace(small, **widths[i]),
            optimizer=dataclasses.replace(trial.optimizer, **constants[i]),
            schedule=cosine(peak_lr=0.01, train_steps=STEPS, warmup_steps=1) if i == 1 else trial.schedule,
        )
        for i, trial in enumerate(by_rate)
    )


def batch_of(seed, rows=2, length=16):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 128, (rows, length + 1)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.9).astype(np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": weights,
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "source_ids": (np.arange(rows) % 2).astype(np.int32),
    }


BATCHES = [batch_of(seed) for seed in range(STEPS)]


@functools.cache
def alone(trial):
    """The state and the losses of a training of its own, by the ordinary step."""
    optimizer = make_optimizer(trial.optimizer, trial.schedule, trial.model)
    step = make_train_step(trial.model, optimizer, loss=LOSS, num_sources=2)
    state, losses = init_state(trial.model, optimizer, jax.random.key(trial.seed)), []
    for batch in BATCHES:
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return jax.device_get(state), np.array(losses)


@functools.cache
def together(trials, method):
    """The same of trials in one program."""
    program = StackedProgram(trials, steps=STEPS, loss=LOSS, num_sources=2, method=method)
    states, losses = program.init(), []
    for batch in BATCHES:
        states, metrics = program.step(states, batch)
        losses.append(metrics["loss"])
    states = jax.device_get(states)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], states) for i in range(len(trials))], np.array(losses).T


def test_one_after_another_in_a_program_is_a_training_of_its_own_bit_by_bit(by_rate):
    states, losses = together(by_rate, "map")
    for trial, state, loss in zip(by_rate, states, losses, strict=True):
        own_state, own_loss = alone(trial)
        np.testing.assert_array_equal(loss, own_loss, err_msg=trial.name)
        jax.tree.map(np.testing.assert_array_equal, state, own_state)


@pytest.mark.parametrize("method", ["map", "vmap"])
def test_trials_that_differ_in_every_scalar_are_close_to_their_own_training(by_everything, method):
    states, losses = together(by_everything, method)
    for trial, state, loss in zip(by_everything, states, losses, strict=True):
        own_state, own_loss = alone(trial)
        np.testing.assert_allclose(loss, own_loss, rtol=1e-6, err_msg=trial.name)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state.params, own_state.params
        )
    assert len({float(loss[-1]) for loss in losses}) == 3


@pytest.mark.parametrize("method", ["map", "vmap"])
def test_a_trial_that_is_not_finite_leaves_the_others_as_they_are(by_rate, method):
    bad = dataclasses.replace(by_rate[1], schedule=schedule(1e15))
    finite, losses = together(by_rate, method)
    beside, others = together((by_rate[0], bad, by_rate[2]), method)
    assert not np.isfinite(others[1]).all()
    assert int(beside[1].nonfinite_total) > 0
    for i in (0, 2):
        np.testing.assert_array_equal(others[i], losses[i])
        jax.tree.map(np.testing.assert_array_equal, beside[i], finite[i])


def data(seed, steps=STEPS):
    """Batches whose order is the seed's, and held-out ones."""
    return TrainData(
        batches=lambda step: (batch_of(100 * seed + i) for i in range(step, steps)),
        eval_batches=lambda: (batch_of(seed) for seed in (1000, 1001)),
        sources=("one", "two"),
        seq_len=16,
    )


CONFIG = TrainConfig(steps=STEPS, batch_size=2, log_every=2, eval_every=3, eval_batches=0, max_consecutive_nonfinite=2)


def line_of(trial, metrics):
    """What a training leaves in runs.jsonl."""
    return summarise_run(
        metrics,
        id=trial.name,
        model=trial.model,
        schedule=trial.schedule,
        seq_len=16,
        batch_size=CONFIG.batch_size,
        steps=STEPS,
        seed=trial.seed,
        config={"seed": trial.seed},
    )


@pytest.mark.parametrize("method", ["map", "vmap"])
def test_the_files_are_those_of_trainings_by_the_loop(by_rate, tmp_path, method):
    results = train_stacked(CONFIG, trials=by_rate, loss=LOSS, data=data, workdir=tmp_path / "stacked", method=method)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    for trial, result in zip(by_rate, results, strict=True):
        workdir = tmp_path / "alone" / trial.name
        train(
            dataclasses.replace(CONFIG, seed=trial.seed),
            model=trial.model,
            optimizer=trial.optimizer,
            schedule=trial.schedule,
            loss=LOSS,
            checkpoint=CheckpointConfig(),
            data=data(trial.seed),
            mesh=mesh,
            workdir=workdir,
            fixed={},
        )
        ours, theirs = (read_metrics(path / METRICS_FILE) for path in (tmp_path / "stacked" / trial.name, workdir))
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for our, their in zip(ours, theirs, strict=True):
            timed = {"seconds_per_step", "tokens_per_second"}
            # The loop says of which source its held-out losses are.
            names = {name for name in their if not name.startswith("eval/") or name == "eval/loss"}
            assert our.keys() >= names - timed
            for name in names - timed:
                assert our[name] == pytest.approx(their[name], rel=1e-5), (trial.name, name)
        of_own, of_program = (config_to_dict(line_of(trial, rows)) for rows in (theirs, ours))
        assert of_program.pop("loss") == pytest.approx(of_own.pop("loss"), rel=1e-5)
        assert of_program.pop("seconds") > 0 < of_own.pop("seconds")
        assert of_program == of_own
        assert result.status == of_own["status"] == "done"
        assert result.steps == STEPS
        assert result.eval_loss == pytest.approx(theirs[-1]["eval/loss"], rel=1e-5)
        assert result.losses[-1] == pytest.approx(theirs[-2]["loss"], rel=1e-5)


def own(trial, workdir):
    """A training by the loop, from the newest checkpoint in the workdir; returns its last parameters."""
    train(
        dataclasses.replace(CONFIG, seed=trial.seed),
        model=trial.model,
        optimizer=trial.optimizer,
        schedule=trial.schedule,
        loss=LOSS,
        checkpoint=CheckpointConfig(every=3),
        data=data(trial.seed),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        workdir=workdir,
        fixed={"seed": trial.seed},
    )
    return restore_params(workdir)[0]


def test_each_trial_goes_on_alone_from_its_checkpoint(by_rate, tmp_path):
    settings = {"checkpoint": CheckpointConfig(every=3), "fixed": lambda trial: {"seed": trial.seed}, "method": "map"}
    bad = dataclasses.replace(by_rate[0], name="bad", schedule=schedule(1e15))
    trials = [*by_rate, bad]
    train_stacked(CONFIG, trials=trials, loss=LOSS, data=data, workdir=tmp_path, **settings)
    for trial in by_rate:
        assert list_steps(tmp_path / trial.name / "checkpoints") == [3, STEPS]
        alone = own(trial, tmp_path / "alone" / trial.name)
        jax.tree.map(np.testing.assert_array_equal, restore_params(tmp_path / trial.name)[0], alone)
        shutil.rmtree(tmp_path / trial.name / "checkpoints" / f"{STEPS}")
        jax.tree.map(np.testing.assert_array_equal, own(trial, tmp_path / trial.name), alone)
        rows = read_metrics(tmp_path / trial.name / METRICS_FILE)
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 6, 6]
    assert STEPS not in list_steps(tmp_path / "bad" / "checkpoints")  # not finite: nothing to keep
    with pytest.raises(ConfigError, match=r"holds checkpoints \(steps 3, 6\), and trials in one"):
        train_stacked(CONFIG, trials=by_rate[:1], loss=LOSS, data=data, workdir=tmp_path, **settings)


def test_told_to_stop_all_trials_are_saved(by_rate, tmp_path):
    def stopping(seed):
        whole = data(seed)

        def batches(step):
            for i, batch in enumerate(whole.batches(step)):
                if i == 1:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        return dataclasses.replace(whole, batches=batches)

    with pytest.raises(exit_codes.Stop, match="stopped and saved 2 trials at step 2"):
        train_stacked(
            CONFIG, trials=by_rate[:2], loss=LOSS, data=stopping, workdir=tmp_path, checkpoint=CheckpointConfig()
        )
    assert [list_steps(tmp_path / trial.name / "checkpoints") for trial in by_rate[:2]] == [[2], [2]]


def test_a_diverged_trial_ends_where_its_own_training_would(by_rate, tmp_path):
    bad = dataclasses.replace(by_rate[0], name="bad", schedule=schedule(1e15), seed=1)
    trials = [bad, by_rate[2]]
    results = train_stacked(CONFIG, trials=trials, loss=LOSS, data=data, workdir=tmp_path / "stacked", method="vmap")
    assert [result.status for result in results] == ["diverged", "done"]
    assert results[0].eval_loss is None
    assert results[1].eval_loss is not None
    with pytest.raises(NonFiniteError):
        train(
            dataclasses.replace(CONFIG, seed=bad.seed),
            model=bad.model,
            optimizer=bad.optimizer,
            schedule=bad.schedule,
            loss=LOSS,
            checkpoint=CheckpointConfig(),
            data=data(bad.seed),
            mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
            workdir=tmp_path / "alone",
            fixed={},
        )
    last = read_metrics(tmp_path / "alone" / METRICS_FILE)[-1]
    ours = read_metrics(tmp_path / "stacked" / "bad" / METRICS_FILE)[-1]
    assert results[0].steps == last["step"] == ours["step"] < STEPS
    assert ours["loss"] is None
    assert line_of(bad, [ours]).status == line_of(bad, [last]).status == "diverged"
    assert ours["nonfinite_run"] == last["nonfinite_run"] == 2


def test_data_that_ends_early_is_named(by_rate, tmp_path):
    with pytest.raises(InputError, match="the data ended at step 2, 6 were asked for"):
        train_stacked(CONFIG, trials=by_rate, loss=LOSS, data=lambda seed: data(seed, 2), workdir=tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model": {"d_model": 64}},
            "ModelConfig.d_model = 32 in trial 'a' and 64 in 'b': trials of one program may",
        ),
        ({"model": {"num_layers": 3}}, "ModelConfig.num_layers = 1 in trial 'a' and 3 in 'b'"),
        ({"optimizer": {"max_grad_norm": None}}, "OptimizerConfig.max_grad_norm = 1.0 in trial 'a' and None in 'b'"),
        ({"name": "a"}, "Trial.name: ['a', 'a']: give at least one trial, and each its own name"),
    ],
)
def test_trials_that_cannot_share_a_program_are_refused(small, change, words):
    first = Trial("a", small, OptimizerConfig(), schedule(0.01))
    other = Trial(
        change.get("name", "b"),
        dataclasses.replace(small, **change.get("model", {})),
        dataclasses.replace(first.optimizer, **change.get("optimizer", {})),
        schedule(0.02),
    )
    with pytest.raises(ConfigError, match=re.escape(words)):
        StackedProgram([first, other], steps=STEPS, loss=LOSS)


def test_what_shares_a_program(by_everything):
    assert len({program_key(trial) for trial in by_everything}) == 1
    wider = dataclasses.replace(by_everything[0], model=dataclasses.replace(by_everything[0].model, d_ff=256))
    assert program_key(wider) != program_key(by_everything[0])


def test_the_method_follows_size_and_platform(small, tiny_config):
    large = dataclasses.replace(tiny_config, d_model=512, num_heads=8, d_ff=2048)
    assert [choose_method(model, "cpu") for model in (small, large)] == ["vmap", "map"]
    assert choose_method(large, "tpu") == "vmap"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"average_last": 2}, "TrainConfig.average_last = 2, profile_start = None: must be 0 and None"),
        ({"profile_start": 1}, "TrainConfig.average_last = 0, profile_start = 1: must be 0 and None"),
        ({"num_microbatches": 4}, "batch_size = 2: must be a multiple of num_microbatches"),
    ],
)
def test_what_trials_cannot_do_is_refused(by_rate, tmp_path, change, words):
    config = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ConfigError, match=re.escape(words)):
        train_stacked(config, trials=by_rate, loss=LOSS, data=data, workdir=tmp_path)
