"""Rotation of the residual stream (QuaRot, Ashkboos et al., arXiv 2404.00456; the parts that need no code at run time).

RMSNorm with scale 1 commutes with an orthogonal matrix R. So norm scales are first multiplied into the linear layers
that follow; then whatever writes into the residual stream (embedding, o, down) is multiplied by R, and whatever reads
from it (q, k, v, gate, up, head) by Rᵀ. Within each value head a Hadamard matrix between v and o does the same for o's
inputs. The model computes the same, with activations that are spread over all channels. What QuaRot multiplies at run
time (inputs of down, keys, queries) is left out: no runtime of ours or others' would load it.

The multipliers of MiniCPM are scalars, which commute too. A tied head is untied: it takes the final norm's scale, and
the embedding does not. MTP layers read what the final norm has written, scaled, so they cannot follow.
"""

import dataclasses

import jax
import numpy as np
import scipy.linalg
from jaxtyping import Float

from cpm_jax.common.config import ConfigError
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import Params


def orthogonal_matrix(size: int, seed: int) -> Float[np.ndarray, "size size"]:
    """A Hadamard matrix with random signs, scaled to be orthogonal.

    Its size is 2^k · m with m odd. For m = 1 every entry is ±1/sqrt(size); else it is the Kronecker product of the
    Hadamard matrix of 2^k with a random orthogonal m × m block (of 576 = 64 · 9 that block is 9 × 9).
    """
    rng = np.random.default_rng(seed)
    odd = size // (size & -size)
    power = size // odd
    matrix = scipy.linalg.hadamard(power) / np.sqrt(power)
    if odd > 1:
        block, upper = np.linalg.qr(rng.standard_normal((odd, odd)))
        matrix = np.kron(matrix, block * np.sign(np.diagonal(upper)))
    return matrix * rng.choice([-1.0, 1.0], size=(size, 1))


def rotate(params: Params, config: ModelConfig, seed: int) -> tuple[Params, ModelConfig]:
    """The same function with a rotated residual stream.

    Args:
        params: of the model; read in float64, a layer at a time.
        config: of the model.
        seed: of the rotation.

    Returns:
        Parameters as numpy arrays of the same types, and the config, which has an untied head.

    Raises:
        ConfigError: the model has MTP layers.
    """
    if config.num_nextn_predict_layers:
        raise ConfigError(
            f"ModelConfig.num_nextn_predict_layers = {config.num_nextn_predict_layers}: MTP layers read the scaled "
            "output of the final norm, which a rotation cannot pass through; quantise without rotation, or leave the "
            "MTP layers out",
            field="ModelConfig.num_nextn_predict_layers",
        )
    turn = orthogonal_matrix(config.d_model, seed)
    value_turn = orthogonal_matrix(config.head_size, seed + 1)
    embedding = np.asarray(params["embed_tokens"]["embedding"])
    head = embedding.T if config.tie_word_embeddings else np.asarray(params["lm_head"]["kernel"])
    scale = np.asarray(params["norm"]["scale"], np.float64)
    layers = jax.tree.map(np.array, params["layers"])
    for index in range(config.num_layers):
        _rotate_layer(jax.tree.map(lambda leaf, index=index: leaf[index], layers), turn, value_turn)
    rotated = {
        "embed_tokens": {"embedding": (embedding @ turn).astype(embedding.dtype)},
        "layers": layers,
        "norm": {"scale": np.ones_like(np.asarray(params["norm"]["scale"]))},
        "lm_head": {"kernel": (turn.T @ (scale[:, None] * head)).astype(head.dtype)},
    }
    return rotated, dataclasses.replace(config, tie_word_embeddings=False)


def _rotate_layer(layer: Params, turn: np.ndarray, value_turn: np.ndarray) -> None:
    """Rotates one layer, whose arrays are views, in place."""
    attention, mlp = layer["self_attn"], layer["mlp"]
    for norm, readers in (
        (layer["input_layernorm"], [attention[f"{name}_proj"] for name in "qkv"]),
        (layer["post_attention_layernorm"], [mlp["gate_proj"], mlp["up_proj"]]),
    ):
        scale = norm["scale"].astype(np.float64)[:, None]
        for linear in readers:
            linear["kernel"][...] = turn.T @ (scale * linear["kernel"])
        norm["scale"][...] = 1
    for linear in (attention["o_proj"], mlp["down_proj"]):
        linear["kernel"][...] = linear["kernel"] @ turn
    size = len(value_turn)
    for values in attention["v_proj"].values():  # the kernel, and a bias
        values[...] = (values.reshape(-1, size) @ value_turn).reshape(values.shape)
    heads = attention["o_proj"]["kernel"]
    heads[...] = (value_turn.T @ heads.reshape(-1, size, heads.shape[-1])).reshape(heads.shape)
