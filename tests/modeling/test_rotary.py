"""Angles against float64 closed forms at long positions."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpm_jax.modeling.config import ModelConfig, RopeConfig
from cpm_jax.modeling.rotary import apply_rotary, attention_factor, rotation

ReadModel = Callable[[str, str], ModelConfig]


def exact_angles(config: ModelConfig, positions: np.ndarray, factors: tuple[float, ...]) -> np.ndarray:
    half = config.head_size // 2
    exponents = np.arange(half) * 2 / config.head_size
    frequencies = 1 / (np.array(factors or [1.0] * half) * config.rope.rope_theta**exponents)
    return positions[..., None].astype(np.float64) * frequencies


@pytest.mark.parametrize(
    ("arch", "size", "length"),
    [
        ("minicpm4", "minicpm4_8b", 32_768),
        ("minicpm4", "minicpm4_0p5b", 32_768),
        ("minicpm4_128k", "minicpm4_8b", 65_536),
        ("minicpm4_128k", "minicpm4_8b", 131_072),
        ("internlm2", "internlm2_7b", 262_144),
        ("mimo", "mimo_7b", 1_048_576),
    ],
)
def test_exact_at_long_positions(read_model: ReadModel, arch: str, size: str, length: int) -> None:
    config = read_model(arch, size)
    positions = np.array([[0, 1, 2, 1000, 4095, length // 2 + 1, length - 2, length - 1]])
    angles = exact_angles(config, positions, config.rope.long_factor)
    ours = jax.jit(lambda p: rotation(config, p, length))(positions)
    np.testing.assert_allclose(ours.cos, np.cos(angles), rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.sin, np.sin(angles), rtol=0, atol=1e-6)


def test_float32_products_would_not_be_exact(read_model: ReadModel) -> None:
    """The reason for the integer arithmetic: what the test above asks for is not had for free."""
    config = read_model("minicpm4_128k", "minicpm4_8b")
    position = np.array([[131_071]])
    angles = exact_angles(config, position, config.rope.long_factor)
    single = np.float32(131_071) * exact_angles(config, np.array([[1]]), config.rope.long_factor).astype(np.float32)
    assert np.abs(np.cos(single) - np.cos(angles)).max() > 1e-4


def test_length_chooses_the_factors(tiny_config: ModelConfig) -> None:
    short, long = (1.0,) * 8, tuple(float(x) for x in range(2, 10))
    rope = RopeConfig(short_factor=short, long_factor=long, original_max_position_embeddings=64, attention_factor=1.0)
    config = dataclasses.replace(tiny_config, rope=rope)
    positions = np.arange(10)[None]
    for length, factors in ((64, short), (65, long)):
        np.testing.assert_allclose(
            rotation(config, positions, length).sin, np.sin(exact_angles(config, positions, factors)), atol=1e-6
        )


def test_attention_factor(read_model: ReadModel, tiny_config: ModelConfig) -> None:
    factors = (1.0,) * 8
    rope = RopeConfig(short_factor=factors, long_factor=factors, original_max_position_embeddings=32_768)
    extended = dataclasses.replace(tiny_config, rope=rope, max_position_embeddings=131_072)
    assert attention_factor(extended) == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32_768)))
    assert attention_factor(dataclasses.replace(extended, max_position_embeddings=32_768)) == 1.0
    assert attention_factor(dataclasses.replace(extended, max_position_embeddings=4096)) == 1.0
    fixed = dataclasses.replace(rope, attention_factor=1.25)
    assert attention_factor(dataclasses.replace(extended, rope=fixed)) == 1.25
    assert attention_factor(tiny_config) == 1.0
    # MiniCPM4's published instructions for 128K leave max_position_embeddings, and so the factor, as they were.
    assert attention_factor(read_model("minicpm4_128k", "minicpm4_8b")) == 1.0


def test_products_depend_on_distance_alone(tiny_config: ModelConfig) -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 2, 1, 16))

    def score(start: int) -> jax.Array:
        angles = rotation(tiny_config, jnp.array([[start, start + 37]]), 256)
        return (apply_rotary(q, angles)[0, 1] * apply_rotary(k, angles)[0, 0]).sum()

    np.testing.assert_allclose(score(0), score(123_456), rtol=1e-5)
