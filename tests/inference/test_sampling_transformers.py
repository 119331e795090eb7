"""Sampling against `transformers`' logits processors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cpm_jax.inference.sampling import (
    SamplingConfig,
    apply_min_p,
    apply_repetition_penalty,
    apply_top_k,
    apply_top_p,
    process_logits,
)

BATCH, VOCAB = 5, 97


def random_logits(seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (BATCH, VOCAB)).astype(np.float32)


def tied_logits(seed: int = 1) -> np.ndarray:
    """Few distinct values, so that every cut falls among equal logits."""
    return np.random.default_rng(seed).integers(-2, 3, (BATCH, VOCAB)).astype(np.float32)


def masked_logits(seed: int = 2) -> np.ndarray:
    logits = random_logits(seed)
    logits[:, ::2] = -np.inf
    logits[0] = -np.inf
    logits[0, 7] = 0.0
    return logits


ALL_LOGITS = [random_logits(), random_logits(3, 0.1), tied_logits(), masked_logits()]


def assert_equal_to(processor, logits: np.ndarray, ours: jax.Array, input_ids: np.ndarray | None = None) -> None:
    ids = torch.zeros((BATCH, 1), dtype=torch.long) if input_ids is None else torch.from_numpy(input_ids)
    theirs = processor(ids, torch.from_numpy(logits.copy())).numpy()
    if len(np.unique(logits)) < 10:
        # torch's sort leaves open which of equal logits comes first, so only the logits that stay can be compared.
        ours, theirs = np.sort(ours, axis=-1), np.sort(theirs, axis=-1)
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("logits", ALL_LOGITS, ids=["wide", "flat", "ties", "masked"])
class TestEqualsTransformers:
    @pytest.mark.parametrize("k", [1, 2, 10, VOCAB - 1, VOCAB, VOCAB + 100])
    def test_top_k(self, logits, k):
        assert_equal_to(TopKLogitsWarper(k), logits, apply_top_k(jnp.asarray(logits), k))

    @pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
    def test_top_p(self, logits, p):
        assert_equal_to(TopPLogitsWarper(p), logits, apply_top_p(jnp.asarray(logits), p))

    @pytest.mark.parametrize("p", [0.0, 0.01, 0.2, 1.0])
    def test_min_p(self, logits, p):
        assert_equal_to(MinPLogitsWarper(p), logits, apply_min_p(jnp.asarray(logits), p))

    @pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
    def test_repetition_penalty(self, logits, penalty):
        input_ids = np.random.default_rng(4).integers(0, VOCAB, (BATCH, 30))
        seen = np.zeros((BATCH, VOCAB), bool)
        np.put_along_axis(seen, input_ids, True, axis=1)
        ours = apply_repetition_penalty(jnp.asarray(logits), jnp.asarray(seen), penalty)
        assert_equal_to(RepetitionPenaltyLogitsProcessor(penalty), logits, ours, input_ids)

    def test_all_together_in_order(self, logits):
        config = SamplingConfig(temperature=0.6, top_k=40, top_p=0.8, min_p=0.05, repetition_penalty=1.2)
        input_ids = np.random.default_rng(5).integers(0, VOCAB, (BATCH, 30))
        seen = np.zeros((BATCH, VOCAB), bool)
        np.put_along_axis(seen, input_ids, True, axis=1)
        theirs = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(1.2),
                TemperatureLogitsWarper(0.6),
                TopKLogitsWarper(40),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.05),
            ]
        )
        assert_equal_to(theirs, logits, process_logits(jnp.asarray(logits), jnp.asarray(seen), config), input_ids)

    def test_defaults_change_nothing(self, logits):
        np.testing.assert_array_equal(process_logits(jnp.asarray(logits), None, SamplingConfig()), logits)
