"""Angles against float64 closed forms at long positions."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cpm_jax.checkpoints.hf_config import LAYOUTS, write_config
from cpm_jax.modeling.config import ModelConfig, RopeConfig
from cpm_jax.modeling.rotary import apply_rotary, attention_factor, inverse_frequencies, rotation

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


def yarn_frequency(
    pair: int, width: int, theta: float, factor: float, original: int, fast: float, slow: float
) -> float:
    """One frequency of YaRN by hand, with the ends of the ramp rounded outwards."""
    ends = [width * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (fast, slow)]
    low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), width - 1)
    interpolated = min(max((pair - low) / (high - low), 0.0), 1.0)
    frequency = theta ** (-2 * pair / width)
    return frequency * (1 - interpolated) + frequency / factor * interpolated


@pytest.mark.parametrize(
    ("theta", "factor", "original", "fast", "slow"),
    [(1e6, 4.0, 32_768, 32.0, 1.0), (1e4, 40.0, 4096, 32.0, 1.0), (640_000.0, 2.0, 32_768, 16.0, 2.0)],
)
def test_yarn_at_64k(
    tiny_config: ModelConfig, theta: float, factor: float, original: int, fast: float, slow: float
) -> None:
    """Qwen2's, DeepSeek's and other constants, against the formula in float64, attention factor included."""
    rope = RopeConfig(
        rope_theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
    )
    config = dataclasses.replace(tiny_config, rope=rope, head_dim=128, max_position_embeddings=65_536)
    positions = np.array([[0, 1, 4095, 32_767, 32_768, 40_001, 65_534, 65_535]])
    frequencies = np.array([yarn_frequency(pair, 128, theta, factor, original, fast, slow) for pair in range(64)])
    assert (np.diff(frequencies) < 0).all()
    angles = positions[..., None] * frequencies
    temperature = 0.1 * math.log(factor) + 1
    ours = jax.jit(lambda p: rotation(config, p, 65_536))(positions)
    np.testing.assert_allclose(ours.cos, np.cos(angles) * temperature, rtol=0, atol=2e-6)
    np.testing.assert_allclose(ours.sin, np.sin(angles) * temperature, rtol=0, atol=2e-6)


@pytest.mark.parametrize("length", [32, 64, 65, 200])
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(),
        RopeConfig(scaling="linear", factor=4.0),
        RopeConfig(scaling="dynamic", factor=3.0, original_max_position_embeddings=64),
        RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=64),
        RopeConfig(scaling="yarn", factor=4.0, original_max_position_embeddings=64, truncate=False, beta_fast=8.0),
        RopeConfig(scaling="yarn", factor=2.0, original_max_position_embeddings=64, attention_factor=1.5),
        RopeConfig(
            scaling="llama3",
            rope_theta=5e5,
            factor=8.0,
            original_max_position_embeddings=64,
            low_freq_factor=1.5,
            high_freq_factor=5.0,
        ),
        RopeConfig(short_factor=(1.0,) * 8, long_factor=tuple(range(2, 10)), original_max_position_embeddings=64),
    ],
    ids=lambda rope: rope.rope_type,
)
def test_frequencies_of_transformers(tiny_config: ModelConfig, rope: RopeConfig, length: int) -> None:
    """The functions by which transformers makes them, in float32, and its factor on cos and sin."""
    config = dataclasses.replace(tiny_config, rope=rope, max_position_embeddings=256)
    entries = write_config(
        dataclasses.replace(config, scale_emb=1.0, scale_depth=0.0, dim_model_base=0), LAYOUTS["llama"]
    )
    theirs = transformers.LlamaConfig(**entries)
    if rope.rope_type == "default":
        frequencies, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope.rope_type](theirs, "cpu", seq_len=length)
    np.testing.assert_allclose(inverse_frequencies(config, length), frequencies.numpy(), rtol=2e-6)
    assert attention_factor(config) == pytest.approx(factor)


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
