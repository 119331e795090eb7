"""The draw: what it may depend on, and that it follows the distribution."""

import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.inference.sampling import SamplingConfig, apply_top_p, sample, sequence_keys

BATCH, VOCAB = 5, 97


def random_logits() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3.0, (BATCH, VOCAB)).astype(np.float32)


def draw(logits: np.ndarray, config: SamplingConfig, indices: list[int], positions: list[int], seed: int = 0):
    keys = sequence_keys(seed, jnp.asarray(indices))
    return np.asarray(sample(jnp.asarray(logits), None, keys, jnp.asarray(positions), config))


def test_top_p_keeps_the_first_of_equal_logits():
    np.testing.assert_array_equal(apply_top_p(jnp.zeros((1, 4)), 0.5), [[0, 0, -np.inf, -np.inf]])


def test_temperature_zero_takes_the_largest_logit():
    logits = random_logits()
    config = SamplingConfig(temperature=0.0, top_k=3, top_p=0.1, min_p=0.9)
    np.testing.assert_array_equal(draw(logits, config, list(range(BATCH)), [0] * BATCH), logits.argmax(-1))


def test_temperature_zero_still_penalises_repetition():
    logits = np.array([[2.0, 1.9, -1.0]], np.float32)
    seen = jnp.array([[True, False, False]])
    config = SamplingConfig(temperature=0.0, repetition_penalty=1.5)
    assert sample(jnp.asarray(logits), seen, sequence_keys(0, jnp.array([0])), jnp.array([1]), config) == 1


def test_a_draw_does_not_depend_on_the_other_rows():
    config = SamplingConfig(temperature=0.9, top_k=50, top_p=0.95)
    logits = random_logits()
    together = draw(logits, config, [3, 1, 4, 15, 9], [7, 2, 7, 1, 8])
    for row, (index, position) in enumerate([(3, 7), (1, 2), (4, 7), (15, 1), (9, 8)]):
        alone = draw(logits[row : row + 1], config, [index], [position])
        assert alone[0] == together[row]


def test_seed_sequence_and_position_each_change_the_draw():
    flat = np.zeros((1, 10_000), np.float32)
    base = draw(flat, SamplingConfig(), [0], [0], seed=0)
    assert base != draw(flat, SamplingConfig(), [0], [0], seed=1)
    assert base != draw(flat, SamplingConfig(), [1], [0], seed=0)
    assert base != draw(flat, SamplingConfig(), [0], [1], seed=0)


def test_draws_follow_the_distribution():
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    count = 20_000
    logits = np.tile(np.log(probabilities).astype(np.float32), (count, 1))
    drawn = draw(logits, SamplingConfig(), list(range(count)), [0] * count)
    frequencies = np.bincount(drawn, minlength=4) / count
    # Five standard deviations of a binomial proportion.
    np.testing.assert_array_less(abs(frequencies - probabilities), 5 * np.sqrt(0.25 / count))


def test_ruled_out_tokens_are_never_drawn():
    count = 2_000
    logits = np.tile(np.log([0.5, 0.3, 0.15, 0.05]).astype(np.float32), (count, 1))
    for config, allowed in [
        (SamplingConfig(top_k=2), {0, 1}),
        (SamplingConfig(top_p=0.9), {0, 1, 2}),
        (SamplingConfig(min_p=0.5), {0, 1}),
    ]:
        assert set(draw(logits, config, list(range(count)), [0] * count)) == allowed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("top_k", 1.5),
    ],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ConfigError, match=f"SamplingConfig.{field} = {value}"):
        SamplingConfig(**{field: value})
