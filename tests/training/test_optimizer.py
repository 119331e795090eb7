"""AdamW against PyTorch, µP's groups against values computed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from cpm_jax.common.config import ConfigError
from cpm_jax.modeling import decoder
from cpm_jax.training.optimizer import OptimizerConfig, global_norm, group_of, make_optimizer, parameter_groups
from cpm_jax.training.schedules import Phase, ScheduleConfig, make_schedule, wsd

CONSTANT = ScheduleConfig(phases=(Phase(steps=1, end=0.01),))


def example_params(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "embed_tokens": {"embedding": rng.normal(size=(7, 4)).astype(dtype)},
        "layers": {
            "input_layernorm": {"scale": rng.normal(size=(2, 4)).astype(dtype)},
            "self_attn": {
                "q_proj": {
                    "kernel": rng.normal(size=(2, 4, 4)).astype(dtype),
                    "bias": rng.normal(size=(2, 4)).astype(dtype),
                }
            },
        },
        "lm_head": {"kernel": rng.normal(size=(4, 7)).astype(dtype)},
    }


def some_grads(params, step, scale=1.0):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: (scale * rng.normal(size=p.shape)).astype(p.dtype), params)


def run(optimizer, params, steps, scale=1.0):
    params = jax.tree.map(jnp.asarray, params)
    state, update = optimizer.init(params), jax.jit(lambda g, s, p, i: optimizer.update(g, s, p, step=i))
    for i in range(steps):
        updates, state = update(some_grads(params, i, scale), state, params, i)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(("scale", "max_norm"), [(1.0, 1.0), (1e-3, 1.0), (1.0, None)])
def test_equals_torch_adamw(tiny_config, scale, max_norm):
    """Standard parametrisation: clipping that bites, that does not, and none; a schedule; groups without decay."""
    config = OptimizerConfig(weight_decay=0.1, max_grad_norm=max_norm)
    schedule = wsd(peak_lr=0.02, train_steps=12, warmup_steps=4, decay_steps=4)
    start = example_params()
    ours = run(make_optimizer(config, schedule, dataclasses.replace(tiny_config, dim_model_base=0)), start, 12, scale)

    leaves, structure = jax.tree_util.tree_flatten_with_path(start)
    theirs = [torch.nn.Parameter(torch.tensor(leaf, dtype=torch.float64)) for _, leaf in leaves]
    decays = [0.1 if path[-1].key in ("kernel", "embedding") else 0.0 for path, _ in leaves]
    reference = torch.optim.AdamW(
        [{"params": [p], "weight_decay": d} for p, d in zip(theirs, decays, strict=True)], betas=(0.9, 0.95), eps=1e-8
    )
    lr = make_schedule(schedule)
    for i in range(12):
        for p, g in zip(theirs, jax.tree.leaves(some_grads(start, i, scale)), strict=True):
            p.grad = torch.tensor(g, dtype=torch.float64)
        if max_norm:
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        for group in reference.param_groups:
            group["lr"] = float(lr(i))
        reference.step()
    expected = jax.tree.unflatten(structure, [p.detach().numpy() for p in theirs])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), ours, expected)


def test_first_step_under_mup_by_hand(tiny_config):
    """Adam's first update is the gradient's sign, so each group's step is lr · factor · (sign + decay · p)."""
    start = example_params()
    config = OptimizerConfig(weight_decay=0.5, max_grad_norm=None, eps=1e-30, decay_embeddings=False)
    ours = run(make_optimizer(config, CONSTANT, tiny_config), start, 1)
    sign = jax.tree.map(np.sign, some_grads(start, 0))
    assert tiny_config.width_multiplier == 64 / 32

    def moved(get):
        return (get(start) - np.asarray(get(ours))) / 0.01

    def embedding(tree):
        return tree["embed_tokens"]["embedding"]

    def norm(tree):
        return tree["layers"]["input_layernorm"]["scale"]

    def matrix(tree):
        return tree["layers"]["self_attn"]["q_proj"]["kernel"]

    def bias(tree):
        return tree["layers"]["self_attn"]["q_proj"]["bias"]

    def head(tree):
        return tree["lm_head"]["kernel"]

    for get in (embedding, norm, bias):
        np.testing.assert_allclose(moved(get), get(sign), atol=1e-4)
    np.testing.assert_allclose(moved(matrix), 0.5 * (matrix(sign) + 0.5 * matrix(start)), atol=1e-4)
    np.testing.assert_allclose(moved(head), head(sign) + 0.5 * head(start), atol=1e-4)


def test_table_agrees_with_the_initial_values_of_the_model(tiny_config):
    config = dataclasses.replace(
        tiny_config,
        tie_word_embeddings=False,
        attention_bias=True,
        num_nextn_predict_layers=1,
        vocab_size=512,
        dim_model_base=16,
    )
    table = parameter_groups(OptimizerConfig(), config)
    assert table["matrix"].lr == 1 / 4
    assert table["matrix"].init_std == pytest.approx(0.1 / 2)

    seen = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(decoder.init_params(config, jax.random.key(0)))[0]:
        group = group_of(tuple(key.key for key in path))
        seen.add(group)
        std = float(jnp.std(leaf))
        if table[group].init_std:
            assert std == pytest.approx(table[group].init_std, rel=5 / np.sqrt(2 * leaf.size)), path
        else:
            assert std == 0, path
    assert seen == set(table)


def test_unknown_parameters_are_refused():
    with pytest.raises(ValueError, match="layers/router/gate: its group is unknown"):
        group_of(("layers", "router", "gate"))


def test_moments_and_updates_are_float32_for_bfloat16_parameters(tiny_config):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), example_params())
    optimizer = make_optimizer(OptimizerConfig(), CONSTANT, tiny_config)
    state = optimizer.init(params)
    updates, state = optimizer.update(some_grads(params, 0), state, params, step=jnp.int32(0))
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(params))
    assert {leaf.dtype for leaf in [*moments, *jax.tree.leaves(updates)]} == {jnp.dtype("float32")}
    assert {p.dtype for p in jax.tree.leaves(optax.apply_updates(params, updates))} == {jnp.dtype("bfloat16")}


def test_global_norm():
    tree = {"a": jnp.asarray([3.0], jnp.bfloat16), "b": {"c": jnp.asarray([[4.0], [12.0]])}}
    assert float(global_norm(tree)) == 13.0
    assert global_norm(tree).dtype == jnp.float32


@pytest.mark.parametrize(("field", "value"), [("b1", 1.0), ("eps", 0.0), ("weight_decay", -0.1), ("max_grad_norm", 0)])
def test_impossible_constants_are_named(field, value):
    with pytest.raises(ConfigError, match=rf"OptimizerConfig.{field} = {value}"):
        OptimizerConfig(**{field: value})
