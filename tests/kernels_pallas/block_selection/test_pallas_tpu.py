"""Block selection's TPU kernel: values by interpretation, races, and whether the program lowers for TPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from kernels_pallas.block_selection import api, costs, pallas_tpu, reference
from kernels_pallas.block_selection.arg_specs import ARG_SPECS, ArgSpec
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.compress_keys.api import compress_keys
from kernels_pallas.dispatch import UnsupportedError, log_choice
from tests.kernels_pallas.races import DETECT_RACES, races

SMALL = BlockSelection(kernel_size=4, kernel_stride=2, init_blocks=1, block_size=8, window_size=16, topk=3)


def example(length, kv_heads, group, width, selection, dtype="float32", batch=1, coarse=True, documents=True):
    """Arguments of an implementation: packed documents, an id that comes back, queries that see nothing."""
    keys = jax.random.split(jax.random.key(0), 2)
    q = (2 * jax.random.normal(keys[0], (batch, length, kv_heads * group, width))).astype(dtype)
    k = (2 * jax.random.normal(keys[1], (batch, length, kv_heads, width))).astype(dtype)
    fine = compress_keys(k, kernel_size=selection.kernel_size, kernel_stride=selection.kernel_stride)
    sizes = {"kernel_size": selection.coarse_kernel_size, "kernel_stride": selection.coarse_kernel_stride}
    place = np.arange(length)
    segments = np.select([place < length // 5, place < length // 3], [1, 2], 1) * documents
    positions = np.where((place % 29 == 28) & documents, -1, place)
    starts = api.document_starts(jnp.asarray(np.tile(segments, (batch, 1))))
    positions = jnp.asarray(np.tile(positions, (batch, 1)), jnp.int32)
    num_blocks = -(-length // selection.block_size)
    kernels = fine, compress_keys(k, **sizes) if coarse else None
    return q, *kernels, width**-0.5, selection, positions, starts, num_blocks


def assert_equals_reference(args, interpret, kernels=pallas_tpu):
    static = {"static_argnums": (3, 4, 7)}
    for name in ("block_scores", "select_blocks"):
        got = jax.jit(functools.partial(getattr(kernels, name), interpret=interpret), **static)(*args)
        want = jax.jit(getattr(reference, name), **static)(*args)
        if name == "block_scores":
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("length", "kv_heads", "group", "width", "dtype", "coarse", "fields"),
    [
        (333, 2, 3, 64, "float32", True, {}),
        (200, 1, 16, 128, "bfloat16", False, {"variant": "huggingface"}),
        (150, 2, 1, 64, "float32", True, {"kernel_size": 12, "kernel_stride": 4}),
        (90, 1, 2, 16, "float32", False, {"kernel_size": 8, "kernel_stride": 8, "variant": "cpm_cu"}),
        (1, 1, 4, 16, "float32", True, {}),
    ],
)
def test_interpreted_equals_reference(length, kv_heads, group, width, dtype, coarse, fields):
    selection = dataclasses.replace(SMALL, **fields)
    args = example(length, kv_heads, group, width, selection, dtype, 2, coarse)
    assert_equals_reference(args, interpret=True)


def test_several_chunks_spans_and_tiles(monkeypatch):
    for module, name, value in ((pallas_tpu, "SPAN", 400), (costs, "MAX_TILE", 64), (pallas_tpu, "COARSE_CHUNK", 128)):
        monkeypatch.setattr(module, name, value)
    # 225 blocks, two chunks of them: kernels reach from one chunk into the next.
    selection = dataclasses.replace(SMALL, block_size=4, window_size=8)
    assert_equals_reference(example(900, 1, 4, 16, selection, documents=False), interpret=True)


def test_no_races(capfd):
    assert not races(capfd, lambda: assert_equals_reference(example(300, 2, 8, 16, SMALL), interpret=DETECT_RACES))


@pytest.mark.parametrize("name", ARG_SPECS)
def test_lowers_for_tpu(name):
    spec = ARG_SPECS[name]
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))

    def select(q, fine, coarse, segments):
        return api.select_blocks(
            q, fine, coarse, selection=spec.selection, segment_ids=segments, implementation="pallas_tpu"
        )

    with jax.sharding.use_abstract_mesh(mesh):
        exported = jax.export.export(jax.jit(select), platforms=["tpu"])(*spec.abstract_args())
    assert "block_selection_scores" in exported.mlir_module()


def test_what_the_kernel_cannot_serve_is_refused():
    q, fine, coarse, _, selection, *_ = example(64, 1, 2, 16, SMALL)
    call = functools.partial(api.select_blocks, selection=selection, implementation="pallas_tpu")
    with pytest.raises(UnsupportedError, match="q has dtype float16"):
        call(q.astype("float16"), fine, coarse)
    with pytest.raises(UnsupportedError, match="256 query heads to a key head: must be at most 128"):
        call(jnp.zeros((1, 64, 256, 16)), fine, coarse)
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(UnsupportedError, match="on a mesh of 2 devices: call it inside shard_map"),
    ):
        call(q, fine, coarse)


@pytest.mark.parametrize(
    ("tokens", "dtype", "coarse", "fits"),
    # What the compiler for v4 accepts, and what it refuses.
    [
        (2**16, "float32", True, True),
        (3 * 2**15, "float32", True, True),
        (2**17, "float32", True, False),
        (2**17, "bfloat16", False, True),
        (2**18, "bfloat16", True, True),
        (5 * 2**16, "bfloat16", True, False),
    ],
)
def test_rows_that_do_not_fit_vector_memory(tokens, dtype, coarse, fits, caplog):
    """Fall back with a log line; named explicitly, the kernel says why it cannot."""
    spec = ArgSpec(1, tokens, 32, 2, 128, dtype)
    q, fine, normalising, _ = spec.abstract_args()
    normalising = normalising if coarse else None
    reason = pallas_tpu.unsupported_reason(q, fine, normalising, spec.selection)
    assert (reason is None) == fits
    if fits:
        return
    select = functools.partial(api.select_blocks, selection=spec.selection)
    with pytest.raises(UnsupportedError, match=f"keys of a head in {dtype} need .* must be at most 16777216"):
        jax.eval_shape(functools.partial(select, implementation="pallas_tpu"), q, fine, normalising)
    log_choice.cache_clear()
    device = jax.sharding.AbstractDevice("TPU v4", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), caplog.at_level("INFO", logger="kernels_pallas"):
        jax.eval_shape(select, q, fine, normalising)
    assert f"block_selection: using implementation='xla' ({reason})" in caplog.text
