"""The kernels of InfLLM v2 through the TPU compiler: do they fit the memories of every chip at the real shapes?

Compiles for TPUs that are not there, by libtpu alone. Every chip, shape and length is met once at least, not every
combination: the whole grid is `benchmarks/sparse_compile.py`'s.
"""

import importlib.util

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.block_selection import arg_specs as selection_specs
from kernels_pallas.block_selection.api import select_blocks
from kernels_pallas.block_sparse_attention import api
from kernels_pallas.block_sparse_attention.arg_specs import ARG_SPECS
from kernels_pallas.sparse_decode_attention import api as decode
from kernels_pallas.sparse_decode_attention.arg_specs import ARG_SPECS as DECODE_SPECS

pytestmark = pytest.mark.aot


@pytest.fixture(scope="module", autouse=True)
def tpu_compiler():
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("the TPU compiler is not installed: make aot")
    with pytest.MonkeyPatch.context() as environment:
        # Without these libtpu looks for the TPU that it would be attached to.
        environment.setenv("TPU_SKIP_MDS_QUERY", "1")
        environment.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        environment.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        yield


def compile_for_one_chip(topology, function, args):
    """Compiles with the implementation that the op chooses by itself."""
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    mesh = Mesh(np.array(description.devices[:1]), ("data",), axis_types=(AxisType.Auto,))

    def on_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return jax.jit(on_mesh, in_shardings=NamedSharding(mesh, P())).lower(*args).compile()


def memory(compiled):
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + analysis.output_size_in_bytes


def gradients(spec):
    """Attention's output and gradients."""

    def run(q, k, v, ids, segments, positions=None):
        def attend(q, k, v):
            options = {"block_size": spec.block_size, "segment_ids": segments, "query_positions": positions}
            return api.block_sparse_attention(q, k, v, ids, **options)

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(out)

    return run


@pytest.mark.parametrize(
    ("topology", "name"),
    [
        ("v4:2x2x1", "minicpm4_8b_4k"),
        ("v4:2x2x1", "minicpm4_0.5b_128k"),
        ("v4:2x2x1", "minicpm4_8b_128k"),
        ("v4:2x2x1", "f32_4k"),
        ("v5e:2x2", "minicpm4_8b_32k"),
        ("v5p:2x2x1", "minicpm4_0.5b_32k"),
        ("v5p:2x2x1", "one_head_each_2k"),
        ("v5p:2x2x1", "minicpm4_8b_128k"),
        ("v6e:2x2", "minicpm4_0.5b_4k"),
        ("v6e:2x2", "odd_tiny"),
        ("v6e:2x2", "minicpm4_8b_128k"),
    ],
)
def test_block_sparse_attention_compiles(topology, name):
    spec = ARG_SPECS[name]
    compiled = compile_for_one_chip(topology, gradients(spec), spec.abstract_args())
    text = compiled.as_text()
    assert all(f"block_sparse_attention_{kernel}" in text for kernel in ("forward", "backward"))
    # Nothing of queries x keys, not even a bit each: 8 GiB of them at 128K. What there is grows with the length.
    assert memory(compiled) < max(spec.seq_len, 4096) * 2**15 * np.dtype(spec.dtype).itemsize


@pytest.mark.parametrize(("topology", "name"), [("v5p:2x2x1", "minicpm4_8b_128k"), ("v6e:2x2", "minicpm4_8b_32k")])
def test_block_sparse_attention_compiles_for_an_eighth_of_the_queries(topology, name):
    """As each device of a context axis has them."""
    spec = ARG_SPECS[name]
    q, k, v, ids, segments = spec.abstract_args()
    part = spec.seq_len // 8
    q, ids = jax.ShapeDtypeStruct((1, part, *q.shape[2:]), q.dtype), jax.ShapeDtypeStruct((1, 2, part, 96), ids.dtype)
    positions = jax.ShapeDtypeStruct(q.shape[:2], ids.dtype)
    compiled = compile_for_one_chip(topology, gradients(spec), (q, k, v, ids, segments, positions))
    text = compiled.as_text()
    assert all(f"block_sparse_attention_{kernel}" in text for kernel in ("forward", "backward"))
    keys = spec.num_kv_heads * spec.seq_len * 2 * spec.head_dim * 2  # bytes
    assert memory(compiled) < part * 2**16 + 8 * keys


@pytest.mark.parametrize(("topology", "name"), [("v4:2x2x1", "minicpm4_8b_128k"), ("v6e:2x2", "minicpm4_0.5b_32k")])
def test_block_sparse_attention_compiles_for_new_tokens_of_a_cache(topology, name):
    spec, chunk = ARG_SPECS[name], 512
    q, k, v, ids, _ = spec.abstract_args()
    q = jax.ShapeDtypeStruct((q.shape[0], chunk, *q.shape[2:]), q.dtype)
    ids = jax.ShapeDtypeStruct((*ids.shape[:2], chunk, ids.shape[3]), ids.dtype)
    positions = jax.ShapeDtypeStruct(q.shape[:2], ids.dtype)

    def attend(q, k, v, ids, positions):
        return api.block_sparse_attention(q, k, v, ids, block_size=spec.block_size, query_positions=positions)

    compiled = compile_for_one_chip(topology, attend, (q, k, v, ids, positions))
    assert "block_sparse_attention_forward" in compiled.as_text()
    # Keys and values side by side, before and after a head's are laid together, and what the chunk's tables take.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 2 * k.size * k.dtype.itemsize + 2**26


@pytest.mark.parametrize(
    ("topology", "name"),
    [
        ("v4:2x2x1", "minicpm4_8b_32k"),
        ("v5e:2x2", "minicpm4_8b_128k"),
        ("v5p:2x2x1", "minicpm4_0.5b_128k"),
        ("v5p:2x2x1", "minicpm4_8b_32k_paged"),
        ("v6e:2x2", "minicpm4_0.5b_32k"),
        ("v6e:2x2", "smollm2_135m_8k"),
    ],
)
def test_sparse_decode_attention_compiles(topology, name):
    spec = DECODE_SPECS[name]

    def attend(q, k, v, ids, positions, table=None):
        return decode.sparse_decode_attention(q, k, v, ids, positions, block_size=spec.block_size, page_table=table)

    compiled = compile_for_one_chip(topology, attend, spec.abstract_args())
    assert "sparse_decode_attention" in compiled.as_text()
    # The cache is read where it lies, or laid out anew once where heads are narrower than a lane; not gathered.
    padded = 0 if spec.head_dim == 128 else 2 * 128 * np.dtype(spec.dtype).itemsize * spec.num_kv_heads * spec.cache_len
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20 + spec.batch_size * padded


@pytest.mark.parametrize(
    ("topology", "name", "coarse"),
    [
        ("v4:2x2x1", "minicpm4_8b_128k", True),
        ("v4:2x2x1", "minicpm4_0.5b_32k", True),
        ("v4:2x2x1", "f32_4k", False),
        ("v5e:2x2", "minicpm4_8b_32k", True),
        ("v5e:2x2", "minicpm4_0.5b_128k", True),
        ("v5e:2x2", "odd_tiny", True),
        ("v5p:2x2x1", "minicpm4_8b_4k", False),
        ("v5p:2x2x1", "minicpm4_8b_128k", False),
        ("v6e:2x2", "minicpm4_0.5b_4k", True),
        ("v6e:2x2", "one_head_each_2k", True),
        ("v6e:2x2", "minicpm4_8b_128k", True),
    ],
)
def test_block_selection_compiles(topology, name, coarse):
    spec = selection_specs.ARG_SPECS[name]

    def select(q, k_compressed, k_coarse, segments):
        k_coarse = k_coarse if coarse else None
        return select_blocks(q, k_compressed, k_coarse, selection=spec.selection, segment_ids=segments)

    compiled = compile_for_one_chip(topology, select, spec.abstract_args())
    assert "block_selection_scores" in compiled.as_text()
    # Far less than the block scores of all queries: 2 GiB of them at 128K.
    assert compiled.memory_analysis().temp_size_in_bytes < 2**28
