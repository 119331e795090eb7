"""Sizes of the TPU and GPU kernels.

Untuned: no TPU was at hand. Chosen by the compiler: does it fit the vector memory of v4, the smallest?
"""

# Rows of a tile, heads of a group times queries; queries are a power of two of them.
TILE_ROWS = 1024
MAX_TILE = 256
# Blocks scored at once: the lanes of a row of scores.
CHUNK_BLOCKS = 128
# Coarse kernels whose scores exist at once.
COARSE_CHUNK = 256
# Vector memory that the compiler gives to the kernel on v4, in bytes.
MAX_VMEM_BYTES = 16 * 2**20
# Queries whose block scores are ranked at once: at 128K keys 16 MiB of scores for each key/value head.
SPAN = 2048

# Of the GPU's scoring, by bytes of a number: rows of a tile, kernels and blocks scored at once, warps of a program.
# Chosen so that no GPU's compiler runs out of registers (`tests/aot/test_sparse_gpu.py`).
GPU_ROWS = {2: 64, 4: 16}
GPU_CHUNK = {2: 32, 4: 16}
GPU_WARPS = {2: 4, 4: 8}
GPU_STAGES = 1
# Programs among which the blocks of few queries are divided: four for each of an H100's 132 processors.
GPU_PROGRAMS = 528
# Block scores, in bytes, that are in memory at once.
GPU_SPAN_BYTES = 2**28
