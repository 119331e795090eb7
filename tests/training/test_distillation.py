"""Distillation against PyTorch's divergence, and in a training with a teacher from a checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cpm_jax.common.config import ConfigError
from cpm_jax.common.metrics import read_metrics
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.modeling.config import TernaryConfig
from cpm_jax.scaling.stacked_program import StackedProgram, Trial
from cpm_jax.training.distillation import DistillationConfig, linear_kl_divergence, load_teacher
from cpm_jax.training.losses import LossConfig
from cpm_jax.training.optimizer import OptimizerConfig
from cpm_jax.training.schedules import Phase, ScheduleConfig
from tests.training.test_loop import run


@pytest.mark.parametrize(("rows", "length", "temperature"), [(40, 61, 1.0), (1, 7, 2.5)])
def test_divergence_and_gradients_are_those_of_pytorch(rows, length, temperature):
    """Over several chunks, the last one padded; the teacher is wider than the student."""
    rng = np.random.default_rng(0)
    hidden, theirs = rng.normal(size=(rows, length, 8)), rng.normal(size=(rows, length, 12))
    kernel, their_kernel = rng.normal(size=(8, 17)), rng.normal(size=(12, 17))
    weights = rng.integers(0, 3, (rows, length))
    inputs = [jnp.asarray(x, jnp.float32) for x in (hidden, kernel, theirs, their_kernel, weights)]
    value, (dhidden, dkernel) = jax.jit(
        jax.value_and_grad(lambda *a: linear_kl_divergence(*a, temperature=temperature), argnums=(0, 1))
    )(*inputs)

    x, w = (torch.tensor(np.asarray(a, np.float32), requires_grad=True) for a in (hidden, kernel))
    log_q = torch.log_softmax(x @ w / temperature, -1)
    log_p = torch.log_softmax(torch.tensor((theirs @ their_kernel).astype(np.float32)) / temperature, -1)
    each = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    expected = (each * torch.tensor(weights)).sum()
    expected.backward()
    for ours, other in ((value, expected.detach()), (dhidden, x.grad), (dkernel, w.grad)):
        np.testing.assert_allclose(ours, other.numpy(), rtol=2e-4, atol=2e-5 * float(other.abs().max()))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a run of 2 steps of another width, with its MTP layer."""
    folder = tmp_path_factory.mktemp("teacher")

    def train(config):
        wide = dataclasses.replace(config, d_model=32, d_ff=64, num_nextn_predict_layers=1)
        if not any(folder.iterdir()):
            run(folder, wide, steps=2, eval_every=0, fixed={"tokenizer_sha256": "abc"})
        return folder

    return train


def test_training_with_a_teacher(teacher, tiny_config, tmp_path):
    """A ternary student of a dense teacher: the loss is the sum; where tokens count little, it nears the teacher."""
    loss = LossConfig(distillation=DistillationConfig(str(teacher(tiny_config)), weight=100.0, temperature=2.0))
    student = dataclasses.replace(tiny_config, ternary=TernaryConfig(32))
    fixed = {"tokenizer_sha256": "abc"}
    run(tmp_path, student, steps=12, loss=loss, fixed=fixed, eval_every=0, num_microbatches=2)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "teacher_kl" in row]
    for row in rows:
        assert row["loss"] == pytest.approx(row["ntp_loss"] + 100.0 * 2.0**2 * row["teacher_kl"], rel=1e-5)
    assert 0 < rows[-1]["teacher_kl"] < 0.7 * rows[0]["teacher_kl"]


def test_teachers_that_do_not_fit(teacher, tiny_config):
    config, mesh = DistillationConfig(str(teacher(tiny_config))), make_mesh(MeshConfig())
    found = load_teacher(config, tiny_config, mesh, "abc")
    assert found.config.num_nextn_predict_layers == 0
    assert "mtp_layers" not in found.params
    with pytest.raises(ConfigError, match=r"predicts 128 tokens of the tokenizer abc…, the student 128 of xyz…"):
        load_teacher(config, tiny_config, mesh, "xyz")
    with pytest.raises(
        ConfigError, match=r"DistillationConfig.teacher = .* the student 200 of None…; must be the same"
    ):
        load_teacher(config, dataclasses.replace(tiny_config, vocab_size=200), mesh)


def test_trials_of_one_program_have_no_teacher(tiny_config):
    trial = Trial("a", tiny_config, OptimizerConfig(), ScheduleConfig((Phase(2, 1e-2),)))
    program = StackedProgram([trial], steps=2, loss=LossConfig(distillation=DistillationConfig("/somewhere")))
    batch = {"tokens": jax.ShapeDtypeStruct((2, 4), jnp.int32)}
    with pytest.raises(ConfigError, match=r"LossConfig.distillation = .*: only a training by itself has a teacher"):
        program.lower(batch)
