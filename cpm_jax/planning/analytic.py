"""Memory and time of a candidate from formulas, in microseconds instead of minutes: says which ones to compile."""

import dataclasses
import math
from collections.abc import Sequence

from cpm_jax.common.sharding import MeshConfig
from cpm_jax.modeling.config import ModelConfig
from cpm_jax.modeling.model_size import count_params
from cpm_jax.planning.chips import Topology
from cpm_jax.planning.workload import Candidate, Remat, Workload

# Of the chip's memory, what a candidate may fill by the formulas: they leave out fragmentation and small buffers.
FILL = 0.9
# Below so many rows in a device's part, XLA for TPU gathers a matrix by summing it over zeros: twice the bytes, and
# not beside computation.
_FEWEST_ROWS = 32
# What is kept without remat over what "dots" keeps, as compiled for MiniCPM4-8B.
_NONE_TO_DOTS = 3.5
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


def attention_flops(model: ModelConfig, seq_len: int, products: int, block: int = 512) -> float:
    """FLOPs of attention for one row, all layers: so many matrix products of each pair of blocks, masked ones left out.

    Args:
        model: the model, its MTP layers included.
        seq_len: tokens of the row.
        products: 2 for the forward pass (scores, values), 7 for the backward pass of the TPU kernel (3 for queries, 4
            for keys and values).
        block: side of the kernel's blocks.
    """
    block = next((size for size in range(block, 0, -128) if seq_len % size == 0), seq_len)
    blocks = seq_len // block
    pairs = blocks * (blocks + 1) / 2
    layers = model.num_layers + model.num_nextn_predict_layers
    return 2.0 * products * layers * model.num_heads * pairs * block**2 * model.head_size


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
    flops += rows * attention_flops(model, seq_len, 9)
    if remat != "none":
        # MTP layers are not rematerialised.
        share = model.num_layers / layers
        flops += rows * attention_flops(model, seq_len, 2) * share
    if remat == "full":
        flops += 2.0 * model.num_layers * (per_layer - matrices["down"]) * rows * seq_len
    return flops


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
    scattered += 2 * weights / fsdp * (1 - 1 / data) / topology.bandwidth(data)
    activations = candidate.num_microbatches * layers * tokens * d * 2
    repeats = 6 if candidate.remat == "full" else 4
    reduced = repeats * 2 * activations * (1 - 1 / tensor) / topology.bandwidth(tensor)
    keys = 3 * activations * (1 - 1 / context) * context / topology.bandwidth(context)
    return Guess(candidate, memory, beside + scattered + reduced + keys)


def _decode_guess(workload: Workload, candidate: Candidate, topology: Topology) -> Guess:
    model, chip = workload.model, topology.chip
    data, fsdp, tensor, _ = candidate.mesh.sizes
    rows = candidate.batch_size / (data * fsdp)
    weights = 2.0 * count_params(model).total / tensor
    heads = model.num_kv_heads / (tensor if model.num_kv_heads % tensor == 0 else 1)
    cache = 2 * 2.0 * model.num_layers * rows * heads * workload.seq_len * model.head_size
    flops = 2 * rows * count_params(model).non_embedding / tensor
    time = max((weights + cache) / chip.hbm_bandwidth, flops / chip.peak_flops)
    reduced = 4 * model.num_layers * rows * model.d_model * 2 * (1 - 1 / tensor) / topology.bandwidth(tensor)
    gathered = weights * (1 - 1 / fsdp) / topology.bandwidth(fsdp)
    return Guess(candidate, weights / fsdp + cache * 1.5, time + reduced + gathered)


def guess(workload: Workload, candidate: Candidate, topology: Topology) -> Guess:
    """Says what a candidate needs, roughly."""
    return (_train_guess if workload.kind == "train" else _decode_guess)(workload, candidate, topology)


def _powers_of_two(limit: int) -> list[int]:
    return [2**n for n in range(int(math.log2(max(limit, 1))) + 1)]


def meshes(workload: Workload, topology: Topology) -> list[MeshConfig]:
    """All meshes of data, fsdp and tensor axes on the chips that divide the model; decoding does without fsdp."""
    model, chips, found = workload.model, topology.num_chips, []
    for tensor in _powers_of_two(min(chips, model.num_heads, 16)):
        if any(size % tensor for size in (chips, model.num_heads, model.d_ff, model.vocab_size)):
            continue
        for fsdp in _powers_of_two(chips // tensor) if workload.kind == "train" else [1]:
            if chips % (tensor * fsdp) == 0 and model.d_model % fsdp == 0:
                found.append(MeshConfig(data=chips // (tensor * fsdp), fsdp=fsdp, tensor=tensor))
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
