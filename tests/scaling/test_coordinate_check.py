"""Flat under µP, climbing under standard parametrisation; and the sizes are those of the model itself."""

import dataclasses
import itertools
import math
from typing import get_args

import jax
import numpy as np
import pytest

from cpm_jax.common.config import ConfigError
from cpm_jax.modeling import decoder
from cpm_jax.scaling.coordinate_check import (
    CoordinateCheckConfig,
    Measurement,
    Quantity,
    activations,
    coordinate_check,
    slopes,
)
from cpm_jax.scaling.mup import standard

STEPS = (1, 3, 10)


@pytest.fixture(scope="module")
def text():
    """A batch with something to learn: each token is followed by its double, more often than not."""
    rng = np.random.default_rng(0)
    rows, length, vocab = 4, 32, 64
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    for i in range(1, length + 1):
        follows = rng.random(rows) < 0.7
        tokens[follows, i] = 2 * tokens[follows, i - 1] % vocab
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_weights": np.ones((rows, length), np.float32),
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "source_ids": np.zeros(rows, np.int32),
    }


@pytest.fixture
def config(tiny_config):
    model = dataclasses.replace(tiny_config, vocab_size=64, tie_word_embeddings=False, dim_model_base=64)
    return CoordinateCheckConfig(model=model, widths=(64, 128, 256), steps=STEPS, seeds=(0, 1))


def test_flat_under_mup_and_climbing_without(config, text):
    """A slope of 0.2 is a factor of 1.3 from 64 to 256: what finite width and two seeds may leave (terms of 1/width).

    What is not scaled right shows a power of at least 1/2, a factor of 2: a matrix whose initial std or learning rate
    ignores its fan-in gives 1/2 and 1. Logits are apart: what initial weights of the head give falls as 1/sqrt(width),
    what it has learnt is flat, so that both together lie between and flatten as it learns.
    """
    mup = coordinate_check(config, text)
    sp = coordinate_check(dataclasses.replace(config, model=standard(config.model)), text)
    for step, quantity in itertools.product(STEPS, get_args(Quantity)):
        flat, climbing = (slopes(measurements, step, quantity) for measurements in (mup, sp))
        for site in flat:
            if site.startswith("parameters/"):
                continue
            assert (-0.65 if site == "logits" else -0.2) < flat[site] < 0.2, (step, quantity, site, flat)
            if site.rpartition("/")[2] in ("attention", "mlp", "residual"):
                assert climbing[site] > 0.5, (step, quantity, site, climbing)
    first, last = (slopes(mup, step, "size")["logits"] for step in (0, STEPS[-1]))
    assert first == pytest.approx(-0.5, abs=0.1)
    assert last > -0.25
    # Later the loss of a head whose logits are too large keeps them from growing further.
    assert slopes(sp, 1, "change")["logits"] > 0.5
    # Adam's first step is the learning rate, which µP divides by the width for matrices alone.
    assert slopes(mup, 1, "change")["parameters/matrix"] == pytest.approx(-1.0, abs=0.02)
    assert slopes(sp, 1, "change")["parameters/matrix"] == pytest.approx(0.0, abs=0.02)
    for group in ("embedding", "head", "norm"):
        assert slopes(mup, 1, "change")[f"parameters/{group}"] == pytest.approx(0.0, abs=0.02)


def test_activations_are_those_of_the_model(config, text):
    """The walk through the layers ends in the logits that the model itself computes."""
    params = decoder.init_params(config.model, jax.random.key(0))
    model = decoder.bind(config.model, params)
    found = activations(model, text)
    hidden = model(text["tokens"], text["positions"], text["segment_ids"])
    np.testing.assert_allclose(found["hidden"], hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["logits"], model.logits(hidden), rtol=1e-5, atol=1e-6)
    assert len(found) == 3 + 3 * config.model.num_layers


def test_slopes_are_exponents():
    """Of sizes 3·n^0.5 and changes n^-1, with a factor by seed; a zero has no logarithm."""
    found = [
        Measurement(width, seed, 1, "x", (seed + 1) * 3 * width**0.5, (seed + 1) / width)
        for width in (64, 128, 512)
        for seed in (0, 1)
    ]
    assert slopes(found, 1, "size")["x"] == pytest.approx(0.5)
    assert slopes(found, 1, "change")["x"] == pytest.approx(-1.0)
    assert slopes(found, 3, "size") == {}
    zero = [dataclasses.replace(m, change=0.0) for m in found]
    assert math.isnan(slopes(zero, 1, "change")["x"])


def test_one_width_has_no_slope(config):
    with pytest.raises(ConfigError, match=r"CoordinateCheckConfig.widths = \(64, 64\): a slope needs at least two"):
        dataclasses.replace(config, widths=(64, 64))
