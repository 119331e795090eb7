"""The parameter tree, initial values, packing, and the ways of running the layers against each other."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.common.sharding import RULES
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, abstract_params, bind, init_params, param_axes

LENGTH = 24
draw = jax.jit(init_params, static_argnums=0)


def paths(tree: Params) -> list[str]:
    return [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.fixture
def everything(tiny_config: ModelConfig) -> ModelConfig:
    """All optional parameters at once."""
    return dataclasses.replace(tiny_config, attention_bias=True, tie_word_embeddings=False, num_nextn_predict_layers=1)


# ---------------------------------------------------------------- parameters


def test_tree_is_the_documented_one(everything: ModelConfig) -> None:
    """docs/architecture.md, "Parameters"."""
    c, kv, heads = (
        everything,
        everything.num_kv_heads * everything.head_size,
        everything.num_heads * everything.head_size,
    )
    layer = {
        "input_layernorm/scale": (c.d_model,),
        "self_attn/q_proj/kernel": (c.d_model, heads),
        "self_attn/q_proj/bias": (heads,),
        "self_attn/k_proj/kernel": (c.d_model, kv),
        "self_attn/k_proj/bias": (kv,),
        "self_attn/v_proj/kernel": (c.d_model, kv),
        "self_attn/v_proj/bias": (kv,),
        "self_attn/o_proj/kernel": (heads, c.d_model),
        "post_attention_layernorm/scale": (c.d_model,),
        "mlp/gate_proj/kernel": (c.d_model, c.d_ff),
        "mlp/up_proj/kernel": (c.d_model, c.d_ff),
        "mlp/down_proj/kernel": (c.d_ff, c.d_model),
    }
    mtp = layer | {
        "token_layernorm/scale": (c.d_model,),
        "hidden_layernorm/scale": (c.d_model,),
        "final_layernorm/scale": (c.d_model,),
        "input_proj/kernel": (2 * c.d_model, c.d_model),
    }
    expected = {
        "embed_tokens/embedding": (c.vocab_size, c.d_model),
        "norm/scale": (c.d_model,),
        "lm_head/kernel": (c.d_model, c.vocab_size),
    }
    expected |= {f"layers/{name}": (c.num_layers, *shape) for name, shape in layer.items()}
    expected |= {f"mtp_layers/{name}": (1, *shape) for name, shape in mtp.items()}
    tree = abstract_params(c)
    assert dict(zip(paths(tree), (leaf.shape for leaf in jax.tree.leaves(tree)), strict=True)) == expected


def test_tied_models_have_no_head(tiny_config: ModelConfig) -> None:
    assert set(abstract_params(tiny_config)) == {"embed_tokens", "layers", "norm"}
    params = draw(tiny_config, jax.random.key(0))
    kernel = bind(tiny_config, params).lm_head_kernel()
    np.testing.assert_array_equal(kernel, params["embed_tokens"]["embedding"].T)


def test_real_params_match_the_abstract_ones_and_the_axes(everything: ModelConfig) -> None:
    config = dataclasses.replace(everything, param_dtype="bfloat16")
    params, abstract = draw(config, jax.random.key(0)), abstract_params(config)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    for real, declared in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert (real.shape, real.dtype) == (declared.shape, declared.dtype)
        assert real.dtype == jnp.bfloat16

    def check(leaf: jax.Array, axes: tuple[str, ...]) -> None:
        assert len(axes) == leaf.ndim
        assert set(axes) <= set(RULES)

    axes = param_axes(config)
    jax.tree.map(check, params, axes)
    assert axes["layers"]["self_attn"]["q_proj"]["kernel"] == ("layers", "embed", "heads")
    assert axes["layers"]["mlp"]["down_proj"]["kernel"] == ("layers", "mlp", "embed")
    assert axes["embed_tokens"]["embedding"] == ("vocab", "embed")


def test_initial_values_follow_mup(everything: ModelConfig) -> None:
    """MiniCPM's table: hidden matrices 0.1 / sqrt(d / d_base), embedding and head 0.1, norm scales 1, biases 0."""
    config = dataclasses.replace(everything, d_model=256, dim_model_base=64, vocab_size=512, initializer_range=0.1)
    params = draw(config, jax.random.key(0))
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        if path.endswith("scale"):
            assert (leaf == 1).all(), path
        elif path.endswith("bias"):
            assert (leaf == 0).all(), path
        else:
            std = 0.1 if path.startswith(("embed_tokens", "lm_head")) else 0.1 / math.sqrt(256 / 64)
            assert leaf.std() == pytest.approx(std, rel=0.02), path
            assert abs(leaf.mean()) < 4 * std / math.sqrt(leaf.size), path


def test_standard_initial_values(everything: ModelConfig) -> None:
    config = dataclasses.replace(everything, dim_model_base=0, d_model=256, initializer_range=0.02)
    params = draw(config, jax.random.key(0))
    assert params["layers"]["mlp"]["up_proj"]["kernel"].std() == pytest.approx(0.02, rel=0.02)


def test_initial_values_do_not_depend_on_other_parameters(tiny_config: ModelConfig) -> None:
    """An MTP layer or a bias more leaves the rest of the model as it was; no two matrices are alike."""
    more = dataclasses.replace(tiny_config, num_nextn_predict_layers=1, attention_bias=True)
    few, many = (draw(config, jax.random.key(3)) for config in (tiny_config, more))
    for path, leaf in jax.tree_util.tree_leaves_with_path(few):
        np.testing.assert_array_equal(functools.reduce(lambda tree, entry: tree[entry.key], path, many), leaf)
    assert not np.allclose(many["layers"]["mlp"]["up_proj"]["kernel"], many["layers"]["mlp"]["gate_proj"]["kernel"])
    assert not np.allclose(few["layers"]["mlp"]["up_proj"]["kernel"][0], few["layers"]["mlp"]["up_proj"]["kernel"][1])


# ------------------------------------------------------------------- running


def batch(config: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Two rows of two documents and padding."""
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, config.vocab_size)
    lengths = [(7, 13), (13, 7)]
    positions = np.zeros((2, LENGTH), np.int32)
    segment_ids = np.zeros((2, LENGTH), np.int32)
    for row, (first, second) in enumerate(lengths):
        segment_ids[row, :first], segment_ids[row, first : first + second] = 1, 2
        positions[row, :first], positions[row, first : first + second] = np.arange(first), np.arange(second)
    return tokens, jnp.asarray(positions), jnp.asarray(segment_ids)


def test_packed_rows_equal_separate_documents(tiny_config: ModelConfig) -> None:
    params = draw(tiny_config, jax.random.key(0))
    tokens, positions, segment_ids = batch(tiny_config)

    @jax.jit
    def logits(tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        model = bind(tiny_config, params)
        return model.logits(model(tokens, positions, segment_ids))

    packed = logits(tokens, positions, segment_ids)
    for row in range(2):
        for document in (1, 2):
            at = np.flatnonzero(segment_ids[row] == document)
            alone = tokens[row, at][None]
            separate = logits(alone, jnp.arange(len(at))[None], jnp.ones_like(alone))
            np.testing.assert_allclose(packed[row, at], separate[0], rtol=1e-5, atol=1e-5)
    assert np.isfinite(packed).all()


def test_later_tokens_do_not_change_earlier_ones(tiny_config: ModelConfig) -> None:
    params = draw(tiny_config, jax.random.key(0))
    tokens, positions, segment_ids = batch(tiny_config)
    model = jax.jit(bind(tiny_config, params).__call__)
    hidden = model(tokens, positions, segment_ids)
    changed = model(tokens.at[0, 5].add(1), positions, segment_ids)
    np.testing.assert_array_equal(hidden[0, :5], changed[0, :5])
    assert (hidden[0, 5:7] != changed[0, 5:7]).any(axis=-1).all()
    np.testing.assert_array_equal(hidden[0, 7:], changed[0, 7:])  # the next document
    np.testing.assert_array_equal(hidden[1], changed[1])


@functools.cache
def loss_and_grads(config: ModelConfig) -> tuple[jax.Array, Params]:
    tokens, positions, segment_ids = batch(config)

    def loss(params: Params) -> jax.Array:
        model = bind(config, params)
        hidden = model(tokens, positions, segment_ids)
        ahead = model.mtp(hidden, jnp.roll(tokens, -1, axis=1), positions, segment_ids, 0)
        return sum(jnp.square(jax.nn.log_softmax(model.logits(x))).mean() for x in (hidden, ahead))

    return jax.jit(jax.value_and_grad(loss))(draw(config, jax.random.key(0)))


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [
        (False, "none"),
        (True, "full"),
        pytest.param(True, "dots", marks=pytest.mark.slow),
        pytest.param(False, "dots", marks=pytest.mark.slow),
        pytest.param(False, "full", marks=pytest.mark.slow),
    ],
)
def test_scan_loop_and_remat_give_equal_losses_and_gradients(
    tiny_config: ModelConfig, scan_layers: bool, remat: str
) -> None:
    base = dataclasses.replace(tiny_config, num_nextn_predict_layers=1)
    loss, grads = loss_and_grads(base)
    config = dataclasses.replace(base, scan_layers=scan_layers, remat=remat)
    other_loss, other_grads = loss_and_grads(config)
    np.testing.assert_allclose(loss, other_loss, rtol=1e-6)
    for ours, other in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-5, atol=1e-6 * float(jnp.abs(ours).max()))


@pytest.mark.parametrize("scan_layers", [True, False], ids=["scan", "loop"])
def test_remat_keeps_less_for_the_backward_pass(tiny_config: ModelConfig, scan_layers: bool) -> None:
    """Residuals that JAX saves between the passes: none > dots > full."""
    tokens, positions, segment_ids = batch(tiny_config)
    sizes = []
    for remat in ("none", "dots", "full"):
        config = dataclasses.replace(tiny_config, remat=remat, scan_layers=scan_layers)

        def forward(params: Params, config: ModelConfig = config) -> jax.Array:
            return bind(config, params)(tokens, positions, segment_ids)

        _, backward = jax.eval_shape(functools.partial(jax.vjp, forward), abstract_params(config))
        sizes.append(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(backward)))
    assert sizes[0] > 1.2 * sizes[1] > 1.2 * 1.2 * sizes[2], sizes


def test_bfloat16_compute_keeps_float32_where_it_matters(tiny_config: ModelConfig) -> None:
    config = dataclasses.replace(tiny_config, dtype="bfloat16")
    params = draw(config, jax.random.key(0))
    tokens, positions, segment_ids = batch(config)

    @functools.partial(jax.jit, static_argnums=1)
    def logits(params: Params, config: ModelConfig) -> jax.Array:
        model = bind(config, params)
        hidden = model(tokens, positions, segment_ids)
        assert hidden.dtype == config.dtype
        return model.logits(hidden)

    narrow, wide = logits(params, config), logits(params, tiny_config)
    assert narrow.dtype == jnp.float32
    assert len(np.unique(np.asarray(narrow))) > len(np.unique(np.asarray(narrow.astype(jnp.bfloat16))))
    assert jnp.abs(narrow - wide).max() < 0.05 * jnp.abs(wide).max()
    grads = jax.grad(lambda params: jax.nn.log_softmax(logits(params, config)).var())(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_mup_scales_the_input_of_the_head(tiny_config: ModelConfig) -> None:
    model = bind(tiny_config, draw(tiny_config, jax.random.key(0)))
    hidden = jax.random.normal(jax.random.key(1), (1, 2, tiny_config.d_model))
    np.testing.assert_allclose(model.head_inputs(hidden), hidden / 2, rtol=1e-6)  # d_model 64, dim_model_base 32
    np.testing.assert_allclose(model.logits(hidden), hidden / 2 @ model.lm_head_kernel(), rtol=1e-4, atol=1e-5)
