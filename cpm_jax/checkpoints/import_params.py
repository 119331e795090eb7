"""Weights from outside as our parameters: tensor by tensor, in the type they are kept in, straight onto the mesh."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from cpm_jax.checkpoints.hf_config import find_layout, read_config
from cpm_jax.checkpoints.hf_layouts import Tensor, flatten, tensors, to_ours
from cpm_jax.checkpoints.sources import Index, SourceError, TensorSource, some_names
from cpm_jax.modeling.config import DType, ModelConfig
from cpm_jax.modeling.decoder import Params, abstract_params

_TIED_HEAD = {"lm_head.weight": "model.embed_tokens.weight", "output.weight": "model.tok_embeddings.weight"}
_BUFFERS = ("rotary_emb.inv_freq",)  # constants that old versions of transformers saved among the weights


def import_params(
    source: TensorSource,
    mesh: Mesh | None = None,
    param_dtype: DType = "float32",
    *,
    on_param: Callable[[int], None] = lambda done: None,
) -> tuple[ModelConfig, Params]:
    """Reads a model in bounded memory: the parameters themselves and about one tensor more.

    Each device's part of a parameter is filled from the parts of the tensors that it holds, and nothing else is read.
    float32 holds every value of float16, bfloat16 and float32 as it is.

    Args:
        source: from `sources.open_source`.
        mesh: where the parameters are to lie; None is the first device.
        param_dtype: type to keep them in, and the model's `dtype` too.
        on_param: called with how many of the arrays are there.

    Returns:
        The model and its parameters.

    Raises:
        SourceError: an architecture that is unknown or that our decoder does not compute; tensors that are missing,
            superfluous or of another shape than config.json says; a file that cannot be read.
        ConfigError: the mesh does not divide a parameter.
    """
    config = dataclasses.replace(read_config(source.config), dtype=param_dtype, param_dtype=param_dtype)
    layers, found = config.num_layers + config.num_nextn_predict_layers, len(list(source.names()))
    if layers > found:  # said before the names of all their tensors are made up
        raise SourceError(f"config.json says that there are {layers:,} layers: the weights have only {found:,} tensors")
    expected = tensors(find_layout(source.config).names, config)
    check_tensors(source, expected, config)
    places: dict[str, list[Tensor]] = {}
    for tensor in expected:
        for path in tensor.paths:
            places.setdefault(path, []).append(tensor)
    abstract = abstract_params(config, mesh)
    here = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda leaf: leaf.sharding or here, abstract)
    leaves, tree = jax.tree.flatten(abstract)
    params = []
    for path, leaf, sharding in zip(flatten(abstract), leaves, jax.tree.leaves(shardings), strict=True):
        params.append(_import_leaf(source, path, leaf, places[path], sharding, config))
        on_param(len(params))
    return config, jax.tree.unflatten(tree, params)


def _import_leaf(
    source: TensorSource,
    path: str,
    leaf: jax.ShapeDtypeStruct,
    held_by: list[Tensor],
    sharding: Sharding,
    config: ModelConfig,
) -> jax.Array:
    """One parameter. A device's part is on the host only until that device has it; equal parts are read once."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        index = index or (slice(None),) * len(leaf.shape)
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays: list[jax.Array] = []
    for bounds, holders in devices.items():
        index = tuple(slice(*ends) for ends in bounds)
        part = _read_part(source, path, np.dtype(leaf.dtype), index, held_by, config)
        arrays += [jax.device_put(part, device) for device in holders]
        jax.block_until_ready(arrays)
        del part
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def _read_part(
    source: TensorSource, path: str, dtype: np.dtype, index: Index, held_by: list[Tensor], config: ModelConfig
) -> np.ndarray:
    """The values of a parameter at an index with bounds, filled layer by layer."""
    part = _aligned(tuple(bounds.stop - bounds.start for bounds in index), dtype)
    if held_by[0].layer is None:
        part[...] = to_ours(held_by[0], path, index, config, source.read)
        return part
    for place, layer in enumerate(range(index[0].start, index[0].stop)):
        part[place] = to_ours(held_by[layer], path, index[1:], config, source.read)
    return part


def _aligned(shape: tuple[int, ...], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """An array that begins where XLA's CPU backend wants it: it then takes it over as it is, without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)


def check_tensors(source: TensorSource, expected: list[Tensor], config: ModelConfig) -> None:
    """Compares what a source has with what the model needs; reads only what must be zeros or equal.

    Args:
        source: of the weights.
        expected: from `hf_layouts.tensors`.
        config: the model, for messages.

    Raises:
        SourceError: tensors are missing, superfluous, or of another shape; a bias that our decoder does not have is
            not zero; the head of a model with tied embeddings is not the embedding.
    """
    shapes = {tensor.name: tensor.shape for tensor in expected}
    found = set(source.names())
    model = (
        f"config.json describes ({config.num_layers} layers of width {config.d_model}, {config.num_heads} heads and "
        f"{config.num_kv_heads} kv heads of {config.head_size}, d_ff {config.d_ff}, {config.vocab_size} tokens, "
        f"{config.num_nextn_predict_layers} MTP layers, "
        f"{'tied' if config.tie_word_embeddings else 'untied'} embeddings)"
    )
    if missing := [name for name in shapes if name not in found]:
        raise SourceError(f"missing tensors: {some_names(missing)}; the model that {model} has {len(shapes)}")
    tied = {name: _TIED_HEAD[name] for name in found - shapes.keys() if _TIED_HEAD.get(name) in shapes}
    extra = sorted(name for name in found - shapes.keys() - tied.keys() if not name.endswith(_BUFFERS))
    if extra:
        raise SourceError(
            f"tensors without a place: {some_names(extra)}; the model that {model} has {len(shapes)} others"
        )
    for name, shape in shapes.items():
        if (given := source.shape(name)) != shape:
            raise SourceError(f"{name} has the shape {given}: {shape} is what the model has that {model}")
    for tensor in expected:
        if not tensor.paths and np.any(source.read(tensor.name)):
            raise SourceError(f"{tensor.name} is not zero: accepted are zeros; our decoder has no bias there")
    for head, embedding in tied.items():
        if source.shape(head) != shapes[embedding] or not np.array_equal(source.read(head), source.read(embedding)):
            raise SourceError(
                f"{head} differs from {embedding}, though config.json says tie_word_embeddings; set it to false to use "
                f"both, or leave {head} out"
            )
