"""What attention exchanges on the context axis, where each chip has a part of every row's tokens."""

import dataclasses
import math

from cpm_jax.common.sharding import MeshConfig
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.planning.workload import Candidate, Workload

# Blocks that at least one query of the last quarter of a row chose, over all blocks of the row: SmolLM2 on prose, mean
# of its layers, where a query chooses such a share of the blocks as MiniCPM4's do at 32K and at 128K
# (`benchmarks/sparse_roofline.py`).
_NEEDED = ((24 / 128, 0.79), (6 / 128, 0.54))


@dataclasses.dataclass(frozen=True)
class AttentionExchange:
    """Bytes that a chip sends in the forward pass of one layer, one way or another.

    Attributes:
        tokens_for_heads: queries there and attended values back, so that each chip has all tokens of some heads.
        heads_whole: keys and values of the heads that those queries read, gathered whole. Dense attention does these
            two.
        keys_whole: keys and values of all heads gathered whole, queries staying where they are, as sparse attention
            does.
        chosen_blocks: of those only blocks that some query of the chip chose, for the chip with the end of the row,
            which needs most; None where attention is dense.
    """

    tokens_for_heads: float
    heads_whole: float
    keys_whole: float
    chosen_blocks: float | None

    @property
    def now(self) -> float:
        """As the decoder does it."""
        return self.tokens_for_heads + self.heads_whole if self.chosen_blocks is None else self.keys_whole


def attention_exchange(model: ModelConfig, seq_len: int, rows: float, mesh: MeshConfig) -> AttentionExchange:
    """Counts the ways to exchange, in bytes that each chip sends by rings (`hlo_costs.Collective.wire_bytes`).

    Args:
        model: the model.
        seq_len: tokens of a row.
        rows: that a group of chips of the context axis has.
        mesh: sizes of the mesh axes.
    """
    tensor, context = mesh.tensor, mesh.context
    itemsize = 4 if model.dtype == "float32" else 2
    head = rows * seq_len / context * model.head_size * itemsize  # a chip's tokens of one head
    others = 1 - 1 / context
    all_to_all, gather = context / 4 * others, context * others
    # Where the axes do not divide the key and value heads, all that the tensor axis leaves together are gathered.
    num_kv_heads = model.num_kv_heads / math.gcd(model.num_kv_heads, tensor)
    divided = model.num_kv_heads % (tensor * context) == 0
    keys_whole = 2 * num_kv_heads * head * gather
    sparse = model.sparse_config
    share = None
    if sparse is not None and sparse.applies(seq_len):
        share = shard_share(sparse.selection.num_selected * sparse.block_size / seq_len)
    return AttentionExchange(
        tokens_for_heads=2 * model.num_heads / tensor * head * all_to_all,
        heads_whole=2 * num_kv_heads * head * all_to_all if divided else keys_whole,
        keys_whole=keys_whole,
        chosen_blocks=None if share is None else share * keys_whole,
    )


def exchange_of(workload: Workload, candidate: Candidate) -> AttentionExchange | None:
    """What a candidate exchanges for each micro-batch; None where it does not divide rows."""
    mesh = candidate.mesh
    if mesh.context == 1:
        return None
    rows = candidate.batch_size / (mesh.data * mesh.fsdp * candidate.num_microbatches)
    return attention_exchange(workload.model, workload.seq_len, rows, mesh)


def shard_share(chosen: float) -> float:
    """The share of other chips' blocks that the last chip needs, where a query chooses this share of all blocks.

    Measured where a chip has a quarter of the row. That quarter is its own: it needs all of it and receives none.
    """
    needed = next((needed for measured, needed in _NEEDED if measured <= chosen), _NEEDED[-1][1])
    return (needed - 1 / 4) / (1 - 1 / 4)
