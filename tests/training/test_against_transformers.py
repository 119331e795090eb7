"""Training steps on a small Llama equal those of transformers and torch.optim.AdamW."""

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cpm_jax.modeling import decoder
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cpm_jax.training.schedules import make_schedule, wsd
from cpm_jax.training.train_state import state_from_params
from cpm_jax.training.train_step import make_train_step

STEPS = 8
CONFIG = ModelConfig(
    vocab_size=96,
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    d_ff=64,
    rms_norm_eps=1e-6,
    dtype="float32",
)


def their_name(path: tuple[str, ...], layer: int | None) -> str:
    """The name of a parameter in transformers, from its path in ours and the layer it is of."""
    module = ".".join(path[1:-1] if layer is not None else path[:-1])
    prefix = "" if path[0] == "lm_head" else "model."
    return f"{prefix}{'' if layer is None else f'layers.{layer}.'}{module}.weight"


def their_parameters(params):
    """Our parameters as a state dict: stacked layers apart, kernels transposed."""
    state = {}
    for keys, array in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = tuple(key.key for key in keys)
        stacked = path[0] == "layers"
        for layer, part in enumerate(array) if stacked else [(None, array)]:
            value = torch.tensor(np.asarray(part))
            state[their_name(path, layer)] = value.T.contiguous() if path[-1] == "kernel" else value
    return state


@pytest.fixture
def reference():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            rms_norm_eps=1e-6,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )


def test_losses_gradient_norms_and_weights_over_steps(reference, make_batch):
    params = decoder.init_params(CONFIG, jax.random.key(0))
    reference.load_state_dict(their_parameters(params), strict=True)
    schedule = wsd(peak_lr=3e-3, train_steps=STEPS, warmup_steps=2, decay_steps=2)
    optimizer = make_optimizer(OptimizerConfig(max_grad_norm=0.5), schedule, CONFIG)
    decayed = [p for p in reference.parameters() if p.ndim == 2]
    others = [p for p in reference.parameters() if p.ndim != 2]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    state, step, lr = state_from_params(params, optimizer), make_train_step(CONFIG, optimizer), make_schedule(schedule)

    for i in range(STEPS):
        batch = make_batch(seed=i, rows=2, length=16, vocab=96, sources=1)
        # One document a row, as transformers takes it; the weights choose some targets.
        batch |= {
            "segment_ids": np.ones((2, 16), np.int32),
            "positions": np.tile(np.arange(16, dtype=np.int32), (2, 1)),
        }
        state, metrics = step(state, batch)

        logits = reference(torch.tensor(batch["tokens"]).long()).logits
        nll = torch.nn.functional.cross_entropy(
            logits.reshape(-1, 96), torch.tensor(batch["targets"]).long().reshape(-1), reduction="none"
        )
        weights = torch.tensor(batch["loss_weights"]).reshape(-1)
        loss = (nll * weights).sum() / weights.sum()
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        assert norm > 0.5, "the clipping must be tried too"
        for group in adamw.param_groups:
            group["lr"] = float(lr(i))
        adamw.step()
        assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
        assert float(metrics["grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)

    theirs = reference.state_dict()
    for name, ours in their_parameters(state.params).items():
        np.testing.assert_allclose(ours, theirs[name], atol=2e-5, err_msg=name)
