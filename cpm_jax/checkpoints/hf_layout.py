"""The names of our parameters and those of Hugging Face's Llama, Qwen2 and Granite models, which share one layout.

Ours are stacked over layers and multiply from the right, `kernel [in, out]`; theirs are one tensor a layer and
multiply from the left, `weight [out, in]`. The order of rotary dimensions (half-split) is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Name:
    """One line of the table.

    Attributes:
        ours: path in our tree; below `layers/` for those of a layer.
        theirs: name of the tensor; below `model.layers.<index>.` for those of a layer.
        transposed: whether the two axes are swapped.
    """

    ours: str
    theirs: str
    transposed: bool = False


TOP = (
    Name("embed_tokens/embedding", "model.embed_tokens.weight"),
    Name("norm/scale", "model.norm.weight"),
    Name("lm_head/kernel", "lm_head.weight", transposed=True),
)
LAYER = (
    Name("input_layernorm/scale", "input_layernorm.weight"),
    *(Name(f"self_attn/{p}_proj/kernel", f"self_attn.{p}_proj.weight", transposed=True) for p in "qkvo"),
    *(Name(f"self_attn/{p}_proj/bias", f"self_attn.{p}_proj.bias") for p in "qkv"),
    Name("post_attention_layernorm/scale", "post_attention_layernorm.weight"),
    *(Name(f"mlp/{p}_proj/kernel", f"mlp.{p}_proj.weight", transposed=True) for p in ("gate", "up", "down")),
)
MTP = "mtp_layers"  # no class of transformers has them: they stay in our checkpoints


@dataclass(frozen=True)
class Slice:
    """Where the values of one Hugging Face tensor lie in our tree.

    Attributes:
        name: what Hugging Face calls it.
        path: path of our parameter.
        layer: index on the leading axis; None where the parameter is not stacked.
        transposed: whether the two axes are swapped.
        shape: of the Hugging Face tensor.
    """

    name: str
    path: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


def flatten(params: dict[str, Any]) -> dict[str, Any]:
    """Our tree as one dict by path, with "/" between the names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def hf_slices(params: dict[str, Any]) -> Iterator[Slice]:
    """All Hugging Face tensors that a tree of parameters holds, in the order of the layers.

    Args:
        params: our tree, of arrays or of `jax.ShapeDtypeStruct`.

    Yields:
        One `Slice` for each; MTP layers have none.

    Raises:
        ValueError: the tree has a parameter that the table does not name.
    """
    flat = {path: leaf.shape for path, leaf in flatten(params).items() if not path.startswith(f"{MTP}/")}
    known = {name.ours for name in TOP} | {f"layers/{name.ours}" for name in LAYER}
    if unknown := sorted(flat.keys() - known):
        raise ValueError(f"parameters without a Hugging Face name: {', '.join(unknown)}")

    def shaped(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
        return shape[::-1] if transposed else shape

    embedding, *rest = (name for name in TOP if name.ours in flat)
    yield Slice(embedding.theirs, embedding.ours, None, False, flat[embedding.ours])
    present = [name for name in LAYER if f"layers/{name.ours}" in flat]
    for layer in range(flat["layers/input_layernorm/scale"][0]):
        for name in present:
            path = f"layers/{name.ours}"
            theirs = f"model.layers.{layer}.{name.theirs}"
            yield Slice(theirs, path, layer, name.transposed, shaped(flat[path][1:], name.transposed))
    for name in rest:
        yield Slice(name.theirs, name.ours, None, name.transposed, shaped(flat[name.ours], name.transposed))


def read_slice(flat: dict[str, Any], part: Slice) -> np.ndarray:
    """The values of one Hugging Face tensor, on the host and contiguous.

    Args:
        flat: our parameters by path, from `flatten`.
        part: which tensor.
    """
    value = flat[part.path]
    value = np.asarray(value if part.layer is None else value[part.layer])
    return np.ascontiguousarray(value.T if part.transposed else value)
