"""Rules by which a query could choose its blocks of keys, InfLLM v2's among them, and what each choice is worth.

All rules see the same number of blocks, the query's document's first block and its last ones always. They differ in the
scores of the others, which the library ranks (`topk_blocks`), and run through the same `block_sparse_attention`.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from benchmarks.custom_attention import Implementation, LayerAttend, hidden_states, losses_of
from cpm_jax.modeling.attention import Selectors
from cpm_jax.modeling.config import ModelConfig, SparseConfig
from cpm_jax.modeling.decoder import Params, bind
from cpm_jax.modeling.sparse_attention import compress
from kernels_pallas.attention.api import dot_product_attention
from kernels_pallas.block_selection.api import block_scores, select_blocks
from kernels_pallas.block_selection.topk_blocks import topk_blocks, visible_blocks
from kernels_pallas.block_sparse_attention.api import block_sparse_attention

# "lse" and "exact" are InfLLM v2 with its approximate and with the exact normaliser; "window" is the first block and
# the last ones; "random" draws blocks anew for every query, key/value head and layer; "oracle" ranks by the attention
# itself. "tile16" and "tile64" are "lse" where so many neighbours share a choice: all rank by the scores of the first
# of them, the only ones that look at nothing after a query.
Rule = Literal["dense", "lse", "exact", "window", "random", "oracle", "tile16", "tile64"]
TILES: dict[Rule, int] = {"tile16": 16, "tile64": 64}


def sparse_config(rule: Rule, num_blocks: int) -> SparseConfig:
    """The sizes of a rule that shows a query `num_blocks` blocks of 64 keys.

    As published (1 + 63 + 32 of 96) a third of them are local; a window is all but the first.

    Args:
        rule: which one.
        num_blocks: |I|, at least 3.
    """
    local = num_blocks - 1 if rule == "window" else num_blocks // 3
    sizes = SparseConfig(dense_len=-1, lse_approximation=rule != "exact")
    return dataclasses.replace(sizes, topk=num_blocks - local, window_size=local * sizes.block_size)


def block_masses(
    q: Float[Array, "B R N H"], k: Float[Array, "B S K H"], positions: Int[Array, "B R"], block_size: int
) -> Float[Array, "B N R C"]:
    """The share of dense causal attention that each block of keys holds; the shares of a query's blocks add up to 1.

    Args:
        q: some queries.
        k: all keys.
        positions: where the queries lie among the keys.
        block_size: keys in a block.
    """
    batch, number, heads, width = q.shape
    length, kv_heads = k.shape[1:3]
    grouped = q.reshape(batch, number, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("brkgh,bskh->bkgrs", grouped, k, preferred_element_type=jnp.float32) / math.sqrt(width)
    visible = jnp.arange(length) <= positions[:, None, None, :, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).reshape(batch, heads, number, length)
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, 0), (0, -length % block_size)))
    return weights.reshape(batch, heads, number, -1, block_size).sum(axis=-1)


def mass_share(masses: Float[Array, "B N R C"], block_ids: Int[Array, "B K R I"]) -> Float[Array, "B N R"]:
    """The share of dense attention that the chosen blocks of each query hold.

    Args:
        masses: from `block_masses`.
        block_ids: distinct numbers of blocks, and -1.
    """
    ids = jnp.repeat(block_ids, masses.shape[1] // block_ids.shape[1], axis=1)
    return jnp.where(ids >= 0, jnp.take_along_axis(masses, jnp.maximum(ids, 0), axis=-1), 0.0).sum(axis=-1)


def choose(
    rule: Rule,
    sparse: SparseConfig,
    selectors: Selectors,
    positions: Int[Array, "B R"],
    key: jax.Array,
    masses: Float[Array, "B N R C"] | None = None,
) -> Int[Array, "B K R I"]:
    """The blocks of some queries of one document, as `select_blocks` returns them.

    Args:
        rule: any but "dense".
        sparse: from `sparse_config`.
        selectors: the queries [B, R, N, H], and all keys [B, S, K, H].
        positions: where the queries lie among the keys; for "tile16" and "tile64" all from 0 on.
        key: what "random" draws by.
        masses: what "oracle" ranks by, added over the heads that share keys.
    """
    q, k = selectors
    batch, length, kv_heads = k.shape[:3]
    if rule in ("lse", "exact"):
        segment_ids = jnp.ones((batch, length), jnp.int32)
        kernels = compress(k, sparse)
        return select_blocks(
            q, *kernels, selection=sparse.selection, query_positions=positions, segment_ids=segment_ids
        )
    starts, num_blocks = jnp.zeros_like(positions), math.ceil(length / sparse.block_size)
    if rule in TILES:
        # Scores of whole blocks before the tile: what lies in it is local to all of its queries.
        first = positions[:, :: TILES[rule]]
        kernels = compress(k, sparse)
        scores = block_scores(
            q[:, :: TILES[rule]],
            *kernels,
            selection=sparse.selection,
            query_positions=first,
            segment_ids=jnp.ones((batch, length), jnp.int32),
        )
        scores = jnp.repeat(scores, TILES[rule], axis=2)[:, :, : positions.shape[1]]
        return topk_blocks(scores, sparse.selection, positions, starts)
    shape = batch, kv_heads, positions.shape[1], num_blocks
    if rule == "oracle":
        if masses is None:
            raise ValueError("rule 'oracle' ranks by masses: give those of block_masses")
        scores = masses.reshape(batch, kv_heads, -1, *masses.shape[2:]).sum(axis=2)
    else:
        # The window has no other blocks to rank.
        scores = jax.random.uniform(key, shape) if rule == "random" else jnp.zeros(shape)
    visible = visible_blocks(sparse.selection, positions, starts, num_blocks)
    return topk_blocks(jnp.where(visible, scores, -jnp.inf), sparse.selection, positions, starts)


def attend_by(rule: Rule, num_blocks: int, key: jax.Array, implementation: Implementation = None) -> LayerAttend:
    """Attention by a rule; keeps nothing."""

    def attend(index: Any, q: jax.Array, k: jax.Array, v: jax.Array, selectors: Selectors) -> tuple[jax.Array, None]:
        if rule == "dense":
            return dot_product_attention(q, k, v, implementation=implementation), None
        sparse = sparse_config(rule, num_blocks)
        positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
        block_ids = choose(rule, sparse, selectors, positions, jax.random.fold_in(key, index))
        size = sparse.block_size
        return block_sparse_attention(q, k, v, block_ids, block_size=size, implementation=implementation), None

    return attend


def attend_and_weigh(
    rules: tuple[Rule, ...],
    budgets: tuple[int, ...],
    positions: Int[Array, " R"],
    key: jax.Array,
    implementation: Implementation = None,
) -> LayerAttend:
    """Dense attention; keeps of each rule, number of blocks, head and given query what share its blocks would hold.

    What is kept is [rules, budgets, B, N, R], where `positions` says which queries.
    """

    def attend(index: Any, q: jax.Array, k: jax.Array, v: jax.Array, selectors: Selectors) -> tuple[jax.Array, Array]:
        some = jnp.broadcast_to(positions, (q.shape[0], len(positions)))
        asked = selectors[0][:, positions], selectors[1]
        masses = block_masses(q[:, positions], k, some, SparseConfig().block_size)

        def share(rule: Rule, budget: int) -> Array:
            drawn = jax.random.fold_in(key, index)
            return mass_share(masses, choose(rule, sparse_config(rule, budget), asked, some, drawn, masses))

        shares = jnp.stack([jnp.stack([share(rule, budget) for budget in budgets]) for rule in rules])
        return dot_product_attention(q, k, v, implementation=implementation), shares

    return attend


def token_losses(
    config: ModelConfig,
    attend: LayerAttend,
    params: Params,
    tokens: Int[Array, "B T+1"],
    kept: Any = None,
    implementation: Implementation = None,
) -> tuple[Float[Array, "B T"], Any]:
    """The loss of each token but the first, in nats, with attention computed by `attend`.

    Args:
        config: the model.
        attend: from `attend_by` or `attend_and_weigh`.
        params: the model's parameters.
        tokens: rows of one document each.
        kept: zeros [L, ...] for what `attend` keeps of each layer, or None.
        implementation: of the loss.

    Returns:
        The losses, and `kept` filled.
    """
    model = bind(config, params)
    hidden, kept = hidden_states(model, tokens[:, :-1], attend, kept)
    targets = tokens[:, 1:]
    return losses_of(model, hidden, targets, jnp.ones(targets.shape, jnp.float32), implementation)[1], kept
