"""The decoder against `transformers`, on random weights and with every parameter random."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from cpm_jax.modeling.config import ModelConfig, RopeConfig
from cpm_jax.modeling.decoder import Params, bind, init_params

BASE = ModelConfig(
    vocab_size=97,
    num_layers=2,
    d_model=48,
    num_heads=8,
    num_kv_heads=2,
    d_ff=80,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    initializer_range=0.1,
    dtype="float32",
)


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Every leaf random, norm scales and biases too, so that none of them could be forgotten unnoticed."""
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), params)


def to_torch(config: ModelConfig, params: Params) -> dict[str, torch.Tensor]:
    """The same numbers under Hugging Face's names, with matrices as [out, in]."""
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        array = np.asarray(leaf)
        last = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}[names[-1]]
        if names[0] in ("layers", "mtp_layers"):
            for index, layer in enumerate(array):
                layer = layer.T if names[-1] == "kernel" else layer
                state[".".join(["model", names[0], str(index), *names[1:-1], last])] = torch.tensor(layer.copy())
        elif names[0] == "lm_head":
            state["lm_head.weight"] = torch.tensor(array.T.copy())
        else:
            state[f"model.{names[0]}.{last}"] = torch.tensor(array)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def hf_arguments(config: ModelConfig) -> dict:
    rope = {"rope_type": "default", "rope_theta": config.rope.rope_theta}
    if config.rope.is_longrope:
        rope |= {
            "rope_type": "longrope",
            "short_factor": list(config.rope.short_factor),
            "long_factor": list(config.rope.long_factor),
            "original_max_position_embeddings": config.rope.original_max_position_embeddings,
        }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": rope,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }


def hf_logits(model: torch.nn.Module, config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    missing, unexpected = model.load_state_dict(to_torch(config, params), strict=False)
    assert not unexpected
    assert not missing
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


def our_logits(config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    @jax.jit
    def forward(params: Params, tokens: jax.Array) -> jax.Array:
        model = bind(config, params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.logits(model(tokens, positions, jnp.ones_like(tokens)))

    return np.asarray(forward(params, tokens))


def tokens_of(config: ModelConfig, batch: int = 2, length: int = 24) -> np.ndarray:
    return np.random.default_rng(1).integers(0, config.vocab_size, (batch, length))


def check(model_class: type, config: ModelConfig, hf_config: "transformers.PretrainedConfig", length: int = 24) -> None:
    params, tokens = random_params(config), tokens_of(config, length=length)
    theirs = hf_logits(model_class(hf_config), config, params, tokens)
    np.testing.assert_allclose(our_logits(config, params, tokens), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_kv_heads", "tied"), [(8, False), (8, True), (4, False), (2, True), (1, False), (1, True)]
)
def test_llama(num_kv_heads: int, tied: bool) -> None:
    """Groups of 1 (plain multi-head), 2, 4 and 8 (multi-query)."""
    config = dataclasses.replace(BASE, tie_word_embeddings=tied, num_kv_heads=num_kv_heads)
    check(transformers.LlamaForCausalLM, config, transformers.LlamaConfig(**hf_arguments(config)))


def test_llama_with_heads_wider_than_the_model() -> None:
    """N·H is not d_model; another RoPE base."""
    config = dataclasses.replace(BASE, head_dim=16, num_heads=16, num_kv_heads=2, rope=RopeConfig(rope_theta=640_000.0))
    check(transformers.LlamaForCausalLM, config, transformers.LlamaConfig(**hf_arguments(config)))


def test_qwen2() -> None:
    """Biases on q, k and v, as in MiMo."""
    config = dataclasses.replace(BASE, attention_bias=True)
    check(transformers.Qwen2ForCausalLM, config, transformers.Qwen2Config(**hf_arguments(config)))


LONGROPE = RopeConfig(
    short_factor=(1.0, 1.1, 1.3),
    long_factor=(1.2, 2.0, 5.0),
    original_max_position_embeddings=16,
)


@pytest.mark.parametrize(
    ("rope", "length"),
    [(RopeConfig(), 24), (LONGROPE, 16), (LONGROPE, 17), (LONGROPE, 64)],
    ids=["plain", "short", "long", "longer"],
)
def test_granite(rope: RopeConfig, length: int) -> None:
    """MiniCPM's multipliers under Granite's names, with plain RoPE and both regimes of LongRoPE."""
    config = dataclasses.replace(
        BASE, tie_word_embeddings=True, scale_emb=12.0, scale_depth=1.4, dim_model_base=16, rope=rope
    )
    hf_config = transformers.GraniteConfig(
        **hf_arguments(config),
        embedding_multiplier=config.scale_emb,
        residual_multiplier=config.scale_depth / math.sqrt(config.num_layers),
        logits_scaling=config.d_model / config.dim_model_base,
        attention_multiplier=1 / math.sqrt(config.head_size),
    )
    check(transformers.GraniteForCausalLM, config, hf_config, length)
