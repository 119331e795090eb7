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

from benchmarks.pretrained import smollm2_path
from benchmarks.results import Benchmark
from cpm_jax.inference.load import LoadedModel, load_model
from cpm_jax.modeling.block import Block, run_layers
from cpm_jax.modeling.decoder import bind
from cpm_jax.modeling.rotary import rotation
from cpm_jax.planning.chips import CHIPS, Chip
from kernels_pallas.attention.api import dot_product_attention
from kernels_pallas.attention.tuned_block_sizes import block_size as splash_block
from kernels_pallas.block_selection import tuned_block_sizes as selection_sizes
from kernels_pallas.block_selection.api import select_blocks
from kernels_pallas.block_selection.selection import BlockSelection
from kernels_pallas.block_sparse_attention import tuned_block_sizes as sizes
from kernels_pallas.block_sparse_attention.arg_specs import ARG_SPECS, ArgSpec
from kernels_pallas.block_sparse_attention.tile_unions import tile_unions
from kernels_pallas.compress_keys.api import compress_keys

ROOT = Path(__file__).resolve().parents[1]
# The budgets of SmolLM2's 128 blocks: a share of 19% as at 32K, of 5% as at 128K. Below 32K everything is read.
BUDGETS = {
    32 * 1024: BlockSelection(topk=16, window_size=512),
    128 * 1024: BlockSelection(topk=4, window_size=128),
}
GOALS = {("v5p", 32 * 1024): 1.5, ("v6e", 32 * 1024): 1.5, ("v5p", 128 * 1024): 4.0, ("v6e", 128 * 1024): 4.0}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What one kernel does in all: floating-point operations of its matrix products, bytes from and to HBM."""

    flops: float
    hbm_bytes: float

    def seconds(self, chip: Chip) -> float:
        """At the chip's peaks."""
        return max(self.flops / chip.peak_flops, self.hbm_bytes / chip.hbm_bandwidth)


def splash_forward(spec: ArgSpec) -> Kernel:
    """Grid: heads, blocks of queries, blocks of keys up to the diagonal; keys and values are read for each."""
    block, pairs = _splash_pairs(spec)
    row = spec.head_dim * _itemsize(spec)
    read = spec.num_heads * (pairs * 2 * block * row + spec.seq_len * (2 * row + 4))
    return Kernel(4 * spec.num_heads * spec.head_dim * pairs * block**2, read)


def splash_backward(spec: ArgSpec) -> list[Kernel]:
    """dq as the forward pass, with three products; dk and dv with the keys outside, and four."""
    block, pairs = _splash_pairs(spec)
    row = spec.head_dim * _itemsize(spec)
    product = 2 * spec.num_heads * spec.head_dim * pairs * block**2
    dq = spec.num_heads * (pairs * 2 * block * row + spec.seq_len * (3 * row + 8))
    dkv = spec.num_heads * (pairs * block * (2 * row + 8) + spec.seq_len * 4 * row)
    return [Kernel(3 * product, dq), Kernel(4 * product, dkv)]


def splash_fused_backward(spec: ArgSpec) -> list[Kernel]:
    """Splash's other program, which our attention does not use: five products, and a part of dq for each block of keys.

    The parts are written in the type of q and read again to be added.
    """
    block, pairs = _splash_pairs(spec)
    row = spec.head_dim * _itemsize(spec)
    product = 2 * spec.num_heads * spec.head_dim * pairs * block**2
    parts = 2 * spec.num_heads * pairs * block * row
    read = spec.num_heads * (pairs * block * (2 * row + 8) + spec.seq_len * 5 * row)
    return [Kernel(5 * product, read + parts)]


def _splash_pairs(spec: ArgSpec) -> tuple[int, int]:
    block = splash_block(spec.seq_len)
    number = spec.seq_len // block
    return block, number * (number + 1) // 2


def selection(spec: ArgSpec) -> list[Kernel]:
    """The kernel of block scores, and the pass of the ranking over what it wrote."""
    chosen = BlockSelection()
    group = spec.num_heads // spec.num_kv_heads
    tile = min(2 ** int(np.log2(selection_sizes.TILE_ROWS // group)), selection_sizes.MAX_TILE)
    last = np.arange(tile, spec.seq_len + 1, tile)  # tokens that the tiles' last queries see
    fine = _rounded_up(last / chosen.kernel_stride, selection_sizes.CHUNK_BLOCKS * chosen.kernels_per_block)
    coarse = _rounded_up(last / chosen.coarse_kernel_stride, selection_sizes.COARSE_CHUNK)
    flops = 2 * spec.num_heads * spec.head_dim * tile * float((fine + coarse).sum())
    blocks = _rounded_up(np.array(spec.seq_len / chosen.block_size), selection_sizes.CHUNK_BLOCKS)
    scores = 4.0 * spec.num_kv_heads * spec.seq_len * float(blocks)
    spans = spec.seq_len // min(selection_sizes.SPAN, spec.seq_len)
    row = spec.head_dim * _itemsize(spec)
    keys = spec.num_kv_heads * row * spec.seq_len * (1 / chosen.kernel_stride + 1 / chosen.coarse_kernel_stride)
    ids = 4.0 * spec.num_kv_heads * spec.seq_len * spec.num_selected
    return [Kernel(flops, spec.num_heads * spec.seq_len * row + spans * keys + scores), Kernel(0, scores + ids)]


def sparse_forward(spec: ArgSpec, union_ratio: float) -> Kernel:
    """A tile reads the blocks of its union in groups, and its tables: numbers twice (this tile's, the next one's)."""
    blocks, rows = _read_blocks(spec, union_ratio, sizes.GROUP_KEYS // spec.block_size), _rows(spec)
    row = spec.head_dim * _itemsize(spec)
    heads = spec.num_kv_heads
    read = heads * blocks * spec.block_size * 2 * row + heads * _tables(spec, 3)
    flops = 4 * heads * rows * spec.head_dim * blocks * spec.block_size
    return Kernel(flops, read + spec.num_heads * spec.seq_len * (2 * row + 4))


def sparse_backward(spec: ArgSpec, union_ratio: float) -> list[Kernel]:
    """Five products; all queries from a range of keys on are read once for each range, with their dq so far.

    The sums of dq are in float32: each range after the first reads what all write.
    """
    row, heads, tokens = spec.head_dim * _itemsize(spec), spec.num_kv_heads, spec.num_heads * spec.seq_len
    range_keys = min(sizes.RANGE_BYTES // (2 * row), spec.seq_len)
    num_ranges = -(-spec.seq_len // range_keys)
    # A tile's entries of one range fill whole groups but for the last: half a group more for each range that it meets.
    group = sizes.RANGE_GROUP_KEYS // spec.block_size
    met = np.minimum(np.arange(sizes.TILE, spec.seq_len + 1, sizes.TILE) / range_keys + 1, num_ranges)
    blocks = _read_blocks(spec, union_ratio, 1) + float(met.sum()) * (group - 1) / 2
    flops = 10 * heads * _rows(spec) * spec.head_dim * blocks * spec.block_size
    passes = (num_ranges + 1) / 2
    read = passes * (tokens * (2 * row + 8) + heads * _tables(spec, 2)) + 4 * heads * spec.seq_len * row
    sums = (2 * passes - 1) * tokens * 4 * spec.head_dim
    return [Kernel(flops, read + sums)]


def _rows(spec: ArgSpec) -> int:
    return sizes.TILE * spec.num_heads // spec.num_kv_heads


def _read_blocks(spec: ArgSpec, union_ratio: float, group: int) -> float:
    """Blocks that the tiles of one key/value head read: at most those that exist so far, in whole groups."""
    visible = np.arange(sizes.TILE, spec.seq_len + 1, sizes.TILE) / spec.block_size
    union = np.minimum(np.ceil(visible), union_ratio * np.minimum(np.ceil(visible), spec.num_selected))
    return float(_rounded_up(union, group).sum())


def _tables(spec: ArgSpec, number: int) -> float:
    """Bytes of a head's tables: as long for each tile as its union can be."""
    entries = min(spec.seq_len // spec.block_size, sizes.TILE * spec.num_selected) + sizes.GROUP_KEYS // spec.block_size
    return 4.0 * number * entries * spec.seq_len / sizes.TILE


def _rounded_up(x: np.ndarray, multiple: int) -> np.ndarray:
    return np.ceil(x / multiple) * multiple


def _itemsize(spec: ArgSpec) -> int:
    return jnp.dtype(spec.dtype).itemsize


def union_ratios(loaded: LoadedModel, tokens: np.ndarray, budgets: Iterable[BlockSelection]) -> np.ndarray:
    """Blocks of a tile's union over blocks of one query, in the later half of a text: [L, budgets]."""
    config, budgets = dataclasses.replace(loaded.config, scan_layers=True), list(budgets)
    ids = jnp.asarray(tokens, jnp.int32)[None]
    positions = jnp.arange(len(tokens), dtype=jnp.int32)[None]

    def ratio(q: jax.Array, k: jax.Array, budget: BlockSelection) -> jax.Array:
        fine = compress_keys(k, kernel_size=budget.kernel_size, kernel_stride=budget.kernel_stride)
        coarse = compress_keys(k, kernel_size=budget.coarse_kernel_size, kernel_stride=budget.coarse_kernel_stride)
        chosen = select_blocks(q, fine, coarse, selection=budget)[:, :, len(tokens) // 2 :]
        unions = tile_unions(chosen, sizes.TILE, len(tokens) // budget.block_size, 1)
        return unions.counts.mean() / (chosen >= 0).sum(axis=-1).mean()

    @jax.jit
    def run(params: dict) -> jax.Array:
        model, angles = bind(config, params), rotation(config, positions, length=len(tokens))

        def layer(carry: tuple[jax.Array, jax.Array], block: Block, index: jax.Array | int) -> tuple:
            x, ratios = carry
            x, found = block(
                x,
                angles,
                lambda q, k, v, _: (dot_product_attention(q, k, v), jnp.stack([ratio(q, k, b) for b in budgets])),
            )
            return x, ratios.at[index].set(found)

        start = model.embed_tokens(ids), jnp.zeros((config.num_layers, len(budgets)))
        return run_layers(config, model.layers, layer, start)[1]

    return np.asarray(run(loaded.params))


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
        forward, backward = [*selection(spec), sparse_forward(spec, ratio)], sparse_backward(spec, ratio)
        sides = [
            ("selection", selection(spec), "", []),
            ("forward with selection", forward, "splash attention", [splash_forward(spec)]),
            ("backward", backward, "splash attention", splash_backward(spec)),
            ("backward", backward, "splash attention, fused", splash_fused_backward(spec)),
        ]
        for what, ours, name_of_theirs, theirs in sides:
            bench.add(
                f"{name}, {what}: bytes of HBM traffic",
                "GB",
                sum(kernel.hbm_bytes for kernel in ours) / 1e9,
                larger_is_better=False,
                baseline_name=name_of_theirs,
                baseline=sum(kernel.hbm_bytes for kernel in theirs) / 1e9 if theirs else None,
            )
            for chip in CHIPS.values():
                goal = GOALS.get((chip.name, spec.seq_len)) if theirs and name.startswith("minicpm4_8b") else None
                bench.add(
                    f"{name}, {what}, {chip.name}: estimated time",
                    "ms",
                    1e3 * sum(kernel.seconds(chip) for kernel in ours),
                    larger_is_better=False,
                    baseline_name=name_of_theirs,
                    baseline=1e3 * sum(kernel.seconds(chip) for kernel in theirs) if theirs else None,
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
    measured = union_ratios(loaded, np.asarray(tokens), BUDGETS.values())
    bench = Benchmark("sparse_roofline")
    means = dict(zip(BUDGETS, measured.mean(axis=0).tolist(), strict=True))
    for (length, budget), column in zip(BUDGETS.items(), measured.T, strict=True):
        bench.add(
            f"union of {sizes.TILE} queries over one query's blocks, SmolLM2, {budget.num_selected} of "
            f"{args.tokens // budget.block_size} blocks (as at {length // 1024}K), mean of layers "
            f"({column.min():.2f} to {column.max():.2f})",
            "ratio",
            means[length],
            larger_is_better=False,
        )
    add_rows(bench, means)
    bench.write()


if __name__ == "__main__":
    main()
