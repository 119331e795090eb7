"""A residual branch and the norm after it in one pass over memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def residual_norm_kernel(x_ptr, branch_ptr, weight_ptr, sum_ptr, out_ptr, width, multiplier, eps, WIDTH: tl.constexpr):
    """One row."""
    columns = tl.arange(0, WIDTH)
    mask = columns < width
    place = tl.program_id(0).to(tl.int64) * width + columns
    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    branch = tl.load(branch_ptr + place, mask=mask, other=0.0)
    total = (x.to(tl.float32) + branch.to(tl.float32) * multiplier).to(x.dtype)
    tl.store(sum_ptr + place, total, mask=mask)
    wide = total.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (normed * weight).to(x.dtype), mask=mask)


def residual_norm(x: Tensor, branch: Tensor, multiplier: float, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + branch · multiplier, and its RMSNorm.

    Args:
        x: residual stream [..., D].
        branch: [..., D].
        multiplier: factor on the branch.
        weight: of the norm [D].
        eps: of the norm.

    Returns:
        Both in the type of x; the sum is rounded once, and what is normalised is the rounded one.
    """
    x, branch, width = x.contiguous(), branch.contiguous(), x.shape[-1]
    total, out = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(width)
    residual_norm_kernel[(x.numel() // width,)](
        x, branch, weight, total, out, width, multiplier, eps, WIDTH=block, num_warps=min(max(block // 256, 1), 16)
    )
    return total, out
