"""Sizes of the TPU and the GPU kernel.

Untuned: neither was at hand. Whoever measures on one puts the results here, by device kind.
"""

# Keys that are multiplied in one step of the grid, from blocks that lie apart: a step costs about a third of a
# microsecond however little it does, and 512 keys of 128 in bfloat16 take about as long to arrive.
STEP_KEYS = 512
# Block numbers, which lie in scalar memory (1 MiB) all at once.
MAX_BLOCK_IDS = 2**17
# Programs among which a GPU's kernel divides the lists of few queries: four for each of an H100's 132 processors.
GPU_PROGRAMS = 528
