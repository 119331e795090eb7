"""Block sizes of the TPU kernel.

Untuned: no TPU was at hand. A block of 512 tokens is what the kernel's VMEM holds for head widths up to 256 in
bfloat16 (the compiler accepts it for v5e and v5p, see tests/aot/), and long enough to keep the matrix units busy.
Whoever measures on a TPU puts the results here, by device kind.
"""

MAX_BLOCK = 512
# Blocks are multiples of the vector unit's lanes.
LANES = 128


def block_size(padded_len: int) -> int:
    """Returns the largest multiple of 128 up to `MAX_BLOCK` that divides a length, itself a multiple of 128."""
    return next(size for size in range(MAX_BLOCK, 0, -LANES) if padded_len % size == 0)
