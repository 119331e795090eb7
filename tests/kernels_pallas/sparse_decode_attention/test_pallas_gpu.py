"""Sparse decoding's GPU kernel: values by interpretation. `tests/aot/test_sparse_gpu.py` compiles it for GPUs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.sparse_decode_attention import api, pallas_gpu, reference
from kernels_pallas.sparse_decode_attention.arg_specs import ARG_SPECS, ArgSpec
from tests.kernels_pallas.sparse_decode_attention.test_pallas_tpu import SPECS, call
from tests.kernels_pallas.sparse_decode_attention.test_sparse_decode_attention import make

run_interpreted = functools.partial(pallas_gpu.sparse_decode_attention, interpret=True)


@pytest.mark.parametrize("programs", [1, 10_000], ids=["whole_lists", "a_block_each"])
@pytest.mark.parametrize("name", SPECS)
def test_values(name: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pallas_gpu, "GPU_PROGRAMS", programs)
    for seed in range(2):
        args = make(SPECS[name], seed)
        args[3][0, 0, 0] = -1  # a query that sees nothing
        args[3][-1, -1, -1, 0] = -1  # a list with a gap
        ours = call(run_interpreted, SPECS[name], args)
        expected = call(reference.sparse_decode_attention, SPECS[name], args)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str) -> None:
    """Of the values all but a few are within two roundings to bfloat16."""
    args = tuple(jnp.asarray(x, dtype) if x.dtype == np.float32 else x for x in make(SPECS["odd"]))
    ours = call(run_interpreted, SPECS["odd"], args)
    assert ours.dtype == dtype
    difference = np.abs(np.asarray(ours - call(reference.sparse_decode_attention, SPECS["odd"], args), np.float32))
    assert (difference < 2**-7).mean() > 0.98
    assert difference.max() < 2**-5


def test_what_it_cannot_serve_is_named() -> None:
    spec = ARG_SPECS["odd_tiny"]
    args = make(spec)

    def attend(args: tuple, **options: int) -> jax.Array:
        return api.sparse_decode_attention(*map(jnp.asarray, args), implementation="pallas_gpu", **options)

    with pytest.raises(ValueError, match="block_size = 24: must be a power of two from 16"):
        attend(args, block_size=24)
    narrow = tuple(x[..., :12] if i < 3 else x for i, x in enumerate(args))
    with pytest.raises(ValueError, match="head_dim = 12: must be a power of two from 16"):
        attend(narrow, block_size=16)
    with pytest.raises(ValueError, match="q has dtype float8_e4m3fn: must be float32, bfloat16 or float16"):
        attend((jnp.asarray(args[0]).astype("float8_e4m3fn"), *args[1:]), block_size=16)
    large = ArgSpec(8, 2**17, 32, 16, 128, num_selected=4)
    with pytest.raises(ValueError, match=re.escape("keys of 2147483648 numbers: must be below 2**31")):
        jax.eval_shape(
            lambda *args: api.sparse_decode_attention(*args, block_size=64, implementation="pallas_gpu"),
            *large.abstract_args(),
        )
