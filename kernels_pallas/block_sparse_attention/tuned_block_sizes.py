"""Sizes of the TPU and GPU kernels.

Those of the TPU are untuned: none was at hand. Chosen by the compiler (does it fit the vector memory of v4, the
smallest?) and by `benchmarks/sparse_roofline.py`. Whoever measures on a TPU puts the results here, by device kind.
"""

# Queries of a tile; at most 32, as each has one bit of an int32. With 16 heads to a key head that is 512 rows.
TILE = 32
# Keys that are multiplied at once, from blocks that lie apart: fills the matrix unit, whatever the size of a block.
GROUP_KEYS = 512
# The same in the backward pass over ranges of keys, where a tile's lists are shorter and the last group is filled less.
RANGE_GROUP_KEYS = 256
# Keys and values whose gradients are held in vector memory while the queries pass, in bytes: 4,096 tokens at a head
# width of 128 in bfloat16. With the result and float32 sums that is 8 MiB.
RANGE_BYTES = 2 * 2**20
# Tiles of queries that one step of that pass takes.
TILES_PER_STEP = 4
# Sums of dq in vector memory, a step's each: the one being added to, the one that comes and the one that goes.
DQ_BUFFERS = 3

# Of the GPU kernels, by bytes of a number: rows of a product, queries of a tile times the heads of a group; and warps
# of a program. Those of two bytes are the fastest of six settings on an H100, at 32K tokens of MiniCPM4-8B: 8 warps for
# "dkv", which then needs no memory beside its registers, took 1.15 times as long forward and backward, 128 rows 1.08
# times. Those of four bytes are chosen by the compiler: products in float32 are sums in registers.
GPU_ROWS = {2: 64, 4: 16}
GPU_WARPS = {
    2: {"forward": 4, "dq": 4, "dkv": 4},
    4: {"forward": 16, "dq": 16, "dkv": 16},
}
# Blocks on their way.
GPU_STAGES = 2
