"""GPTQ against the package gptqmodel, which is no dependency: docs/quantization.md says how to install it."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from cpm_jax.quantization.gptq import quantize_gptq, second_moments
from cpm_jax.quantization.symmetric import dequantize, group_scales
from tests.quantization.test_gptq import GROUP, K, N, problem

gptqmodel_quantization = pytest.importorskip("gptqmodel.quantization")
gptqmodel_gptq = pytest.importorskip("gptqmodel.quantization.gptq")


def test_equals_the_package_gptqmodel():
    kernel, inputs = problem(2)
    # It stores its scales unrounded: the largest weight of each group is put at 7.5 steps of a float16 number.
    scales = np.asarray(group_scales(jnp.asarray(kernel), GROUP, 4))
    groups = kernel.reshape(-1, GROUP, N)
    largest = np.abs(groups).argmax(axis=1)[:, None]
    signs = np.sign(np.take_along_axis(groups, largest, axis=1))
    np.put_along_axis(groups, largest, signs * 7.5 * scales[:, None], axis=1)
    layer = torch.nn.Linear(K, N, bias=False)
    layer.weight.data = torch.from_numpy(kernel.T.copy())
    settings = gptqmodel_quantization.QuantizeConfig(
        bits=4, group_size=GROUP, sym=True, desc_act=False, static_groups=True, act_group_aware=False, damp_percent=0.01
    )
    settings.fallback = None
    theirs = gptqmodel_gptq.GPTQ(layer, settings)
    theirs.fallback = None
    theirs.quantizer.configure(perchannel=True)
    batch = torch.from_numpy(inputs)[None]
    theirs.add_batch(batch, layer(batch))
    expected, their_scales, *_ = theirs.quantize(blocksize=32)
    codes, ours = quantize_gptq(
        kernel, second_moments(jnp.asarray(inputs)[None], 0), group_size=GROUP, bits=4, damping=0.01, block_size=32
    )
    np.testing.assert_allclose(ours, their_scales.numpy().T, rtol=1e-6)
    np.testing.assert_allclose(dequantize(codes, ours), expected.numpy().T, atol=1e-4)
