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
    once for each MTP layer, but not the embedding lookup, norms and biases. Attention adds 12·N·H·`visible_keys` for
    each layer: scores and weighted values take 2·N·H each for every visible key, times 3 with the backward pass.
    (Dense that is 6·N·H·seq_len; PaLM's formula, arXiv 2204.02311 appendix B, has 12 as it counts the masked half.)
    Where attention is sparse, choosing the blocks adds `selection_flops_per_token`, without a backward pass.
    Recomputation by remat is not counted, nor what a kernel computes beyond each query's own blocks, nor are shorter
    documents in a packed row.

    Args:
        config: of the model.
        seq_len: length of a row, in tokens.
    """
    layers = config.num_layers + config.num_nextn_predict_layers
    heads = 1 + config.num_nextn_predict_layers
    flat = jax.tree_util.tree_leaves_with_path({k: v for k, v in abstract_params(config).items() if k != "lm_head"})
    matrices = sum(math.prod(leaf.shape) for path, leaf in flat if path[-1].key == "kernel")
    matrices += heads * config.d_model * config.vocab_size
    attention = 12 * config.num_heads * config.head_size * visible_keys(config, seq_len)
    return 6 * matrices + round(layers * (attention + selection_flops_per_token(config, seq_len)))


def visible_keys(config: ModelConfig, seq_len: int) -> float:
    """Keys that a query of a causal row attends to, on average: all before it, or at most its chosen blocks.

    A query at position t sees t keys up to the W tokens of its blocks, so that the mean over T positions is
    W·(1 - W/2T); dense attention is W = T.
    """
    chosen = seq_len
    if config.sparse_config is not None and config.sparse_config.applies(seq_len):
        chosen = min(config.sparse_config.selection.num_selected * config.sparse_config.block_size, seq_len)
    return chosen * (1 - chosen / (2 * seq_len))


def selection_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations by which a query of one layer chooses its blocks; 0 where attention is dense.

    2·N·H for every semantic kernel before it, and for every one that normalises their scores.
    """
    sparse = config.sparse_config
    if sparse is None or not sparse.applies(seq_len):
        return 0.0
    normalising = sparse.selection.coarse_kernel_stride if sparse.lse_approximation else sparse.kernel_stride
    kernels = seq_len / 2 * (1 / sparse.kernel_stride + 1 / normalising)
    return 2 * config.num_heads * config.head_size * kernels


def train_state_bytes(config: ModelConfig) -> StateBytes:
    """Bytes of parameters, gradients and AdamW's moments."""
    params = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_params(config)))
    return StateBytes(params=params, gradients=params, optimizer=2 * params)


def _size(tree: object) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
