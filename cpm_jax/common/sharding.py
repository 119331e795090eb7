"""From logical axis names to shardings: one mesh, one rule list, one resolver.

Parameters and activations name their dimensions ("embed", "heads", "batch"); only this file knows which mesh axes
they lie on. The mesh has automatic axes: XLA's partitioner (GSPMD) completes the layout between the few places that
say it, so results do not depend on the mesh beyond the rounding of sums.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cpm_jax.common.config import ConfigError, config_dataclass

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axes. Parameters and activations share the names: in an activation "batch" takes "fsdp" first,
# so that "embed" finds it taken and stays whole there, as fully sharded data parallelism wants.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    # Within attention, which needs whole rows: what divided their length then divides the heads (DeepSpeed-Ulysses,
    # arXiv 2309.14509), so that every device does an equal part of the causal work.
    "attention_heads": ("tensor", "context"),
    # Queries that choose blocks for a whole group of heads: what the key and value heads leave over divides them.
    "query_length": ("context", "tensor"),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
}

# With few key and value heads (MiniCPM4 has 2) tensor parallelism is wider than their number: they are then replicated.
MAY_REPLICATE = frozenset({"kv_heads"})


@config_dataclass
class MeshConfig:
    """Sizes of the mesh axes, in devices; their product is the number of devices.

    Attributes:
        data: copies of the parameters, each with its part of the batch. One axis may be -1: all devices that the
            others leave.
        fsdp: parts in which parameters and optimizer state are held; the batch is divided over them too.
        tensor: parts of heads, feed-forward width and vocabulary.
        context: parts of the sequence.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        sizes = self.sizes
        for axis, size in zip(MESH_AXES, sizes, strict=True):
            if size < 1 and size != -1:
                raise ConfigError(
                    f"MeshConfig.{axis} = {size}: must be at least 1, or -1 for the devices that are left",
                    field=f"MeshConfig.{axis}",
                )
        if sizes.count(-1) > 1:
            raise ConfigError(f"MeshConfig{sizes}: only one of {', '.join(MESH_AXES)} may be -1", field="MeshConfig")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in the order of MESH_AXES, -1 unresolved."""
        return (self.data, self.fsdp, self.tensor, self.context)


def mesh_sizes(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of the mesh axes on a number of devices, -1 resolved.

    Raises:
        ConfigError: if the sizes do not multiply to the number of devices.
    """
    known = math.prod(size for size in config.sizes if size != -1)
    sizes = tuple(num_devices // known if size == -1 else size for size in config.sizes)
    if math.prod(sizes) != num_devices:
        given = " x ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, config.sizes, strict=True))
        named = [f"MeshConfig.{axis}" for axis, size in zip(MESH_AXES, config.sizes, strict=True) if size != 1]
        raise ConfigError(
            f"MeshConfig: {given} does not fit {num_devices} devices: the product of {', '.join(named)} must be "
            f"{num_devices} (one size may be -1)",
            field="MeshConfig",
        )
    return sizes


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Arranges devices in a mesh with the axes data, fsdp, tensor, context.

    Args:
        config: sizes of the axes.
        devices: what to arrange; None takes all devices of all processes.

    Raises:
        ConfigError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    # Follows the wiring of a TPU's torus; `jax.make_mesh` would refuse sizes that divide one of its sides.
    arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def make_abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The same without devices, to compute layouts for a machine that is not there.

    An axis of -1 takes the devices that this process sees.

    Raises:
        ConfigError: if an axis is -1 and the others do not divide the number of devices here.
    """
    sizes = mesh_sizes(config, jax.device_count() if -1 in config.sizes else math.prod(config.sizes))
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def data_shard(mesh: Mesh) -> tuple[int, int]:
    """Which part of each global batch this process reads: its number, and of how many parts.

    Processes whose devices only differ in tensor or context axes hold the same rows and read the same part, so this is
    not always the process's own number and their count.

    Raises:
        ConfigError: if rows are spread over processes in parts that overlap without being the same.
    """
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(mesh.devices)
    parts = _row_groups(processes.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1))
    distinct = sorted(set(parts.values()))
    return distinct.index(parts[jax.process_index()]), len(distinct)


def _row_groups(processes: np.ndarray) -> dict[int, tuple[int, ...]]:
    """The groups of rows that each process holds, from the process of each device by [group of rows, rest of mesh]."""
    parts = {int(p): tuple(np.flatnonzero((processes == p).any(axis=1)).tolist()) for p in np.unique(processes)}
    distinct = set(parts.values())
    if sum(map(len, distinct)) != len(processes) or len(set(map(len, distinct))) != 1:
        raise ConfigError(
            f"MeshConfig: processes hold the groups of rows {parts}, which overlap in part: choose tensor x context so "
            "that it divides the devices of a process, or is a multiple of them",
            field="MeshConfig",
        )
    return parts


def _resolve(
    axes: tuple[str | None, ...], mesh_shape: dict[str, int], shape: tuple[int, ...] | None, name: str, strict: bool
) -> PartitionSpec:
    """Resolves logical axes; `shape` drops (or, when `strict`, refuses) mesh axes that do not divide a dimension."""
    if shape is not None and len(shape) != len(axes):
        raise ConfigError(f"{name}: has shape {shape} but {len(axes)} logical axes {axes}", field=name)
    used: set[str] = set()
    entries: list[tuple[str, ...] | str | None] = []
    for dim, axis in enumerate(axes):
        if axis is not None and axis not in RULES:
            raise ConfigError(f"{name}: unknown logical axis {axis!r}; known are {', '.join(RULES)}", field=name)
        # A mesh axis can split one dimension of an array only: the first that asks gets it.
        mesh_axes = tuple(a for a in RULES[axis] if a not in used and mesh_shape[a] > 1) if axis else ()
        parts = math.prod(mesh_shape[a] for a in mesh_axes)
        if shape is not None and shape[dim] % parts:
            if strict and axis not in MAY_REPLICATE:
                raise ConfigError(
                    f"{name}: its dimension {axis!r} of size {shape[dim]} cannot be divided into {parts} parts "
                    f"({' x '.join(f'MeshConfig.{a} = {mesh_shape[a]}' for a in mesh_axes)}); choose mesh sizes that "
                    f"divide {shape[dim]}",
                    field=name,
                )
            while shape[dim] % math.prod(mesh_shape[a] for a in mesh_axes):
                mesh_axes = mesh_axes[:-1]
        used.update(mesh_axes)
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def logical_sharding(
    axes: tuple[str | None, ...], mesh: Mesh | AbstractMesh, shape: tuple[int, ...] | None = None, name: str = "array"
) -> NamedSharding:
    """Resolves the logical axes of an array that is held (a parameter, a batch) to its sharding.

    Args:
        axes: a logical axis for each dimension; None keeps a dimension whole.
        mesh: from `make_mesh` or `make_abstract_mesh`.
        shape: checked for divisibility where given. Dimensions named in MAY_REPLICATE are replicated instead.
        name: what to call the array in errors.

    Raises:
        ConfigError: for an unknown logical axis, or a dimension that the mesh does not divide.
    """
    return NamedSharding(mesh, _resolve(axes, dict(mesh.shape), shape, name, strict=True))


def params_sharding(axes: Any, params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of a whole parameter tree.

    Args:
        axes: the tree of logical axes, from `modeling.decoder.param_axes`.
        params: the same tree of arrays or ShapeDtypeStructs.
        mesh: from `make_mesh`.

    Returns:
        The same tree of NamedShardings.

    Raises:
        ConfigError: naming the parameter, the dimension and the mesh sizes that do not fit.
    """

    def leaf(path: Any, param: Any, logical: tuple[str | None, ...]) -> NamedSharding:
        return logical_sharding(
            logical, mesh, tuple(param.shape), jax.tree_util.keystr(path, simple=True, separator="/")
        )

    return jax.tree_util.tree_map_with_path(leaf, params, axes)


def is_divided() -> bool:
    """Whether the mesh in scope divides a training over devices, so that activations may lie in parts.

    Other axes than MESH_AXES do not: along them lie trainings that know nothing of each other.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(size for axis, size in mesh.shape.items() if axis in MESH_AXES) > 1


def activation_spec(axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec | None:
    """Resolves the logical axes of an activation on the mesh in scope; None outside a mesh.

    The mesh is the one in context (`jax.sharding.use_abstract_mesh` inside a jitted function, or `jax.set_mesh`). A
    dimension that the mesh axes of its name do not divide, such as a batch of one in decoding, is divided by the first
    of them only, or stays whole: an activation's layout changes speed, never values.
    """
    if not is_divided():
        return None
    return _resolve(axes, dict(jax.sharding.get_abstract_mesh().shape), shape, "activation", strict=False)


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Tells the partitioner how an activation lies; does nothing outside a mesh (see `activation_spec`).

    Args:
        x: the activation.
        axes: a logical axis for each dimension; None keeps a dimension whole.
    """
    spec = activation_spec(axes, x.shape)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)
