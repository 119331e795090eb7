"""How large a model is: exact parameter counts, FLOPs of training per token, bytes of the training state."""

import math
from typing import NamedTuple

import jax

from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.decoder import abstract_params


class ParamCounts(NamedTuple):
    """Numbers of parameters.

    Attributes:
        total: all of them, MTP layers included.
        embedding: the token embedding and, where it is not tied, the language-model head.
        non_embedding: total - embedding; what scaling laws and the names of the small family count.
        mtp: those of the MTP layers, which an inference without speculation does not need.
    """

    total: int
    embedding: int
    non_embedding: int
    mtp: int


class StateBytes(NamedTuple):
    """Bytes of a training state, over all devices together.

    Attributes:
        params: the parameters in `param_dtype`.
        gradients: one gradient of each, in `param_dtype`.
        optimizer: AdamW's two moments, in `param_dtype`.
    """

    params: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it, at the moment of the update."""
        return self.params + self.gradients + self.optimizer


def count_params(config: ModelConfig) -> ParamCounts:
    """Counts the parameters of a model from their shapes; no array is made."""
    sizes = {group: _size(tree) for group, tree in abstract_params(config).items()}
    total, embedding = sum(sizes.values()), sizes["embed_tokens"] + sizes.get("lm_head", 0)
    return ParamCounts(total, embedding, total - embedding, sizes.get("mtp_layers", 0))


def train_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of the forward and backward pass for one token, as model-FLOP utilisation counts them.

    6 per parameter that is multiplied with (2 forward, 4 backward): all matrices, the head once for the next token and
    once for each MTP layer, but not the embedding lookup, norms and biases. Attention adds 6·N·H·seq_len for each
    layer: scores and weighted values take 2·N·H each for every visible key, times 3 with the backward pass, and a
    causal query sees seq_len / 2 keys on average. (PaLM's formula, arXiv 2204.02311 appendix B, has 12 instead of 6
    as it counts the masked half.) Recomputation by remat is not counted, nor are shorter documents in a packed row.

    Args:
        config: of the model.
        seq_len: length of a row, in tokens.
    """
    layers = config.num_layers + config.num_nextn_predict_layers
    heads = 1 + config.num_nextn_predict_layers
    flat = jax.tree_util.tree_leaves_with_path({k: v for k, v in abstract_params(config).items() if k != "lm_head"})
    matrices = sum(math.prod(leaf.shape) for path, leaf in flat if path[-1].key == "kernel")
    matrices += heads * config.d_model * config.vocab_size
    return 6 * matrices + 6 * layers * config.num_heads * config.head_size * seq_len


def train_state_bytes(config: ModelConfig) -> StateBytes:
    """Bytes of parameters, gradients and AdamW's moments."""
    params = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_params(config)))
    return StateBytes(params=params, gradients=params, optimizer=2 * params)


def _size(tree: object) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
