"""docs/mup.md's table against what models start with and what the optimizer does; families and their refusals."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.modeling import decoder
from cpm_jax.modeling.model_size import count_params
from cpm_jax.scaling.mup import at_width, check_family, standard
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import Phase, ScheduleConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mup.md"
LR, DECAY = 0.03, 0.7


def documented_rules() -> dict[str, dict[str, str]]:
    """Name of a tensor to its cells by column, from the table of the page."""
    lines = PAGE.read_text("utf-8").split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("| parameters |"))
    columns = [cell.strip() for cell in lines[start].strip("|").split("|")]
    rules = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`([^`]+)`", cells[0]):
            assert name not in rules, f"{name} stands in two rows"
            rules[name] = dict(zip(columns, cells, strict=True))
    return rules


def value(cell: str, **symbols: float) -> float:
    """Evaluates a cell such as "σ / √m"."""
    found = re.fullmatch(r"(0|[σηλ])(?: ([/·]) (√?)m)?", cell)
    assert found, f"{cell!r} is no rule"
    symbol, operator, root = found.groups()
    factor = (math.sqrt(symbols["m"]) if root else symbols["m"]) if operator else 1.0
    number = 0.0 if symbol == "0" else symbols[symbol]
    return number / factor if operator == "/" else number * factor


@pytest.fixture
def everything(tiny_config):
    """A model with every kind of parameter, four times as wide as its base."""
    return dataclasses.replace(
        tiny_config,
        dim_model_base=16,
        vocab_size=512,
        tie_word_embeddings=False,
        attention_bias=True,
        num_nextn_predict_layers=2,
    )


def moved(params, value_of_params, optimizer):
    """Updates of a first step whose gradients are 1 where every parameter has the same value; Adam's update is 1."""
    ones = jax.tree.map(jnp.ones_like, params)
    at = jax.tree.map(lambda p: jnp.full_like(p, value_of_params), params)
    return optimizer.update(ones, optimizer.init(at), at, step=jnp.int32(0))[0]


@pytest.mark.parametrize(
    ("column", "mup", "independent"),
    [
        ("SP", False, False),
        ("µP", True, False),
        ("µP with `width_independent_decay`", True, True),
        ("SP", False, True),
    ],
)
def test_the_documented_table_is_what_happens(everything, column, mup, independent):
    model = everything if mup else standard(everything)
    config = OptimizerConfig(weight_decay=DECAY, max_grad_norm=None, eps=1e-30, width_independent_decay=independent)
    optimizer = make_optimizer(config, ScheduleConfig(phases=(Phase(steps=1, end=LR),)), model)
    params = decoder.init_params(model, jax.random.key(0))
    at_zero, at_one = moved(params, 0.0, optimizer), moved(params, 1.0, optimizer)
    symbols = {"m": 4.0, "σ": model.initializer_range, "η": LR, "λ": DECAY}
    parametrization = "µP" if mup else "SP"

    rules, used = documented_rules(), set()
    flat = zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (params, at_zero, at_one)), strict=True)
    for (path, start), (_, zero), (_, one) in flat:
        path = "/".join(key.key for key in path)
        # The longest name that the path ends in: norm/scale is not input_layernorm/scale.
        names = [name for name in rules if f"/{path}".endswith(f"/{name}")]
        assert len(names) == 1, f"{path}: {names} of docs/mup.md"
        used |= set(names)
        cells = rules[names[0]]
        lr = value(cells[f"learning rate, {parametrization}"], **symbols)
        decay = value(cells[f"decay, {column}"], **symbols)
        np.testing.assert_allclose(-zero, lr, rtol=1e-5, err_msg=path)
        np.testing.assert_allclose(zero - one, lr * decay, rtol=1e-4, atol=1e-9, err_msg=path)
        std = value(cells[f"initial std, {parametrization}"], **symbols)
        if std:
            assert float(jnp.std(start)) == pytest.approx(std, rel=5 / math.sqrt(2 * start.size)), path
        else:
            assert np.ptp(start) == 0, path
            assert float(start.ravel()[0]) == (1.0 if path.endswith("scale") else 0.0), path
    assert used == set(rules), "the page has rules for parameters that do not exist"


def test_decay_takes_the_same_share_at_every_width(tiny_config):
    """Without gradients a hidden matrix shrinks by ηλ a step at every width with it, by ηλ / m without."""

    def share(model, independent):
        config = OptimizerConfig(weight_decay=0.5, width_independent_decay=independent)
        optimizer = make_optimizer(config, ScheduleConfig(phases=(Phase(steps=1, end=0.1),)), model)
        params = {"layers": {"mlp": {"up_proj": {"kernel": jnp.ones((1, 4, 4))}}}}
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params, step=jnp.int32(0))
        return -float(jax.tree.leaves(updates)[0][0, 0, 0])

    widths = (32, 64, 128)  # the base is 32
    family = [at_width(tiny_config, width) for width in widths]
    assert [share(model, True) for model in family] == pytest.approx([0.05, 0.05, 0.05])
    assert [share(model, False) for model in family] == pytest.approx([0.05, 0.025, 0.0125])


def test_a_wider_member_of_a_family(tiny_config):
    wide = at_width(tiny_config, 256)
    assert (wide.d_model, wide.num_heads, wide.num_kv_heads, wide.d_ff) == (256, 16, 2, 512)
    assert wide.head_size == tiny_config.head_size
    assert at_width(tiny_config, 256, kv_heads="grow").num_kv_heads == 8
    assert at_width(wide, 64) == dataclasses.replace(tiny_config, head_dim=16)
    check_family([tiny_config, wide, dataclasses.replace(tiny_config, num_layers=16)])
    assert count_params(wide).non_embedding > 10 * count_params(tiny_config).non_embedding


def test_standard_parametrisation_is_the_same_training_at_the_base_width(tiny_config):
    base = at_width(tiny_config, 32)
    key = jax.random.key(0)
    jax.tree.map(
        np.testing.assert_array_equal, decoder.init_params(base, key), decoder.init_params(standard(base), key)
    )
    with pytest.raises(ConfigError, match=r"ModelConfig.dim_model_base = 0: this is standard parametrisation already"):
        standard(standard(base))


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (72, "num_heads = 4 at width 64 would be 4.5; must be a width at which it is whole"),
        (0, "at_width.d_model = 0"),
    ],
)
def test_widths_without_whole_heads_are_refused(tiny_config, width, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        at_width(tiny_config, d_model=width)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim_model_base": 64}, "ModelConfig.dim_model_base = 32 at width 64 and 64 at width 128"),
        ({"initializer_range": 0.02}, "ModelConfig.initializer_range = 0.1 at width 64 and 0.02"),
        ({"scale_emb": 1.0}, "ModelConfig.scale_emb = 12.0 at width 64 and 1.0"),
        ({"num_heads": 4, "head_dim": 32}, "ModelConfig.head_dim = 16 at width 64 and 32 at width 128"),
        ({"num_heads": 4}, "ModelConfig.num_heads = 4 at width 64 and 4 at width 128: must be in proportion"),
        ({"d_ff": 512}, "ModelConfig.d_ff = 128 at width 64 and 512 at width 128: must be in proportion"),
    ],
)
def test_models_between_which_nothing_transfers_are_refused(tiny_config, change, words):
    other = dataclasses.replace(at_width(tiny_config, 128), **change)
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_family([tiny_config, other])


def test_a_family_has_two_sizes(tiny_config):
    with pytest.raises(ConfigError, match="2 models of 1 size"):
        check_family([tiny_config, tiny_config])
