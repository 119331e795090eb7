import dataclasses

import jax
import numpy as np
import pytest

from cpm_jax.checkpoints.hf_layout import flatten, hf_slices, read_slice
from cpm_jax.modeling.decoder import init_params


def test_every_value_has_one_place(tiny_config):
    config = dataclasses.replace(tiny_config, tie_word_embeddings=False, attention_bias=True)
    params = init_params(config, jax.random.key(0))
    flat = flatten(params)
    parts = list(hf_slices(params))
    assert len({part.name for part in parts}) == len(parts)
    assert len({(part.path, part.layer) for part in parts}) == len(parts)
    assert sum(np.prod(part.shape) for part in parts) == sum(leaf.size for leaf in flat.values())
    for part in parts:
        assert read_slice(flat, part).shape == part.shape
    kernel = next(part for part in parts if part.name == "model.layers.1.mlp.up_proj.weight")
    np.testing.assert_array_equal(
        read_slice(flat, kernel), np.asarray(params["layers"]["mlp"]["up_proj"]["kernel"])[1].T
    )


def test_an_unknown_parameter_is_named(tiny_config):
    params = init_params(tiny_config, jax.random.key(0)) | {"value_head": {"kernel": np.zeros((2, 2))}}
    with pytest.raises(ValueError, match="value_head/kernel"):
        list(hf_slices(params))
