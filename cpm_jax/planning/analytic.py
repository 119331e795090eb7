"""Memory and time of a candidate from formulas, in microseconds instead of minutes: says which ones to compile."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from cpm_jax.common.sharding import MeshConfig
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import count_params
from cpm_jax.planning.chips import Topology
from cpm_jax.planning.exchange import attention_exchange
from cpm_jax.planning.workload import Candidate, Remat, Workload
from kernels_pallas.attention import costs as dense_costs
from kernels_pallas.attention.arg_specs import ArgSpec as DenseSpec
from kernels_pallas.block_selection.arg_specs import ArgSpec as SelectionSpec
from kernels_pallas.block_selection.costs import scores_cost, tile_queries
from kernels_pallas.block_sparse_attention import costs as sparse_costs
from kernels_pallas.block_sparse_attention.arg_specs import ArgSpec as SparseSpec
from kernels_pallas.sparse_decode_attention.arg_specs import ArgSpec as DecodeSpec
from kernels_pallas.sparse_decode_attention.costs import decode_cost

# Of the chip's memory, what a candidate may fill by the formulas: they leave out fragmentation and small buffers.
FILL = 0.9
# Below so many rows in a device's part, XLA for TPU gathers a matrix by summing it over zeros: twice the bytes, and
# not beside computation.
_FEWEST_ROWS = 32
# What is kept without remat over what "dots" keeps, as compiled for MiniCPM4-8B.
_NONE_TO_DOTS = 3.5
# Rows of so many tokens are divided too. What the formulas say of shorter ones on the context axis has not been held
# against compiled programs.
_CONTEXT_FROM = 65_536
# What the matrix units reach of their peak in the formulas; only the order of the candidates depends on it.
_EFFICIENCY = 0.75


@dataclasses.dataclass(frozen=True)
class Guess:
    """What the formulas say of a candidate.

    Attributes:
        candidate: the candidate.
        memory: bytes per chip.
        seconds: of a step.
    """

    candidate: Candidate
    memory: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class AttentionFlops:
    """FLOPs of attention for one row, all layers, as the kernels compute it: in whole blocks.

    Attributes:
        forward: of the forward pass, once.
        backward: of the backward pass.
        selection: of choosing blocks, where attention is sparse: once, as no policy of remat repeats it.
    """

    forward: float
    backward: float
    selection: float = 0.0


def attention_flops(model: ModelConfig, seq_len: int) -> AttentionFlops:
    """Counts attention, MTP layers included, by the costs of the kernels that run on TPU."""
    layers = model.num_layers + model.num_nextn_predict_layers
    shape = (1, seq_len, model.num_heads, model.num_kv_heads, model.head_size, model.dtype)
    sparse = model.sparse_config
    if sparse is None or not sparse.applies(seq_len):
        dense = DenseSpec(*shape)
        backward = sum(cost.flops for cost in dense_costs.backward_costs(dense))
        return AttentionFlops(layers * dense_costs.forward_cost(dense).flops, layers * backward)
    chosen = sparse.selection
    rows = SparseSpec(*shape, sparse.block_size, min(chosen.num_selected, math.ceil(seq_len / sparse.block_size)))
    scores = scores_cost(SelectionSpec(*shape, chosen), seq_len, lse_approximation=sparse.lse_approximation)
    return AttentionFlops(
        layers * sparse_costs.forward_cost(rows).flops,
        layers * sparse_costs.backward_cost(rows).flops,
        layers * scores.flops,
    )


def layer_matrix_sizes(model: ModelConfig) -> dict[str, int]:
    """Number of elements of the matrices of one layer, by name."""
    d, q, kv = model.d_model, model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    return {"q": d * q, "k": d * kv, "v": d * kv, "o": q * d, "gate": d * model.d_ff, "up": d * model.d_ff} | {
        "down": model.d_ff * d
    }


def train_flops(model: ModelConfig, seq_len: int, rows: int, remat: Remat) -> float:
    """Matrix FLOPs of a training step as it runs: 6·N·tokens, attention by whole blocks, and what remat repeats.

    N are the parameters that are multiplied with: the matrices of all layers, and the head once for the next token and
    once for each MTP layer. Full remat repeats a layer but its last product, which nothing needs; "dots" repeats
    attention.
    """
    layers, depth = model.num_layers + model.num_nextn_predict_layers, model.num_nextn_predict_layers
    matrices = layer_matrix_sizes(model)
    per_layer = sum(matrices.values())
    head = (1 + depth) * model.d_model * model.vocab_size
    projections = depth * 2 * model.d_model**2
    flops = 6.0 * (layers * per_layer + head + projections) * rows * seq_len
    attention = attention_flops(model, seq_len)
    flops += rows * (attention.forward + attention.backward + attention.selection)
    if remat != "none":
        # MTP layers are not rematerialised.
        flops += rows * attention.forward * model.num_layers / layers
    if remat == "full":
        flops += 2.0 * model.num_layers * (per_layer - matrices["down"]) * rows * seq_len
    return flops


def _chosen_bytes(model: ModelConfig, seq_len: int) -> int:
    """Of the block numbers of a token and layer, which every policy of remat keeps; 0 where attention is dense."""
    sparse = model.sparse_config
    if sparse is None or not sparse.applies(seq_len):
        return 0
    return 4 * model.num_kv_heads * min(sparse.selection.num_selected, math.ceil(seq_len / sparse.block_size))


def _train_guess(workload: Workload, candidate: Candidate, topology: Topology) -> Guess:
    model, chip = workload.model, topology.chip
    data, fsdp, tensor, context = candidate.mesh.sizes
    counts = count_params(model)
    tokens = candidate.batch_size * workload.seq_len / (data * fsdp * context * candidate.num_microbatches)
    layers, d = model.num_layers + model.num_nextn_predict_layers, model.d_model
    matrices = layer_matrix_sizes(model)
    wide = {"dots": 1.0, "none": _NONE_TO_DOTS, "full": 0.0}[candidate.remat]
    dots = (2 * d + (2 * model.num_kv_heads + model.num_heads) * model.head_size + 2 * model.d_ff) / tensor
    kept = model.num_layers * tokens * 2 * (d + wide * (dots + d))
    kept += model.num_nextn_predict_layers * tokens * 2 * (d + _NONE_TO_DOTS * (dots + d))
    kept += layers * tokens * _chosen_bytes(model, workload.seq_len) / min(tensor, model.num_kv_heads)
    working = tokens * 2 * 2.5 * (dots + 4 * d) + 3 * 2 * sum(matrices.values()) / tensor
    # The whole head and its gradient, the logits of a chunk of tokens, the gradient of the embedding.
    head = d * model.vocab_size * (2 + 4 + 4) / tensor + 3 * 2**28
    parts = fsdp * tensor
    memory = counts.total * 16 / parts + kept + working + head

    chips = topology.num_chips
    flops = train_flops(model, workload.seq_len, candidate.batch_size, candidate.remat) / chips
    compute = flops / (chip.peak_flops * _EFFICIENCY) + counts.total * 7 * 4 / parts / chip.hbm_bandwidth
    weights = 2.0 * counts.total / tensor
    gathered = 2 * candidate.num_microbatches * weights * (1 - 1 / fsdp) / topology.bandwidth(fsdp)
    beside = max(compute, gathered) if d / fsdp >= _FEWEST_ROWS else compute + 2 * gathered
    scattered = candidate.num_microbatches * weights * (1 - 1 / fsdp) / topology.bandwidth(fsdp)
    copies = data * context
    scattered += 2 * weights / fsdp * (1 - 1 / copies) / topology.bandwidth(copies)
    activations = candidate.num_microbatches * layers * tokens * d * 2
    repeats = 6 if candidate.remat == "full" else 4
    reduced = repeats * 2 * activations * (1 - 1 / tensor) / topology.bandwidth(tensor)
    passes = 2 if candidate.remat == "none" else 3
    rows = candidate.batch_size / (data * fsdp)
    exchanged = layers * passes * attention_exchange(model, workload.seq_len, rows, candidate.mesh).now
    return Guess(candidate, memory, beside + scattered + reduced + exchanged / topology.bandwidth(context))


def _cache_bytes(model: ModelConfig, seq_len: int) -> tuple[float, float]:
    """Of one sequence, all layers and heads: what its full cache takes, and what a token reads of it."""
    keys = 2.0 * model.num_layers * model.num_kv_heads * seq_len * model.head_size
    sparse = model.sparse_config
    if sparse is None or not sparse.applies(seq_len):
        return 2 * keys, 2 * keys
    chosen, shape = sparse.selection, (1, seq_len, model.num_heads, model.num_kv_heads, model.head_size, model.dtype)
    copies = 2 + sparse.use_nope + 1 / chosen.kernel_stride
    copies += 1 / chosen.coarse_kernel_stride if sparse.lse_approximation else 0
    attending = decode_cost(DecodeSpec(*shape, block_size=sparse.block_size, num_selected=chosen.num_selected))
    # A single query fills up a tile.
    tile = tile_queries(model.num_heads // model.num_kv_heads)
    choosing = scores_cost(SelectionSpec(*shape, chosen), tile, lse_approximation=sparse.lse_approximation)
    return copies * keys, model.num_layers * float(attending.bytes_accessed + choosing.bytes_accessed)


def _decode_guess(workload: Workload, candidate: Candidate, topology: Topology) -> Guess:
    model, chip = workload.model, topology.chip
    data, fsdp, tensor, _ = candidate.mesh.sizes
    rows = candidate.batch_size / (data * fsdp)
    weights = 2.0 * count_params(model).total / tensor
    heads = model.num_kv_heads / (tensor if model.num_kv_heads % tensor == 0 else 1)
    held, read = (rows * heads / model.num_kv_heads * size for size in _cache_bytes(model, workload.seq_len))
    flops = 2 * rows * count_params(model).non_embedding / tensor
    time = max((weights + read) / chip.hbm_bandwidth, flops / chip.peak_flops)
    reduced = 4 * model.num_layers * rows * model.d_model * 2 * (1 - 1 / tensor) / topology.bandwidth(tensor)
    gathered = weights * (1 - 1 / fsdp) / topology.bandwidth(fsdp)
    return Guess(candidate, weights / fsdp + held * 1.5, time + reduced + gathered)


def guess(workload: Workload, candidate: Candidate, topology: Topology) -> Guess:
    """Says what a candidate needs, roughly."""
    return (_train_guess if workload.kind == "train" else _decode_guess)(workload, candidate, topology)


def _powers_of_two(limit: int) -> list[int]:
    return [2**n for n in range(int(math.log2(max(limit, 1))) + 1)]


def meshes(workload: Workload, topology: Topology) -> list[MeshConfig]:
    """All meshes on the chips that divide the model and the row; decoding does without fsdp.

    The context axis is tried for long rows. Tensor and context parts together divide the heads, so that every chip
    attends for a part of them.
    """
    model, chips, found = workload.model, topology.num_chips, []
    heads = _powers_of_two(min(chips, model.num_heads, 16))
    long = workload.kind == "train" and workload.seq_len >= _CONTEXT_FROM
    for tensor, context in itertools.product(heads, heads if long else [1]):
        parts = tensor * context
        if any(size % tensor for size in (model.d_ff, model.vocab_size)) or workload.seq_len % context:
            continue
        if parts > heads[-1] or chips % parts or model.num_heads % parts:
            continue
        for fsdp in _powers_of_two(chips // parts) if workload.kind == "train" else [1]:
            if chips % (parts * fsdp) == 0 and model.d_model % fsdp == 0:
                found.append(MeshConfig(chips // (parts * fsdp), fsdp, tensor, context))
    return found


def candidates(
    workload: Workload,
    topology: Topology,
    batch_sizes: Sequence[int],
    remats: Sequence[Remat],
    mesh_choices: Sequence[MeshConfig] = (),
) -> list[Guess]:
    """All candidates that the formulas let fit, best first; where none fits, those that need least memory first.

    Args:
        workload: what runs.
        topology: on what.
        batch_sizes: rows per step to choose from.
        remats: policies to choose from.
        mesh_choices: meshes to choose from; none takes all of `meshes`.
    """
    found: list[Guess] = []
    for mesh in mesh_choices or meshes(workload, topology):
        groups = mesh.data * mesh.fsdp
        for rows in batch_sizes:
            for remat in remats if workload.kind == "train" else ("none",):
                most = rows // groups if rows % groups == 0 else 0
                tried = [
                    guess(workload, Candidate(mesh, rows, parts, remat), topology)
                    for parts in (range(1, most + 1) if workload.kind == "train" else [1])
                    if most and most % parts == 0
                ]
                # More micro-batches only cost time: the fewest that fit.
                fitting = [t for t in tried if t.memory <= FILL * topology.chip.hbm_bytes]
                found += fitting[:1] or tried[-1:]
    fits = [g for g in found if g.memory <= FILL * topology.chip.hbm_bytes]
    if not fits:
        return sorted(found, key=lambda g: g.memory)

    def order(guess: Guess) -> tuple[int, int, int, float]:
        """By time for a row; within a hundredth of it rather fewer micro-batches, and the smaller batch."""
        seconds, candidate = guess.seconds / guess.candidate.batch_size, guess.candidate
        return round(100 * math.log(seconds)), candidate.num_microbatches, candidate.batch_size, seconds

    return sorted(fits, key=order)
