"""Multi-token prediction against the reports' equations written in plain PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, bind, init_params

LENGTH = 12


@pytest.fixture
def config(tiny_config: ModelConfig) -> ModelConfig:
    """MiMo's form (biases, untied, no multipliers) with a second MTP layer."""
    return dataclasses.replace(
        tiny_config,
        num_nextn_predict_layers=2,
        attention_bias=True,
        tie_word_embeddings=False,
        scale_emb=1.0,
        scale_depth=0.0,
        dim_model_base=0,
    )


def make(config: ModelConfig) -> tuple[Params, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), params)
    tokens = rng.integers(0, config.vocab_size, (2, LENGTH))
    return params, tokens, np.broadcast_to(np.arange(LENGTH), tokens.shape), np.ones_like(tokens)


def torch_mtp_layer(
    config: ModelConfig, params: Params, depth: int, hidden: torch.Tensor, next_tokens: np.ndarray
) -> torch.Tensor:
    """final_layernorm(Block(input_proj([hidden_layernorm(h) ; token_layernorm(Emb(next))]))), one row at a time."""
    p = {
        jax.tree_util.keystr(path, simple=True, separator="."): torch.tensor(np.asarray(leaf[depth]))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["mtp_layers"])
    }
    embedding = torch.tensor(np.asarray(params["embed_tokens"]["embedding"]))
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_size

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (config.d_model,), p[f"{name}.scale"], config.rms_norm_eps)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        """Multiplies x[i] + j·x[i + H/2] by exp(j·position·frequency)."""
        angles = torch.arange(LENGTH)[:, None] * config.rope.rope_theta ** (-torch.arange(0, width, 2) / width)
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], dim=-1)

    rows = []
    for row in range(len(next_tokens)):
        both = [norm(hidden[row], "hidden_layernorm"), norm(embedding[next_tokens[row]], "token_layernorm")]
        x = torch.cat(both, dim=-1) @ p["input_proj.kernel"]
        y = norm(x, "input_layernorm")
        q, k, v = (y @ p[f"self_attn.{n}_proj.kernel"] + p[f"self_attn.{n}_proj.bias"] for n in "qkv")
        q, k, v = (z.reshape(LENGTH, n, width).transpose(0, 1) for z, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
        attended = torch.nn.functional.scaled_dot_product_attention(
            rotate(q)[None], rotate(k)[None], v[None], is_causal=True, enable_gqa=True
        )[0]
        x = x + attended.transpose(0, 1).reshape(LENGTH, -1) @ p["self_attn.o_proj.kernel"]
        y = norm(x, "post_attention_layernorm")
        gate = torch.nn.functional.silu(y @ p["mlp.gate_proj.kernel"])
        x = x + (gate * (y @ p["mlp.up_proj.kernel"])) @ p["mlp.down_proj.kernel"]
        rows.append(norm(x, "final_layernorm"))
    return torch.stack(rows)


def test_two_layers_equal_plain_torch(config: ModelConfig) -> None:
    """Layer 1 feeds on what layer 0 gave, and on the token one further ahead."""
    params, tokens, positions, segment_ids = make(config)
    model = bind(config, params)
    ours = model(tokens, positions, segment_ids)
    theirs = torch.tensor(np.asarray(ours))
    for depth in range(2):
        next_tokens = np.roll(tokens, -1 - depth, axis=1)
        ours = model.mtp(ours, next_tokens, positions, segment_ids, depth)
        theirs = torch_mtp_layer(config, params, depth, theirs, next_tokens)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    head = torch.tensor(np.asarray(params["lm_head"]["kernel"]))
    np.testing.assert_allclose(model.logits(ours), theirs @ head, rtol=1e-5, atol=2e-5)


def test_every_parameter_of_both_layers_gets_a_gradient(config: ModelConfig) -> None:
    """A loss on the MTP layers alone moves all their parameters, and embedding, head and trunk through them."""
    params, tokens, positions, segment_ids = make(config)

    def mtp_loss(params: Params) -> jax.Array:
        model = bind(config, params)
        hidden, total = model(tokens, positions, segment_ids), jnp.zeros(())
        for depth in range(2):
            hidden = model.mtp(hidden, jnp.roll(tokens, -1 - depth, axis=1), positions, segment_ids, depth)
            log_probs = jax.nn.log_softmax(model.logits(hidden))
            targets = jnp.roll(tokens, -2 - depth, axis=1)
            total -= jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[:, : -2 - depth].mean()
        return total

    grads = jax.jit(jax.grad(mtp_loss))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert jnp.isfinite(grad).all(), name
        layers = grad if name.startswith(("layers/", "mtp_layers/")) else grad[None]
        for layer in layers:
            assert jnp.abs(layer).max() > 1e-6, name


def test_packed_documents_do_not_meet(config: ModelConfig) -> None:
    params, tokens, positions, _ = make(config)
    segment_ids = np.where(np.arange(LENGTH) < 5, 1, 2) * np.ones((2, 1), int)
    model = bind(config, params)
    hidden = jax.random.normal(jax.random.key(1), (2, LENGTH, config.d_model))
    out = model.mtp(hidden, tokens, positions, segment_ids, 0)
    changed = model.mtp(hidden.at[:, :5].add(1.0), tokens, positions, segment_ids, 0)
    np.testing.assert_array_equal(out[:, 5:], changed[:, 5:])
    assert (out[:, :5] != changed[:, :5]).any()


def test_multipliers_apply_to_the_mtp_layer(config: ModelConfig) -> None:
    """scale_depth and scale_emb are the same as a factor on the matrices that they follow."""
    scaled = dataclasses.replace(config, scale_depth=1.4, scale_emb=12.0)
    params, tokens, positions, segment_ids = make(config)
    hidden = jax.random.normal(jax.random.key(1), (2, LENGTH, config.d_model))
    factor = scaled.residual_multiplier
    assert factor == pytest.approx(1.4 / config.num_layers**0.5)
    mtp = params["mtp_layers"]
    by_hand = params | {
        "mtp_layers": mtp
        | {
            "self_attn": mtp["self_attn"] | {"o_proj": {"kernel": mtp["self_attn"]["o_proj"]["kernel"] * factor}},
            "mlp": mtp["mlp"] | {"down_proj": {"kernel": mtp["mlp"]["down_proj"]["kernel"] * factor}},
        },
        "embed_tokens": {"embedding": params["embed_tokens"]["embedding"] * 12.0},
    }
    np.testing.assert_allclose(
        bind(scaled, params).mtp(hidden, tokens, positions, segment_ids, 0),
        bind(config, by_hand).mtp(hidden, tokens, positions, segment_ids, 0),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("depth", [-1, 2])
def test_layers_that_do_not_exist_are_refused(config: ModelConfig, depth: int) -> None:
    params, tokens, positions, segment_ids = make(config)
    hidden = jnp.zeros((2, LENGTH, config.d_model))
    with pytest.raises(IndexError, match=f"depth = {depth}: must be below ModelConfig.num_nextn_predict_layers = 2"):
        bind(config, params).mtp(hidden, tokens, positions, segment_ids, depth)
