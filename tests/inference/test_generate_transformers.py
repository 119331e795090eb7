"""Greedy text of random models against `transformers`' own generation, batched, for prompts of many lengths."""

import jax
import numpy as np
import pytest
import torch
import transformers

from cpm_jax.inference.decode_loop import NO_TOKEN, extend, start
from cpm_jax.inference.sampling import SamplingConfig
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params, init_params

PROMPT_LENGTHS = [1, 2, 5, 17, 31, 64, 130]
NEW_TOKENS = 60
EOS = 3

LLAMA = ModelConfig(
    vocab_size=203,
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    d_ff=96,
    max_position_embeddings=256,
    initializer_range=0.2,
    dtype="float32",
)
# MiniCPM's multipliers are Granite's by other names.
GRANITE = ModelConfig(
    vocab_size=203,
    num_layers=2,
    d_model=64,
    num_heads=8,
    num_kv_heads=1,
    d_ff=96,
    max_position_embeddings=256,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=32,
    initializer_range=0.3,
    dtype="float32",
)


def make_theirs(config: ModelConfig, params: Params) -> transformers.PreTrainedModel:
    arguments = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.rope_theta},
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    if config.scale_depth:
        model = transformers.GraniteForCausalLM(
            transformers.GraniteConfig(
                **arguments,
                embedding_multiplier=config.scale_emb,
                residual_multiplier=config.residual_multiplier,
                logits_scaling=config.width_multiplier,
                attention_multiplier=config.head_size**-0.5,
            )
        )
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**arguments))
    state = {
        "model.embed_tokens.weight": params["embed_tokens"]["embedding"],
        "model.norm.weight": params["norm"]["scale"],
        "lm_head.weight": params["lm_head"]["kernel"].T,
    }
    for path, stacked in jax.tree_util.tree_leaves_with_path(params["layers"]):
        name = ".".join(key.key for key in path[:-1])
        for index, leaf in enumerate(stacked):
            state[f"model.layers.{index}.{name}.weight"] = leaf.T if path[-1].key == "kernel" else leaf
    model.load_state_dict({name: torch.tensor(np.array(array)) for name, array in state.items()})
    return model.eval()


def their_tokens(model: transformers.PreTrainedModel, prompts: list[list[int]], **options) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, **options)
    rows = out[:, width:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def our_tokens(
    config: ModelConfig, params: Params, prompts: list[list[int]], sampling: SamplingConfig
) -> list[list[int]]:
    state = start(
        params,
        prompts,
        config=config,
        sampling=sampling,
        max_new_tokens=NEW_TOKENS,
        seed=0,
        indices=range(len(prompts)),
        prefill_chunks=(32, 8),
    )
    rows: list[list[int]] = [[] for _ in prompts]
    while not np.asarray(state.finished).all():
        state, new = extend(params, state, np.array([EOS]), num_tokens=16, config=config, sampling=sampling)
        for row, tokens in zip(rows, np.asarray(new).tolist(), strict=True):
            row += [token for token in tokens if token != NO_TOKEN]
    return rows


@pytest.mark.parametrize("config", [LLAMA, GRANITE], ids=["llama", "granite"])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_tokens_equal_transformers(config, penalty):
    params = init_params(config, jax.random.key(1))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, config.vocab_size, length).tolist() for length in PROMPT_LENGTHS]
    model = make_theirs(config, params)
    theirs = their_tokens(model, prompts, repetition_penalty=penalty)
    assert max(map(len, theirs)) == NEW_TOKENS
    assert min(len(set(row)) / len(row) for row in theirs) > 0.3  # no model that says the same token again and again
    sampling = SamplingConfig(temperature=0.0, repetition_penalty=penalty)
    assert our_tokens(config, params, prompts, sampling) == theirs
