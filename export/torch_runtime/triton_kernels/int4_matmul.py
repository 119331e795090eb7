"""Products with 4-bit weights that stay packed: codes become numbers in registers, tile by tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs that keep a GPU busy: where the tiles of the output are fewer, the inputs are divided as well.
PROGRAMS = 256
LEAST = 16  # rows, columns and depth of a product that Triton gives to tensor cores
MOST_PLACES = 2**31  # of a tensor, as they are counted by 32 bits


@triton.jit
def int4_matmul_kernel(
    x_ptr,
    qweight_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    group_size,
    steps_per_split,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """One tile of the output, over the inputs of one split; INPUTS divides the group size."""
    split = tl.program_id(2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row_mask, output_mask = rows < num_rows, outputs < num_outputs
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    last = tl.minimum((split + 1) * steps_per_split, num_inputs // INPUTS)
    for step in range(split * steps_per_split, last):
        inputs = step * INPUTS + tl.arange(0, INPUTS)
        x = tl.load(x_ptr + rows[:, None] * num_inputs + inputs[None, :], mask=row_mask[:, None], other=0.0)
        words = tl.load(
            qweight_ptr + (inputs // 8)[:, None] * num_outputs + outputs[None, :], mask=output_mask[None, :], other=0
        )
        codes = (words >> ((inputs % 8) * 4)[:, None]) & 15
        group = step * INPUTS // group_size * num_outputs + outputs
        zeros = tl.load(zeros_ptr + group, mask=output_mask, other=0).to(tl.int32)
        scales = tl.load(scales_ptr + group, mask=output_mask, other=0.0).to(tl.float32)
        # Centred codes are exact in 16 bits; the scale is a factor of the sum.
        centred = (codes - zeros[None, :]).to(tl.float32).to(x.dtype)
        total += tl.dot(x, centred, input_precision="ieee") * scales[None, :]
    # Whole tiles of a long output may lie beyond what 32 bits count.
    place = (split.to(tl.int64) * num_rows + rows[:, None]) * num_outputs + outputs[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & output_mask[None, :])


def tiles(num_rows: int, group_size: int) -> dict[str, int]:
    """Sizes of a tile, and the warps of a program, among whose registers it is divided.

    Raises:
        ValueError: groups that no tile divides.
    """
    inputs = min(group_size & -group_size, 64)
    if inputs < LEAST:
        raise ValueError(f"group_size = {group_size}: the int4 kernel takes multiples of {LEAST}; use kernels 'torch'")
    rows = LEAST if num_rows <= LEAST else 32 if num_rows <= 32 else 64
    many = rows == 64
    return {"ROWS": rows, "OUTPUTS": 128 if many else 64, "INPUTS": inputs, "num_warps": 8 if many else 4}


def stages(dtype: torch.dtype) -> int:
    """Steps of a loop whose tiles are in memory at once: of four bytes a number GPUs with 99 KiB have room for one."""
    return 1 if dtype == torch.float32 else 3


def int4_matmul(x: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """x W for the weights of a `QuantizedLinear` of 4 bits.

    Args:
        x: [M, in].
        qweight: int32 [in / 8, out].
        scales: [in / g, out].
        zeros: uint8 [in / g, out].

    Returns:
        [M, out] in the type of x; summed in float32.

    Raises:
        ValueError: groups of a size that is no multiple of 16.
    """
    if x.numel() > MOST_PLACES and len(x) > 1:
        return torch.cat([int4_matmul(part, qweight, scales, zeros) for part in x.chunk(2)])
    (num_rows, num_inputs), num_outputs = x.shape, qweight.shape[1]
    group_size = num_inputs // scales.shape[0]
    sizes = tiles(num_rows, group_size)
    grid = triton.cdiv(num_outputs, sizes["OUTPUTS"]), triton.cdiv(num_rows, sizes["ROWS"])
    steps = num_inputs // sizes["INPUTS"]
    splits = max(1, min(steps, PROGRAMS // (grid[0] * grid[1])))
    kind = x.dtype if splits == 1 else torch.float32
    out = torch.empty(splits, num_rows, num_outputs, dtype=kind, device=x.device)
    int4_matmul_kernel[(*grid, splits)](
        x.contiguous(),
        qweight,
        scales,
        zeros,
        out,
        num_rows,
        num_outputs,
        num_inputs,
        group_size,
        triton.cdiv(steps, splits),
        **sizes,
        num_stages=stages(x.dtype),
    )
    return out[0] if splits == 1 else out.sum(dim=0).to(x.dtype)
