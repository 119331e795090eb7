"""Draws sparse_attention.svg: how InfLLM v2 chooses blocks for one query, and what all queries of a row see.

Scores and blocks are those of `kernels_pallas/block_selection` on small made-up keys, in which a query's own topic came
up twice before. Run it in the repository: python -m docs.images.sparse_attention
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from kernels_pallas.block_selection.api import block_scores, select_blocks
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.compress_keys.api import compress_keys

# A cell is 16 tokens: kernels of 32 tokens at a stride of 16, blocks of 64, as published; fewer blocks.
SELECTION = BlockSelection(kernel_size=2, kernel_stride=1, block_size=4, window_size=8, topk=3)
BLOCKS = 12
CELLS = BLOCKS * SELECTION.block_size
QUERY = CELLS - 2
INITIAL, CHOSEN, LOCAL, UNSEEN = "#1f5fa8", "#d1661c", "#12806a", "#e9edf1"
INK, SOFT = "#1b2430", "#5b6675"
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "cpm_jax", "font.family": "sans-serif", "font.size": 9}


def made_up() -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys [1, CELLS, heads, H] of one key/value head: topics of about two blocks, some of which return."""
    rng = np.random.default_rng(7)
    topics = rng.standard_normal((6, 8))
    of_block = [0, 1, 1, 2, 3, 3, 1, 4, 4, 5, 5, 1]
    topic = topics[np.repeat(of_block, SELECTION.block_size)]
    k = topic + 0.8 * rng.standard_normal((CELLS, 8))
    q = topic[:, None] + 0.5 * rng.standard_normal((CELLS, 2, 8))
    return q[None].astype(np.float32), k[None, :, None].astype(np.float32)


def kind(block: int, query_block: int) -> str:
    """The colour of a block that a query sees, by why it does."""
    if block < SELECTION.init_blocks:
        return INITIAL
    return LOCAL if block > query_block - SELECTION.num_local else CHOSEN


def draw_query(ax: Axes, kernel_scores: np.ndarray, pooled: np.ndarray, seen: list[int]) -> None:
    """Keys, kernels, scores and blocks of one query, from top to bottom."""
    query_block = QUERY // SELECTION.block_size
    rows = {"keys": 9.2, "kernels": 7.2, "kernel": 4.4, "block": 1.6, "visible": -0.4}
    for cell in range(CELLS):
        color = "#c9d2dc" if cell <= QUERY else "white"
        ax.add_patch(Rectangle((cell, rows["keys"]), 1, 0.7, facecolor=color, edgecolor="white", linewidth=1))
    for j in range(QUERY - SELECTION.kernel_size + 2):
        y = rows["kernels"] + 0.55 * (j % 2)
        ax.add_patch(Rectangle((j + 0.1, y), SELECTION.kernel_size - 0.2, 0.38, facecolor="#8a97a6"))
        height = 2.2 * kernel_scores[j] / kernel_scores.max()
        ax.add_patch(Rectangle((j + 0.6, rows["kernel"]), 0.8, height, facecolor="#8a97a6"))
    for block in range(BLOCKS):
        left, width = block * SELECTION.block_size, SELECTION.block_size
        if block <= query_block:
            height = 2.2 * pooled[block] / pooled[: query_block + 1].max()
            color = kind(block, query_block) if block in seen else "#b9c2cd"
            ax.add_patch(Rectangle((left + 0.3, rows["block"]), width - 0.6, height, facecolor=color))
        color = kind(block, query_block) if block in seen else UNSEEN
        ax.add_patch(Rectangle((left + 0.1, rows["visible"]), width - 0.2, 1.1, facecolor=color))
        ax.plot([left, left], [rows["visible"], rows["keys"] + 0.7], color="#d5dbe2", linewidth=0.6, zorder=0)
    words = {
        "keys": "keys, in cells of 16 tokens",
        "kernels": "semantic kernels: means of 32 keys, stride 16",
        "kernel": "softmax over kernels, summed over the heads of the group",
        "block": "of the kernels that touch a block the largest (max-pool 5/4/1)",
        "visible": "blocks of 64 that the query attends to: initial, local, and the best of the others",
    }
    heights = {"keys": 0.9, "kernels": 1.15, "kernel": 2.35, "block": 2.35, "visible": 1.3}
    for number, (name, text) in enumerate(words.items(), 1):
        ax.text(0, rows[name] + heights[name], f"{number}  {text}", color=SOFT, va="bottom")
    ax.annotate(
        "query",
        (QUERY + 0.5, rows["keys"] + 0.7),
        (QUERY + 0.5, rows["keys"] + 1.7),
        color=INK,
        ha="center",
        arrowprops={"arrowstyle": "->", "color": INK},
    )
    ax.set(xlim=(-0.5, CELLS + 0.5), ylim=(-0.8, 11.4))
    ax.axis("off")


def draw_row(ax: Axes, ids: np.ndarray) -> None:
    """Which blocks each query sees: a row for each, as an attention mask is drawn."""
    for query in range(CELLS):
        query_block = query // SELECTION.block_size
        for block in range(query_block + 1):
            color = kind(block, query_block) if block in ids[query] else UNSEEN
            last = min(SELECTION.block_size, query + 1 - block * SELECTION.block_size)
            ax.add_patch(Rectangle((block * SELECTION.block_size, query), last, 1, facecolor=color, linewidth=0))
    for edge in range(0, CELLS + 1, SELECTION.block_size):
        ax.plot([edge, edge], [edge, CELLS], color="white", linewidth=1)
        ax.plot([0, edge], [edge, edge], color="white", linewidth=0.6)
    ax.set(xlim=(0, CELLS), ylim=(CELLS, 0), aspect="equal", xticks=[], yticks=[])
    ax.set_xlabel("keys", color=SOFT)
    ax.set_ylabel("queries", color=SOFT)
    for side in ax.spines.values():
        side.set_visible(False)
    names = {"initial": INITIAL, "best by score": CHOSEN, "local": LOCAL, "not read": UNSEEN}
    ax.legend(
        handles=[Patch(color=color, label=name) for name, color in names.items()], frameon=False, loc="upper right"
    )


def main() -> None:
    """Writes the picture beside this file."""
    q, k = map(jnp.asarray, made_up())
    kernels = compress_keys(k, kernel_size=SELECTION.kernel_size, kernel_stride=SELECTION.kernel_stride)
    ids = np.asarray(select_blocks(q, kernels, None, selection=SELECTION))[0, 0]
    pooled = np.asarray(block_scores(q, kernels, None, selection=SELECTION))[0, 0, QUERY]
    scores = np.einsum("gh,jh->gj", np.asarray(q)[0, QUERY], np.asarray(kernels)[0, :QUERY, 0]) / np.sqrt(8)
    kernel_scores = (np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)).sum(axis=0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.55, 1))
        draw_query(left, kernel_scores, pooled, [int(c) for c in ids[QUERY] if c >= 0])
        draw_row(right, ids)
        figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
