"""Block selection of InfLLM v2: for each query and key/value head the key blocks it attends to."""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.block_selection import pallas_gpu, pallas_tpu, reference, xla
from kernels_pallas.block_selection.selection import BlockSelection, num_kernels
from kernels_pallas.dispatch import UnsupportedError, check_sizes, check_types, choose_implementation

Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]
_IMPLEMENTATIONS = {"reference": reference, "xla": xla, "pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}


def select_blocks(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B J K H"],
    k_coarse: Float[Array, "B J2 K H"] | None,
    *,
    selection: BlockSelection,
    scale: float | None = None,
    query_positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    implementation: Implementation | None = None,
) -> Int[Array, "B K T I"]:
    """Chooses the blocks of keys that each query attends to, one list for the G heads of a key/value head.

    InfLLM-V2 (arXiv 2509.24663), section 3: each head's softmax over the semantic kernels, added over the group; of
    the kernels that touch a block the largest; initial and local blocks before all others; the best |I|, of equal
    scores the lowest block first. A query sees the kernels that lie wholly in its document and wholly at or before its
    position, and the blocks from its document's first key to its own. No gradient flows.

    Args:
        q: queries. Head n belongs to key/value head n // (N/K).
        k_compressed: semantic kernels of the keys (`compress_keys` with `selection.kernel_size` and `kernel_stride`).
        k_coarse: kernels of `selection.coarse_kernel_size` and `coarse_kernel_stride`, of which the softmax's
            normaliser is taken: a quarter of the work of the exact one. All scores of a head then differ from the
            exact ones by one factor per query (about 4). A query that sees no coarse kernel has the score 0
            everywhere. None takes the exact softmax.
        selection: sizes, numbers of blocks, and the reading of the sources.
        scale: factor on the scores; None takes 1/sqrt(H).
        query_positions: where each query lies among the keys; None for a whole sequence, where query t is key t.
            A negative position is a query that sees nothing.
        segment_ids: document of each key; a document is a run of equal ids. None means one document.
        implementation: "reference" holds all scores; "xla" those of a tile of queries; "pallas_tpu" is for TPU,
            "pallas_gpu" for a GPU. None takes the kernel of the platform that the program is for where it supports the
            arguments, else "xla", and logs its choice once.

    Returns:
        Block numbers in ascending order, -1 at the end where a query has fewer. I is `selection.num_selected`, or the
        number of blocks C if that is smaller: a `topk` beyond the blocks of a short row is meant to choose them all, as
        one model reads rows of any length. C is ceil(S / block_size); where S is not known from the arguments, the
        largest S that has J kernels.

    Raises:
        ValueError: for shapes that do not fit together, and an `implementation` that does not exist or cannot run.
    """
    args = _arguments(q, k_compressed, k_coarse, selection, scale, query_positions, segment_ids)
    return _IMPLEMENTATIONS[_choose(implementation, *args)].select_blocks(*args)


def block_scores(
    q: Float[Array, "B T N H"],
    k_compressed: Float[Array, "B J K H"],
    k_coarse: Float[Array, "B J2 K H"] | None,
    *,
    selection: BlockSelection,
    scale: float | None = None,
    query_positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B K T C"]:
    """Computes the scores by which `select_blocks` ranks, for tests and analysis: T·C of them are held at once.

    Arguments and errors are those of `select_blocks`.

    Returns:
        The largest score of the kernels that touch each block, summed over the heads of the group, in
        float32; 0 where no such kernel is visible, -inf for blocks after the query or of another document. Initial and
        local blocks have their scores like the others.
    """
    args = _arguments(q, k_compressed, k_coarse, selection, scale, query_positions, segment_ids)
    return _IMPLEMENTATIONS[_choose(implementation, *args)].block_scores(*args)


def document_starts(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Returns for each token the position of its document's first one, where a document is a run of equal ids."""
    position = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    begins = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    return lax.cummax(jnp.where(begins, position, 0), axis=1)


def _arguments(
    q: Array,
    k_compressed: Array,
    k_coarse: Array | None,
    selection: BlockSelection,
    scale: float | None,
    query_positions: Array | None,
    segment_ids: Array | None,
) -> tuple:
    """Checks the arguments and returns those of the implementations."""
    if (
        q.ndim != 4
        or k_compressed.ndim != 4
        or q.shape[0] != k_compressed.shape[0]
        or q.shape[3] != k_compressed.shape[3]
    ):
        raise UnsupportedError(
            f"block selection: q has shape {q.shape} and k_compressed {k_compressed.shape}: must be [B, T, N, H] and "
            "[B, J, K, H]"
        )
    integers = {"query_positions": query_positions, "segment_ids": segment_ids}
    check_types("block selection", {"q": q, "k_compressed": k_compressed}, integers)
    check_sizes("block selection", q=q.shape, k_compressed=(*k_compressed.shape[:1], *k_compressed.shape[2:]))
    if q.shape[2] % k_compressed.shape[2]:
        raise UnsupportedError(
            f"block selection: q has {q.shape[2]} heads: must be a multiple of the {k_compressed.shape[2]} key heads"
        )
    batch, length = q.shape[:2]
    if query_positions is not None and query_positions.shape != (batch, length):
        raise UnsupportedError(
            f"block selection: query_positions has shape {query_positions.shape}: must be [B, T] = {(batch, length)}"
        )
    if segment_ids is not None and (segment_ids.ndim != 2 or segment_ids.shape[0] != batch):
        raise UnsupportedError(f"block selection: segment_ids has shape {segment_ids.shape}: must be [B, S]")
    num_keys = _num_keys(q, k_compressed, selection, query_positions, segment_ids)
    expected = {"k_compressed": (k_compressed, selection.kernel_size, selection.kernel_stride)}
    if k_coarse is not None:
        expected["k_coarse"] = (k_coarse, selection.coarse_kernel_size, selection.coarse_kernel_stride)
    for name, (kernels, size, stride) in expected.items():
        shape = (batch, num_kernels(num_keys, size, stride), *k_compressed.shape[2:])
        # Without the number of keys only the fine kernels tell it: to within a stride, which may or may not hold the
        # coarse kernels' last one.
        known = query_positions is None or segment_ids is not None
        fewest = num_kernels(num_keys if known else num_keys - selection.kernel_stride + 1, size, stride)
        if kernels.shape[:1] + kernels.shape[2:] != shape[:1] + shape[2:] or not fewest <= kernels.shape[1] <= shape[1]:
            raise UnsupportedError(
                f"block selection: {name} has shape {kernels.shape}: {num_keys} keys have {shape}, means of {size} "
                f"keys at a stride of {stride}"
            )
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if query_positions is None:
        query_positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        starts = jnp.zeros((batch, length), jnp.int32)
    else:
        starts = jnp.take_along_axis(document_starts(segment_ids), jnp.maximum(query_positions, 0), axis=1)
    q, k_compressed, k_coarse = jax.tree.map(lax.stop_gradient, (q, k_compressed, k_coarse))
    num_blocks = math.ceil(num_keys / selection.block_size)
    return q, k_compressed, k_coarse, scale, selection, query_positions, starts, num_blocks


def _num_keys(
    q: Array, k_compressed: Array, selection: BlockSelection, query_positions: Array | None, segment_ids: Array | None
) -> int:
    if segment_ids is not None:
        if query_positions is None and segment_ids.shape[1] != q.shape[1]:
            raise UnsupportedError(
                f"block selection: segment_ids has shape {segment_ids.shape} and q {q.shape}: without query_positions "
                "queries and keys are the same tokens"
            )
        return segment_ids.shape[1]
    if query_positions is None:
        return q.shape[1]
    return selection.kernel_stride * k_compressed.shape[1] + selection.kernel_size - 1


def _choose(
    implementation: Implementation | None,
    q: Array,
    k_compressed: Array,
    k_coarse: Array | None,
    scale: float,
    selection: BlockSelection,
    *places: Any,
) -> str:
    unsupported = {
        "pallas_tpu": pallas_tpu.unsupported_reason(q, k_compressed, k_coarse, selection),
        "pallas_gpu": pallas_gpu.unsupported_reason(q, k_compressed, num_blocks=places[-1]),
    }
    return choose_implementation("block_selection", implementation, get_args(Implementation), unsupported)
