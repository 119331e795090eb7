"""Sparse decoding's TPU kernel: values by interpretation, races, and whether its program lowers for TPU."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.sparse_decode_attention import api, pallas_tpu, reference
from kernels_pallas.sparse_decode_attention.arg_specs import ARG_SPECS, ArgSpec
from tests.kernels_pallas.races import DETECT_RACES, races
from tests.kernels_pallas.sparse_decode_attention.test_sparse_decode_attention import make

SPECS = {
    "odd": ARG_SPECS["odd_tiny"],  # the cache ends within a block
    "paged": ArgSpec(2, 77, 6, 2, 16, dtype="float32", num_queries=2, block_size=16, num_selected=3, page_size=32),
    "several_steps": ArgSpec(1, 64 * 20, 4, 1, 64, dtype="float32", block_size=64, num_selected=19),
    "one_head_each": ArgSpec(2, 64, 2, 2, 128, dtype="float32", block_size=16, num_selected=4),
    "shorter_than_a_block": ArgSpec(2, 5, 4, 2, 16, dtype="float32", block_size=16, num_selected=1),
}


def call(run, spec: ArgSpec, args: tuple, **options):
    q, k, v, ids, positions, *table = map(jnp.asarray, args)
    k, v = (jnp.stack([x + 1, x]) for x in (k, v))
    page_table = table[0] if table else None
    return run(q, k, v, ids, positions, 1, page_table, spec.block_size, spec.head_dim**-0.5, **options)


def assert_equals_reference(name: str, interpret: Any) -> None:
    for seed in range(2):
        args = make(SPECS[name], seed)
        args[3][0, 0, 0] = -1  # a query that sees nothing
        ours = call(functools.partial(pallas_tpu.sparse_decode_attention, interpret=interpret), SPECS[name], args)
        expected = call(reference.sparse_decode_attention, SPECS[name], args)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_values(name: str) -> None:
    assert_equals_reference(name, True)


@pytest.mark.parametrize("name", SPECS)
def test_values_without_races(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert not races(capfd, lambda: assert_equals_reference(name, DETECT_RACES))


def test_bfloat16() -> None:
    """Of the values all but a few are within two roundings."""
    args = [jnp.asarray(x, "bfloat16") if x.dtype == np.float32 else x for x in make(SPECS["odd"])]
    ours = call(functools.partial(pallas_tpu.sparse_decode_attention, interpret=True), SPECS["odd"], tuple(args))
    difference = np.abs(
        np.asarray(ours - call(reference.sparse_decode_attention, SPECS["odd"], tuple(args)), np.float32)
    )
    assert (difference < 2**-7).mean() > 0.98
    assert difference.max() < 2**-5


@pytest.mark.parametrize("name", [name for name, spec in ARG_SPECS.items() if spec.block_size % 16 == 0])
def test_lowers_for_tpu(name: str) -> None:
    spec = ARG_SPECS[name]
    args = spec.abstract_args()

    def run(*args):
        return call(pallas_tpu.sparse_decode_attention, spec, args)

    exported = jax.export.export(jax.jit(run), platforms=["tpu"])(*args)
    assert "tpu_custom_call" in exported.mlir_module()


def test_what_it_cannot_serve_is_named() -> None:
    spec = ARG_SPECS["odd_tiny"]
    args = make(spec)

    def attend(args, **options):
        return api.sparse_decode_attention(*map(jnp.asarray, args), implementation="pallas_tpu", **options)

    with pytest.raises(ValueError, match="block_size = 24: must be a multiple of 16"):
        attend(args, block_size=24)
    with pytest.raises(ValueError, match="q has dtype float16: must be float32 or bfloat16"):
        attend((args[0].astype("float16"), *args[1:]), block_size=16)
    many = dataclasses.replace(spec, num_queries=2**13, num_selected=5).abstract_args()
    with pytest.raises(ValueError, match=re.escape("block_ids has 163840 numbers: at most 131072 fit")):
        attend([np.zeros(x.shape, x.dtype) for x in many], block_size=16)
