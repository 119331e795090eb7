"""What travels between 8 devices in a training step: weights and their gradients, each once, and no activation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cpm_jax.common.sharding import MeshConfig, make_mesh
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.planning.hlo_costs import count_costs
from cpm_jax.planning.workload import Candidate, Workload, lower
from kernels_pallas.linear_cross_entropy import xla

pytestmark = pytest.mark.multidevice

MODEL = ModelConfig(vocab_size=512, num_layers=3, d_model=64, num_heads=4, num_kv_heads=2, d_ff=96)
SEQ_LEN, ROWS = 256, 32


@pytest.fixture(scope="module")
def costs():
    """Of a step with fully sharded parameters, with the head's loss in many chunks."""
    assert jax.device_count() == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "ROWS_PER_DEVICE", 128)
        workload = Workload("train", dataclasses.replace(MODEL, dtype="float32"), SEQ_LEN)
        compiled = lower(workload, Candidate(MeshConfig(fsdp=8), ROWS, remat="none"), jax.devices()).compile()
    return count_costs(compiled.as_text())


def test_matrices_are_gathered_in_their_loops(costs):
    matrix = 4 * 64 * 96
    gathers = [c for c in costs.collectives if c.kind == "all-gather" and c.num_bytes == matrix]
    # gate, up and down, forward and backward
    assert sum(c.executions for c in gathers) >= 3 * MODEL.num_layers


def test_head_and_embedding_travel_once(costs):
    table = 4 * 512 * 64
    large = [c for c in costs.collectives if c.num_bytes >= table]
    assert {c.executions for c in large} == {1}
    assert sorted(c.kind for c in large) == ["all-gather", "all-gather", "reduce-scatter", "reduce-scatter"]


def test_no_activation_travels(costs):
    """The residual stream of one device is larger than any matrix, the head aside: nothing of its size moves."""
    stream = 4 * (ROWS // 8) * SEQ_LEN * 64
    table = 4 * 512 * 64
    assert stream > 4 * 64 * 96
    assert all(c.num_bytes < stream or c.num_bytes == table for c in costs.collectives)


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 4, 2, 1), (2, 2, 1, 2)])
def test_meshes_hold_every_device_once(sizes):
    mesh = make_mesh(MeshConfig(*sizes))
    assert mesh.devices.shape == sizes
    assert set(mesh.devices.flat) == set(jax.devices())


def test_collectives_in_a_loop_count_as_often_as_it_runs():
    """Closed forms: what each kind of collective of one float32 [8, 128] per device moves, five times."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    part = 4 * 8 * 128

    def body(kind):
        def one(x, _):
            if kind == "all-gather":
                y = jnp.sum(jax.lax.all_gather(x, "fsdp", axis=0, tiled=True).reshape(8, 8, 128) ** 2, axis=0)
            elif kind == "all-reduce":
                y = jax.lax.psum(x, "fsdp")
            elif kind == "reduce-scatter":
                y = jnp.tile(jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True), (8, 1))
            elif kind == "all-to-all":
                y = jax.lax.all_to_all(x, "fsdp", split_axis=0, concat_axis=0, tiled=True)
            else:
                y = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)])
            return jnp.sin(y), None

        return one

    expected = {
        "all-gather": 8 * part * 7 / 8,
        "all-reduce": 2 * part * 7 / 8,
        "reduce-scatter": part * 7 / 8,
        "all-to-all": part * 8 / 4 * 7 / 8,
        "collective-permute": part,
    }
    for kind, wire_bytes in expected.items():

        def run(x, kind=kind):
            return jax.lax.scan(body(kind), x, length=5)[0]

        per_device = jax.shard_map(run, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)
        compiled = jax.jit(per_device).lower(jax.ShapeDtypeStruct((64, 128), np.float32)).compile()
        found = count_costs(compiled.as_text())
        assert {c.kind for c in found.collectives} == {kind}
        assert found.wire_bytes(kind) == pytest.approx(5 * wire_bytes), kind
        assert found.collectives[0].group_size == 8 or kind == "collective-permute"
