"""The names of our parameters and those of the tensors in Hugging Face folders: one short table an architecture.

Ours are stacked over layers and multiply from the right, `kernel [in, out]`; theirs are one tensor a layer and
multiply from the left, `weight [out, in]`. The order of rotary dimensions (half-split) is the same. How their
config.json reads is in `hf_config.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from cpm_jax.checkpoints.sources import Index
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import abstract_params

# One line of a table: their name, then ours. Several of ours are fused into one of theirs; none means that theirs
# must be zeros (a bias that our decoder does not have).
Line = tuple[str, *tuple[str, ...]]


@dataclass(frozen=True)
class Names:
    """The table of one architecture; a line that the model has no parameters for is passed over.

    Attributes:
        top: lines of what is not in a layer.
        layer: lines of a layer; theirs below `model.layers.<index>.`, ours below `layers/`.
        mtp: lines of an MTP layer; theirs below `model.mtp_layers.<index>.`, ours below `mtp_layers/`.
    """

    top: tuple[Line, ...]
    layer: tuple[Line, ...]
    mtp: tuple[Line, ...] = ()


def _lines(theirs: str, ours: str, names: Sequence[str]) -> tuple[Line, ...]:
    return tuple((theirs.format(name), ours.format(name)) for name in names)


_TOP: tuple[Line, ...] = (
    ("model.embed_tokens.weight", "embed_tokens/embedding"),
    ("model.norm.weight", "norm/scale"),
    ("lm_head.weight", "lm_head/kernel"),
)
_QWEN2_LAYER: tuple[Line, ...] = (
    ("input_layernorm.weight", "input_layernorm/scale"),
    *_lines("self_attn.{}_proj.weight", "self_attn/{}_proj/kernel", "qkvo"),
    *_lines("self_attn.{}_proj.bias", "self_attn/{}_proj/bias", "qkv"),
    ("post_attention_layernorm.weight", "post_attention_layernorm/scale"),
    *_lines("mlp.{}_proj.weight", "mlp/{}_proj/kernel", ("gate", "up", "down")),
)

QWEN2 = Names(_TOP, _QWEN2_LAYER)
LLAMA = Names(_TOP, (*_QWEN2_LAYER, ("self_attn.o_proj.bias",)))
MIMO = Names(
    _TOP,
    _QWEN2_LAYER,
    mtp=(
        *_lines("{}_layernorm.weight", "{}_layernorm/scale", ("token", "hidden", "final")),
        ("input_proj.weight", "input_proj/kernel"),
        *_QWEN2_LAYER,
    ),
)
INTERNLM2 = Names(
    top=(
        ("model.tok_embeddings.weight", "embed_tokens/embedding"),
        ("model.norm.weight", "norm/scale"),
        ("output.weight", "lm_head/kernel"),
    ),
    layer=(
        ("attention_norm.weight", "input_layernorm/scale"),
        ("attention.wqkv.weight", *(f"self_attn/{p}_proj/kernel" for p in "qkv")),
        ("attention.wqkv.bias", *(f"self_attn/{p}_proj/bias" for p in "qkv")),
        ("attention.wo.weight", "self_attn/o_proj/kernel"),
        ("attention.wo.bias",),
        ("ffn_norm.weight", "post_attention_layernorm/scale"),
        ("feed_forward.w1.weight", "mlp/gate_proj/kernel"),
        ("feed_forward.w3.weight", "mlp/up_proj/kernel"),
        ("feed_forward.w2.weight", "mlp/down_proj/kernel"),
    ),
)


@dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor of a model, and where its values lie in our tree.

    Attributes:
        name: what Hugging Face calls it.
        paths: our parameters that it holds; none where it must be zeros.
        layer: index on their leading axis; None where they are not stacked.
        shape: of the Hugging Face tensor.
    """

    name: str
    paths: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Our tree as one dict by path, with "/" between the names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def tensors(names: Names, config: ModelConfig) -> list[Tensor]:
    """All Hugging Face tensors of a model, in the order of the layers; MTP layers only where the table has them."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract_params(config)).items()}

    def of(lines: Sequence[Line], theirs: str, ours: str, layer: int | None) -> Iterator[Tensor]:
        for name, *rest in lines:
            paths = tuple(ours + path for path in rest)
            if paths and paths[0] in shapes:
                held = [shapes[path] if layer is None else shapes[path][1:] for path in paths]
                width = sum(shape[-1] for shape in held)
                transposed = paths[0].endswith("/kernel")
                shape = (width, *held[0][:-1]) if transposed or len(paths) > 1 else held[0]
                yield Tensor(theirs + name, paths, layer, shape)
            elif not paths and config.attention_bias:
                yield Tensor(theirs + name, (), layer, (config.d_model,))

    embedding, *rest = names.top
    found = [*of([embedding], "", "", None)]
    for layer in range(config.num_layers):
        found += of(names.layer, f"model.layers.{layer}.", "layers/", layer)
    for layer in range(config.num_nextn_predict_layers):
        found += of(names.mtp, f"model.mtp_layers.{layer}.", "mtp_layers/", layer)
    return [*found, *of(rest, "", "", None)]


def to_ours(
    tensor: Tensor, path: str, index: Index, config: ModelConfig, read: Callable[[str, Index], np.ndarray]
) -> np.ndarray:
    """A part of one of our parameters (of one layer), read from no more of the Hugging Face tensor than it needs.

    Args:
        tensor: which has `path` among its paths.
        path: our parameter.
        index: the part: a slice with bounds for each dimension of ours, without that of the layers.
        config: gives the numbers of heads, by which fused rows are grouped.
        read: gives a part of a Hugging Face tensor.
    """
    theirs = index[::-1] if path.endswith("/kernel") else index
    if len(tensor.paths) == 1:
        values = read(tensor.name, theirs)
    else:
        values = _unfuse(tensor, path, theirs, config, read)
    return values.T if path.endswith("/kernel") else values


def _unfuse(
    tensor: Tensor, path: str, index: Index, config: ModelConfig, read: Callable[[str, Index], np.ndarray]
) -> np.ndarray:
    """Rows of q, k or v out of InternLM2's wqkv, whose rows are, for each kv head, [its query heads, k, v]."""
    group, size = config.num_heads // config.num_kv_heads, config.head_size
    place = {"q": slice(0, group), "k": slice(group, group + 1), "v": slice(group + 1, group + 2)}
    heads = place[path.removesuffix("/kernel").removesuffix("/bias").rpartition("/")[2][0]]
    rows = (heads.stop - heads.start) * size  # of ours for each kv head
    first, last = index[0].start // rows, -(-index[0].stop // rows)
    span = slice(first * (group + 2) * size, last * (group + 2) * size)
    fused = read(tensor.name, (span, *index[1:])).reshape(last - first, group + 2, size, *_rest(index))
    ours = fused[:, heads].reshape(-1, *fused.shape[3:])
    return ours[index[0].start - first * rows : index[0].stop - first * rows]


def _rest(index: Index) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in index[1:])


def to_theirs(tensor: Tensor, values: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
    """The Hugging Face tensor, contiguous, from our parameters of `tensor.paths` (of one layer each).

    Args:
        tensor: which.
        values: ours, in the order of `tensor.paths`.
        config: gives the numbers of heads, by which fused rows are grouped.
    """
    transposed = [
        value.T if path.endswith("/kernel") else value for path, value in zip(tensor.paths, values, strict=True)
    ]
    if len(transposed) > 1:
        grouped = [value.reshape(config.num_kv_heads, -1, config.head_size, *value.shape[1:]) for value in transposed]
        transposed = [np.concatenate(grouped, axis=1).reshape(tensor.shape)]
    return np.ascontiguousarray(transposed[0])
