"""The resolver is tested on abstract meshes, which need no devices; real ones are in tests/multidevice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from cpm_jax.common.config import ConfigError
from cpm_jax.common.sharding import (
    MESH_AXES,
    MeshConfig,
    _row_groups,
    activation_spec,
    constrain,
    data_shard,
    logical_sharding,
    make_abstract_mesh,
    make_mesh,
    params_sharding,
)


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor, context), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (("embed", "heads"), ("fsdp", "tensor")),
        (("layers", "embed", "mlp"), (None, "fsdp", "tensor")),
        (("vocab", "embed"), ("tensor", "fsdp")),
        (("batch", "length", "embed"), (("data", "fsdp"), "context", None)),
        (("batch", None), (("data", "fsdp"), None)),
        (("embed", "embed"), ("fsdp", None)),
        (("layers", "norm"), (None, None)),
    ],
)
def test_rules(axes, expected):
    assert logical_sharding(axes, abstract_mesh(2, 2, 2, 2)).spec == PartitionSpec(*expected)


def test_axes_of_size_one_are_left_out():
    assert logical_sharding(("batch", "length"), abstract_mesh(data=4)).spec == PartitionSpec("data", None)


def test_indivisible_parameter_is_an_error_naming_it():
    shapes = {"mlp": {"up_proj": {"kernel": jax.ShapeDtypeStruct((64, 100), jnp.float32)}}}
    axes = {"mlp": {"up_proj": {"kernel": ("embed", "mlp")}}}
    with pytest.raises(
        ConfigError, match=r"mlp/up_proj/kernel.*'mlp' of size 100.*into 8 parts.*MeshConfig.tensor = 8"
    ):
        params_sharding(axes, shapes, abstract_mesh(tensor=8))


def test_few_kv_heads_replicate():
    sharding = logical_sharding(("embed", "kv_heads"), abstract_mesh(tensor=8), shape=(64, 12))
    assert sharding.spec == PartitionSpec(None, None)


def test_unknown_axis_and_wrong_rank():
    with pytest.raises(ConfigError, match="unknown logical axis 'hedas'"):
        logical_sharding(("hedas",), abstract_mesh(tensor=2))
    with pytest.raises(ConfigError, match=r"has shape \(4, 4\) but 1 logical axes"):
        logical_sharding(("embed",), abstract_mesh(tensor=2), shape=(4, 4))


def test_mesh_config_rejects_impossible_sizes():
    with pytest.raises(ConfigError, match=r"MeshConfig.tensor = 0: must be at least 1"):
        MeshConfig(tensor=0)
    with pytest.raises(ConfigError, match="only one of"):
        MeshConfig(data=-1, fsdp=-1)
    with pytest.raises(ConfigError, match=r"tensor 7 .* does not fit 1 devices"):
        make_mesh(MeshConfig(tensor=7), devices=jax.devices()[:1])


def test_a_mesh_for_devices_that_are_not_there():
    mesh = make_abstract_mesh(MeshConfig(data=2, fsdp=64, tensor=4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 64, "tensor": 4, "context": 1}
    assert logical_sharding(("embed", "mlp"), mesh, (128, 64)).shard_shape((128, 64)) == (2, 16)
    assert make_abstract_mesh(MeshConfig()).size == jax.device_count()
    with pytest.raises(ConfigError, match=r"the product of MeshConfig.fsdp, MeshConfig.tensor must be \d"):
        make_abstract_mesh(MeshConfig(tensor=7))


def test_mesh_of_one_device_and_no_mesh_leave_arrays_alone():
    mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}
    x = jnp.ones((2, 3))
    assert constrain(x, ("batch", "embed")) is x


def test_constrain_reaches_the_partitioner_and_keeps_indivisible_dimensions_whole():
    @jax.jit
    def double(x):
        with jax.sharding.use_abstract_mesh(abstract_mesh(data=2, tensor=2)):
            return constrain(x, ("batch", "mlp")) * 2

    def constraints(shape):
        jaxpr = jax.make_jaxpr(double)(jax.ShapeDtypeStruct(shape, jnp.float32))
        inner = jaxpr.eqns[0].params["jaxpr"]
        return [e.params["sharding"].spec for e in inner.eqns if e.primitive.name == "sharding_constraint"]

    assert constraints((4, 6)) == [PartitionSpec("data", "tensor")]
    assert constraints((3, 6)) == [PartitionSpec(None, "tensor")]


@pytest.mark.parametrize(("heads", "expected"), [(8, ("tensor", "context")), (6, "tensor"), (3, None)])
def test_heads_of_attention_take_the_context_axis_where_they_go_round(heads, expected):
    with jax.sharding.use_abstract_mesh(abstract_mesh(data=2, tensor=2, context=4)):
        spec = activation_spec(("batch", None, "attention_heads", None), (4, 64, heads, 16))
    assert spec == PartitionSpec("data", None, expected, None)


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        # Each process holds rows of its own, whether side by side or not.
        ([[0], [0], [1], [1]], {0: (0, 1), 1: (2, 3)}),
        ([[0], [1], [0], [1]], {0: (0, 2), 1: (1, 3)}),
        # A group of rows on two processes: they read the same.
        ([[0, 0, 1, 1], [2, 2, 3, 3]], {0: (0,), 1: (0,), 2: (1,), 3: (1,)}),
    ],
)
def test_processes_that_hold_the_same_rows_are_found(processes, expected):
    assert _row_groups(np.asarray(processes)) == expected


def test_rows_that_overlap_in_part_are_refused():
    with pytest.raises(ConfigError, match=r"overlap in part: choose tensor x context"):
        _row_groups(np.asarray([[0, 0, 0], [0, 1, 1], [1, 1, 1]]))


def test_one_process_reads_everything():
    assert data_shard(make_mesh(MeshConfig(), devices=jax.devices()[:1])) == (0, 1)
