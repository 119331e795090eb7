"""InfLLM v2 on TPU beside splash attention, by one roofline for both: FLOPs and HBM bytes by the kernels' grids.

No TPU was at hand: the times are what a chip's published peaks allow, for either side. Each kernel takes the longer of
its FLOPs at the matrix units' peak and its bytes at the memory's bandwidth, and kernels run one after another. The work
of the vector unit (softmax, masks, ranking of blocks) and copies between layouts are counted on neither side.

How many blocks a tile of queries reads is measured: SmolLM2 reads a text densely, its queries and keys choose blocks,
and the union of each tile's lists is held against one query's. Its 8K tokens have 128 blocks; budgets are such that a
query sees the same share of them as with the 96 blocks of MiniCPM4 at 32K and at 128K.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from benchmarks.pretrained import smollm2_path
from benchmarks.results import Benchmark
from cpm_jax.inference.load import LoadedModel, load_model
from cpm_jax.modeling.block import Block, run_layers
from cpm_jax.modeling.decoder import bind
from cpm_jax.modeling.rotary import rotation
from cpm_jax.planning.chips import CHIPS, Chip
from kernels_pallas.attention import costs as splash_costs
from kernels_pallas.attention.api import dot_product_attention
from kernels_pallas.attention.arg_specs import ArgSpec as SplashSpec
from kernels_pallas.attention.costs import causal_pairs
from kernels_pallas.attention.tuned_block_sizes import block_size as splash_block
from kernels_pallas.block_selection.api import select_blocks
from kernels_pallas.block_selection.arg_specs import ARG_SPECS as SELECTION_SPECS
from kernels_pallas.block_selection.costs import selection_costs
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.block_sparse_attention.arg_specs import ARG_SPECS
from kernels_pallas.block_sparse_attention.costs import backward_cost, forward_cost
from kernels_pallas.block_sparse_attention.tile_unions import tile_unions
from kernels_pallas.block_sparse_attention.tuned_block_sizes import TILE
from kernels_pallas.compress_keys.api import compress_keys

ROOT = Path(__file__).resolve().parents[1]
# The budgets of SmolLM2's 128 blocks: a share of 19% as at 32K, of 5% as at 128K. Below 32K everything is read.
BUDGETS = {
    32 * 1024: BlockSelection(topk=16, window_size=512),
    128 * 1024: BlockSelection(topk=4, window_size=128),
}
GOALS = {("v5p", 32 * 1024): 1.5, ("v6e", 32 * 1024): 1.5, ("v5p", 128 * 1024): 4.0, ("v6e", 128 * 1024): 4.0}


def seconds(cost: pl.CostEstimate, chip: Chip) -> float:
    """What a kernel takes at least: the longer of its FLOPs and its bytes at the chip's peaks."""
    return max(cost.flops / chip.peak_flops, cost.bytes_accessed / chip.hbm_bandwidth)


def splash_fused_backward(spec: SplashSpec) -> list[pl.CostEstimate]:
    """Splash's other program, which our attention does not use: five products, and a part of dq for each block of keys.

    The parts are written in the type of q and read again to be added.
    """
    block = splash_block(spec.seq_len)
    pairs, row = causal_pairs(spec.seq_len, block, block), spec.head_dim * jnp.dtype(spec.dtype).itemsize
    scores = spec.num_heads * pairs * block**2
    parts = 2 * spec.num_heads * pairs * block * row
    read = spec.num_heads * (pairs * block * (2 * row + 8) + spec.seq_len * 5 * row)
    return [pl.CostEstimate(flops=10 * scores * spec.head_dim, transcendentals=scores, bytes_accessed=read + parts)]


def overlaps(
    loaded: LoadedModel, tokens: np.ndarray, budgets: Iterable[BlockSelection]
) -> tuple[np.ndarray, np.ndarray]:
    """How much the lists of a text's queries overlap, in each layer and for each budget.

    Returns:
        Blocks of a tile's union over blocks of one query, in the later half of the text; and the share of all blocks
        that at least one query of the last quarter chose. Both [L, budgets].
    """
    config, budgets = dataclasses.replace(loaded.config, scan_layers=True), list(budgets)
    ids = jnp.asarray(tokens, jnp.int32)[None]
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]

    def overlap(q: jax.Array, k: jax.Array, budget: BlockSelection) -> jax.Array:
        fine = compress_keys(k, kernel_size=budget.kernel_size, kernel_stride=budget.kernel_stride)
        coarse = compress_keys(k, kernel_size=budget.coarse_kernel_size, kernel_stride=budget.coarse_kernel_stride)
        chosen = select_blocks(q, fine, coarse, selection=budget)[:, :, len(tokens) // 2 :]
        num_blocks = len(tokens) // budget.block_size
        unions = tile_unions(chosen, TILE, num_blocks, 1)
        quarter = chosen[:, :, len(tokens) // 4 :]
        needed = (quarter[..., None] == jnp.arange(num_blocks)).any(axis=(2, 3))
        return jnp.stack([unions.counts.mean() / (chosen >= 0).sum(axis=-1).mean(), needed.mean()])

    @jax.jit
    def run(params: dict) -> jax.Array:
        model, angles = bind(config, params), rotation(config, positions, length=len(tokens))

        def layer(carry: tuple[jax.Array, jax.Array], block: Block, index: jax.Array | int) -> tuple:
            x, overlaps = carry
            x, found = block(
                x,
                angles,
                lambda q, k, v, _: (
                    dot_product_attention(q, k, v),
                    jnp.stack([overlap(q, k, b) for b in budgets], axis=1),
                ),
                model.multipliers.residual,
            )
            return x, overlaps.at[index].set(found)

        embedded = model.embed_tokens(ids, model.multipliers.embedding)
        start = embedded, jnp.zeros((config.num_layers, 2, len(budgets)))
        return run_layers(config, model.layers, layer, start)[1]

    ratios, shares = np.moveaxis(np.asarray(run(loaded.params)), 1, 0)
    return ratios, shares


def add_rows(bench: Benchmark, ratios: dict[int, float]) -> None:
    """Adds, for each model shape, length and chip, the times of both sides.

    Args:
        bench: where to.
        ratios: union ratio at each length; in between and below that of the next longer one.
    """
    for name, spec in ARG_SPECS.items():
        if not name.startswith("minicpm4"):
            continue
        ratio = ratios[min(length for length in ratios if length >= spec.seq_len)]
        dense = SplashSpec(1, spec.seq_len, spec.num_heads, spec.num_kv_heads, spec.head_dim)
        selection = selection_costs(SELECTION_SPECS[name])
        forward, backward = [*selection, forward_cost(spec, ratio)], [backward_cost(spec, ratio)]
        sides: list[tuple[str, list, str, list]] = [
            ("selection", selection, "", []),
            ("forward with selection", forward, "splash attention", [splash_costs.forward_cost(dense)]),
            ("backward", backward, "splash attention", splash_costs.backward_costs(dense)),
            ("backward", backward, "splash attention, fused", splash_fused_backward(dense)),
        ]
        for what, ours, name_of_theirs, theirs in sides:
            bench.add(
                f"{name}, {what}: bytes of HBM traffic",
                "GB",
                sum(kernel.bytes_accessed for kernel in ours) / 1e9,
                larger_is_better=False,
                baseline_name=name_of_theirs,
                baseline=sum(kernel.bytes_accessed for kernel in theirs) / 1e9 if theirs else None,
            )
            for chip in CHIPS.values():
                goal = GOALS.get((chip.name, spec.seq_len)) if theirs and name.startswith("minicpm4_8b") else None
                bench.add(
                    f"{name}, {what}, {chip.name}: estimated time",
                    "ms",
                    1e3 * sum(seconds(kernel, chip) for kernel in ours),
                    larger_is_better=False,
                    baseline_name=name_of_theirs,
                    baseline=1e3 * sum(seconds(kernel, chip) for kernel in theirs) if theirs else None,
                    goal=goal,
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the unions, counts, and writes `results/sparse_roofline.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a long text; default: the pages of docs/, one after another")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args(argv)
    pages = [args.text] if args.text else sorted((ROOT / "docs").glob("*.md"))
    loaded = load_model(smollm2_path())
    tokens = loaded.tokenizer.encode("\n\n".join(page.read_text("utf-8") for page in pages))[: args.tokens]
    if len(tokens) < args.tokens:
        parser.error(f"--text: has {len(tokens)} tokens: must have {args.tokens}")
    ratios, shares = overlaps(loaded, np.asarray(tokens), BUDGETS.values())
    bench = Benchmark("sparse_roofline")
    means = dict(zip(BUDGETS, ratios.mean(axis=0).tolist(), strict=True))
    for measured, what, unit in (
        (ratios, f"union of {TILE} queries over one query's blocks", "ratio"),
        (shares, "blocks that at least one query of the last quarter chose", "share"),
    ):
        for (length, budget), column in zip(BUDGETS.items(), measured.T, strict=True):
            bench.add(
                f"{what}, SmolLM2, {budget.num_selected} of {args.tokens // budget.block_size} blocks (as at "
                f"{length // 1024}K), mean of layers ({column.min():.2f} to {column.max():.2f})",
                unit,
                float(column.mean()),
                larger_is_better=False,
            )
    add_rows(bench, means)
    bench.write()


if __name__ == "__main__":
    main()
