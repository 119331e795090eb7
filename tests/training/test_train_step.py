"""One training step: what it computes, what it leaves alone, and what it equals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import SparseConfig
from cpm_jax.training.losses import LossConfig, loss_sums
from cpm_jax.training.optimizer import OptimizerConfig, global_norm, make_optimizer
from cpm_jax.training.schedules import Phase, ScheduleConfig, wsd
from cpm_jax.training.train_state import init_state
from cpm_jax.training.train_step import check_batch_size, make_eval_step, make_train_step

CONSTANT = ScheduleConfig(phases=(Phase(steps=1, end=0.01),))


def copy(state):
    """The step donates its state, so a test that needs it twice copies it."""
    return jax.tree.map(jnp.copy, state)


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "sparse",
    [None, SparseConfig(kernel_size=2, kernel_stride=1, block_size=4, window_size=4, topk=2, dense_len=-1)],
    ids=["dense", "sparse"],
)
def test_memorises_a_batch_with_falling_mtp_loss(tiny_config, batch, sparse):
    config = dataclasses.replace(tiny_config, num_nextn_predict_layers=1, sparse_config=sparse)
    schedule = wsd(peak_lr=0.02, train_steps=120, warmup_steps=10, decay_steps=30)
    optimizer = make_optimizer(OptimizerConfig(), schedule, config)
    step = make_train_step(config, optimizer)
    state, history = init_state(config, optimizer, jax.random.key(0)), []
    for _ in range(120):
        state, metrics = step(state, batch)
        history.append({key: np.asarray(value) for key, value in metrics.items()})
    assert history[0]["ntp_loss"] > 4
    assert history[-1]["ntp_loss"] < 0.1
    assert history[0]["mtp_loss"] > 4
    assert history[-1]["mtp_loss"] < 0.2
    assert history[-1]["loss"] == pytest.approx(history[-1]["ntp_loss"] + 0.3 * history[-1]["mtp_loss"], rel=1e-5)
    assert [m["lr"] for m in history[:3]] == pytest.approx([0, 0.002, 0.004])
    assert int(state.step) == 120


def test_every_mtp_parameter_has_a_gradient_from_the_mtp_loss_alone(tiny_config, batch):
    config = dataclasses.replace(tiny_config, num_nextn_predict_layers=2)
    params = decoder.init_params(config, jax.random.key(0))
    grads = jax.jit(jax.grad(lambda p: loss_sums(decoder.bind(config, p), batch, 2).mtp_nll.sum()))(params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        for depth, layer in enumerate(leaf) if path[0].key == "mtp_layers" else ():
            assert jnp.abs(layer).max() > 0, (path, depth)
    assert global_norm(grads["layers"]) > 0
    assert global_norm(grads["embed_tokens"]) > 0


def test_mtp_weight_follows_the_step_within_one_compiled_function(tiny_config, batch):
    config = dataclasses.replace(tiny_config, num_nextn_predict_layers=1)
    optimizer = make_optimizer(OptimizerConfig(), CONSTANT, config)
    step = make_train_step(config, optimizer, loss=LossConfig(mtp_final_step=1))
    state = init_state(config, optimizer, jax.random.key(0))
    for weight in (0.3, 0.1):
        state, metrics = step(state, batch)
        assert float(metrics["loss"] - metrics["ntp_loss"]) == pytest.approx(
            weight * float(metrics["mtp_loss"]), rel=1e-4
        )


def test_accumulation_equals_the_whole_batch(tiny_config, batch):
    """Also with very different numbers of loss tokens in the micro-batches, where a mean of means would be wrong."""
    config = dataclasses.replace(tiny_config, num_nextn_predict_layers=1)
    batch["loss_weights"][0] *= np.arange(32) < 2
    batch["loss_weights"][3] = 0
    # Adam turns rounding of near-zero gradients into steps, so that gradients are compared through its first moment.
    optimizer = make_optimizer(OptimizerConfig(max_grad_norm=None), CONSTANT, config)
    start = init_state(config, optimizer, jax.random.key(0))
    whole, whole_metrics = make_train_step(config, optimizer, num_sources=2)(copy(start), batch)
    parts, parts_metrics = make_train_step(config, optimizer, num_sources=2, num_microbatches=4)(copy(start), batch)
    scale = float(whole_metrics["grad_norm"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7 * scale),
        whole.opt_state[1].mu,
        parts.opt_state[1].mu,
    )
    for key in whole_metrics:
        np.testing.assert_allclose(whole_metrics[key], parts_metrics[key], rtol=1e-5, err_msg=key)


def test_nonfinite_step_changes_nothing_but_counters(tiny_config, batch):
    optimizer = make_optimizer(OptimizerConfig(), CONSTANT, tiny_config)
    step = make_train_step(tiny_config, optimizer)
    state, _ = step(init_state(tiny_config, optimizer, jax.random.key(0)), batch)
    broken = dict(batch, loss_weights=np.where(np.arange(32) == 5, np.inf, batch["loss_weights"]).astype(np.float32))
    before = copy(state)
    for run in (1, 2):
        state, metrics = step(state, broken)
        assert not np.isfinite(metrics["loss"])
        assert [float(metrics[k]) for k in ("nonfinite", "nonfinite_run", "update_norm")] == [1, run, 0]
        assert_trees_equal((state.params, state.opt_state), (before.params, before.opt_state))
        assert (int(state.step), int(state.nonfinite_run), int(state.nonfinite_total)) == (1 + run, run, run)
    state, metrics = step(state, batch)
    assert (int(state.step), int(state.nonfinite_run), int(state.nonfinite_total)) == (4, 0, 2)
    assert float(metrics["update_norm"]) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_finite_loss_with_a_nonfinite_gradient_is_skipped(tiny_config, batch):
    """A huge head behind a tiny norm: finite logits, but a gradient whose norm overflows."""
    config = dataclasses.replace(tiny_config, tie_word_embeddings=False)
    optimizer = make_optimizer(OptimizerConfig(), CONSTANT, config)
    state = init_state(config, optimizer, jax.random.key(0))
    kernel = state.params["lm_head"]["kernel"]
    scale = state.params["norm"]["scale"]
    params = {**state.params, "lm_head": {"kernel": kernel * 1e25}, "norm": {"scale": scale * 1e-25}}
    state = dataclasses.replace(state, params=params)
    before = copy(state)
    state, metrics = make_train_step(config, optimizer)(state, batch)
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert float(metrics["nonfinite"]) == 1
    assert_trees_equal(state.params, before.params)


def test_skipped_steps_do_not_shift_the_learning_rate(tiny_config, batch):
    optimizer = make_optimizer(
        OptimizerConfig(), wsd(peak_lr=1.0, train_steps=10, warmup_steps=10, decay_steps=0), tiny_config
    )
    step = make_train_step(tiny_config, optimizer)
    state, rates = init_state(tiny_config, optimizer, jax.random.key(0)), []
    broken = dict(batch, loss_weights=np.full_like(batch["loss_weights"], np.nan))
    for given in (batch, broken, batch):
        state, metrics = step(state, given)
        rates.append(float(metrics["lr"]))
    assert rates == pytest.approx([0, 0.1, 0.2])
    assert float(metrics["update_norm"]) > 0


def test_metrics_count_tokens_and_split_the_loss_by_source(tiny_config, batch):
    optimizer = make_optimizer(OptimizerConfig(), CONSTANT, tiny_config)
    state = init_state(tiny_config, optimizer, jax.random.key(0))
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(state.params)))
    before = jax.tree.map(np.asarray, state.params)
    after, metrics = make_train_step(tiny_config, optimizer, num_sources=3)(state, batch)
    assert float(metrics["tokens"]) == (batch["segment_ids"] > 0).sum()
    assert float(metrics["loss_tokens"]) == batch["loss_weights"].sum()
    np.testing.assert_array_equal(
        metrics["source_tokens"], [batch["loss_weights"][::2].sum(), batch["loss_weights"][1::2].sum(), 0]
    )
    assert np.isnan(metrics["source_loss"][2])
    np.testing.assert_allclose(
        np.sum(metrics["source_loss"][:2] * metrics["source_tokens"][:2]) / metrics["loss_tokens"],
        metrics["loss"],
        rtol=1e-6,
    )
    np.testing.assert_allclose(metrics["param_norm"], norm, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, after.params, before)
    moved_norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(moved)))
    np.testing.assert_allclose(metrics["update_norm"], moved_norm, rtol=1e-4)


def test_a_batch_without_loss_tokens_has_loss_zero(tiny_config, batch):
    optimizer = make_optimizer(OptimizerConfig(), CONSTANT, tiny_config)
    batch["loss_weights"] = np.zeros_like(batch["loss_weights"])
    _, metrics = make_train_step(tiny_config, optimizer)(init_state(tiny_config, optimizer, jax.random.key(0)), batch)
    assert float(metrics["loss"]) == 0
    assert float(metrics["nonfinite"]) == 0


def test_eval_sums_of_batches_give_the_mean_of_all(tiny_config, make_batch):
    params = decoder.init_params(tiny_config, jax.random.key(0))
    step = make_eval_step(tiny_config, num_sources=2)
    batches = [make_batch(seed) for seed in range(2)]
    parts = [step(params, batch) for batch in batches]
    whole = step(params, {key: np.concatenate([b[key] for b in batches]) for key in batches[0]})
    np.testing.assert_allclose(parts[0].nll + parts[1].nll, whole.nll, rtol=1e-6)
    np.testing.assert_allclose(parts[0].source_nll + parts[1].source_nll, whole.source_nll, rtol=1e-6)
    np.testing.assert_allclose(whole.source_nll.sum(), whole.nll, rtol=1e-6)
    assert float(whole.source_weight.sum()) == sum(b["loss_weights"].sum() for b in batches)


def test_impossible_batch_sizes_are_named():
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    check_batch_size(8, 32, mesh, num_microbatches=4)
    with pytest.raises(ConfigError, match=r"batch_size = 6: must be a multiple of .* 4 x 1 x 1 = 4"):
        check_batch_size(6, 32, mesh, num_microbatches=4)


def test_bfloat16_parameters_keep_their_type_and_learn(tiny_config, batch):
    config = dataclasses.replace(tiny_config, dtype="bfloat16", param_dtype="bfloat16")
    optimizer = make_optimizer(OptimizerConfig(), CONSTANT, config)
    step = make_train_step(config, optimizer, num_microbatches=2)
    state, losses = init_state(config, optimizer, jax.random.key(0)), []
    types = jax.tree.map(lambda x: x.dtype, state)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim} == {jnp.dtype("float32")}
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert jax.tree.map(lambda x: x.dtype, state) == types
    assert losses[-1] < losses[0] - 1
