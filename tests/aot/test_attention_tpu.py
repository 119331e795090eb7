"""Splash attention through the TPU compiler: does it fit the chips' memories, and does it need communication?

Compiles for TPUs that are not there, by libtpu alone.
"""

import importlib.util

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.attention import api
from kernels_pallas.attention.arg_specs import ARG_SPECS

pytestmark = pytest.mark.aot

HBM_BYTES = {"v5e:2x2": 16 * 2**30, "v5p:2x2x1": 95 * 2**30}


@pytest.fixture(scope="module", params=HBM_BYTES)
def topology(request):
    if importlib.util.find_spec("libtpu") is None:
        pytest.fail("the TPU compiler is not installed: make aot")
    with pytest.MonkeyPatch.context() as environment:
        # Without these libtpu looks for the TPU that it would be attached to.
        environment.setenv("TPU_SKIP_MDS_QUERY", "1")
        environment.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
        environment.setenv("TPU_WORKER_HOSTNAMES", "localhost")
        yield topologies.get_topology_desc(platform="tpu", topology_name=request.param), HBM_BYTES[request.param]


def compile_gradients(spec, mesh, partition_spec, shardings):
    """Compiles forward and backward pass with the implementation that the op chooses by itself."""

    def gradients(q, k, v, segment_ids=None):
        def attend(q, k, v):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return api.dot_product_attention(
                    q, k, v, segment_ids=segment_ids, window=spec.window, partition_spec=partition_spec
                )

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(out)

    return jax.jit(gradients, in_shardings=shardings).lower(*spec.abstract_args()).compile()


@pytest.mark.parametrize(
    "name", ["minicpm4_8b_4k", "minicpm4_8b_32k", "minicpm4_0.5b_4k", "mimo_7b_4k", "window_4k", "odd_tiny"]
)
def test_compiles_for_one_chip(topology, name):
    description, hbm_bytes = topology
    mesh = Mesh(np.array(description.devices[:1]), ("data",), axis_types=(AxisType.Auto,))
    compiled = compile_gradients(ARG_SPECS[name], mesh, None, NamedSharding(mesh, P()))
    assert compiled.as_text().count("tpu_custom_call") >= 3  # forward, dq, dk and dv
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes < hbm_bytes / 4


def test_divided_over_chips_without_communication(topology):
    description, _ = topology
    mesh = Mesh(np.array(description.devices).reshape(2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = P("data", None, "tensor", None)
    heads, rows = NamedSharding(mesh, spec), NamedSharding(mesh, P("data"))
    compiled = compile_gradients(ARG_SPECS["minicpm4_0.5b_4k"], mesh, spec, (heads, heads, heads, rows))
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
