"""What InfLLM v2 selects by: the published numbers, and the readings of them that the sources have."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kernels_pallas.dispatch import UnsupportedError

Variant = Literal["paper", "huggingface", "cpm_cu"]
# The kernels that approximate the softmax's normaliser are four times as long and a quarter as many (128/64 beside
# 32/16; InfLLM-V2, section 3.3).
COARSENING = 4


@dataclass(frozen=True)
class BlockSelection:
    """Which key blocks a query of InfLLM v2 attends to: the names and defaults of the published `sparse_config`.

    A query at position t sees `num_selected` = |I| blocks at most (96 at the defaults): the first `init_blocks` of its
    document, the last `num_local` (its own is one of them), and of the others those with the largest scores.

    The scores of the heads that share a key/value head are added, as in InfLLM-V2; their mean, of which MiniCPM4's
    report speaks in section 2.1, ranks alike.

    Attributes:
        kernel_size: keys in one semantic kernel, whose mean stands for them.
        kernel_stride: keys from one semantic kernel's start to the next one's.
        init_blocks: blocks at the document's beginning that every query sees.
        block_size: keys in a block; a multiple of `kernel_stride`.
        window_size: recent keys that every query sees, a multiple of `block_size`.
        topk: blocks chosen by score, the initial ones included, the local ones not; all that there are where a row has
            fewer. At least 1 and `init_blocks`, and one more than `init_blocks` in "huggingface", whose last local
            block takes the place of one by score.
        variant: "paper" sees `window_size / block_size` local blocks (InfLLM-V2: 1 initial + 63 chosen + 32 local);
            "huggingface" one more and one fewer by score, out of the same number; "cpm_cu" never ranks local blocks
            and adds them to the top-k, which gives the blocks of "paper".

    Raises:
        ValueError: a field cannot work; names it, its value and what is accepted.
    """

    kernel_size: int = 32
    kernel_stride: int = 16
    init_blocks: int = 1
    block_size: int = 64
    window_size: int = 2048
    topk: int = 64
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        def refuse(field: str, accepted: str) -> None:
            raise UnsupportedError(f"block selection: {field} = {getattr(self, field)!r}: must be {accepted}")

        for field in ("kernel_size", "kernel_stride", "init_blocks", "block_size", "window_size", "topk"):
            if not isinstance(getattr(self, field), int):
                refuse(field, "an int")
        if self.kernel_stride < 1:
            refuse("kernel_stride", "at least 1")
        if self.kernel_size < self.kernel_stride:
            refuse("kernel_size", f"at least kernel_stride = {self.kernel_stride}, so that every key is in a kernel")
        if self.block_size < 1 or self.block_size % self.kernel_stride:
            refuse("block_size", f"a multiple of kernel_stride = {self.kernel_stride}")
        if self.window_size < self.block_size or self.window_size % self.block_size:
            refuse("window_size", f"a multiple of block_size = {self.block_size}, at least one block")
        if self.init_blocks < 0:
            refuse("init_blocks", "at least 0")
        if self.variant not in get_args(Variant):
            refuse("variant", f"one of {', '.join(map(repr, get_args(Variant)))}")
        if self.topk < max(self.init_blocks, 1):
            refuse("topk", f"at least 1 and init_blocks = {self.init_blocks}, which are among them")
        if self.topk + self.window_size // self.block_size < self.init_blocks + self.num_local:
            refuse(
                "topk",
                f"above init_blocks = {self.init_blocks} with variant = 'huggingface', or no local block is left",
            )

    @property
    def num_local(self) -> int:
        """Blocks up to and including the query's own that it always sees."""
        return self.window_size // self.block_size + (self.variant == "huggingface")

    @property
    def num_selected(self) -> int:
        """|I|: the most blocks that a query sees."""
        return self.topk + self.window_size // self.block_size

    @property
    def coarse_kernel_size(self) -> int:
        """Keys in one coarse kernel, of which the normaliser is taken."""
        return COARSENING * self.kernel_size

    @property
    def coarse_kernel_stride(self) -> int:
        """Keys from one coarse kernel's start to the next one's."""
        return COARSENING * self.kernel_stride

    @property
    def kernels_per_block(self) -> int:
        """Stride of the max-pool from kernels to blocks (4 at the defaults)."""
        return self.block_size // self.kernel_stride

    @property
    def pool_padding(self) -> int:
        """Kernels that begin before a block and reach into it: the max-pool's padding (1 at the defaults)."""
        return math.ceil(self.kernel_size / self.kernel_stride) - 1

    @property
    def pool_size(self) -> int:
        """Kernels that touch one block: block c is touched by kernels [stride·c - padding, stride·(c + 1)) (5)."""
        return self.kernels_per_block + self.pool_padding


def num_kernels(num_keys: int, kernel_size: int, kernel_stride: int) -> int:
    """Returns J, how many kernels lie wholly within the first `num_keys` keys."""
    return max(0, (num_keys - kernel_size) // kernel_stride + 1)
