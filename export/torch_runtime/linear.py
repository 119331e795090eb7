"""Linear layers: of floating-point weights, and of GPTQ's packed codes."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Kernels = Literal["torch", "triton"]
WORD = 32  # bits


class Linear(nn.Module):
    """x Wᵀ + b.

    Buffers: weight [out, in]; bias [out] or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Projects the last dimension of x."""
        return functional.linear(x, self.weight, self.bias)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Unpacks codes from words of 32 bits, the first from the lowest bits.

    Args:
        words: int32 [n, ...].
        bits: of a code.

    Returns:
        uint8 [n · 32 / bits, ...].
    """
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
    shifts = shifts.view(1, -1, *[1] * (words.ndim - 1))
    # The shift is arithmetic, so that the mask is needed of the highest code too.
    codes = (words.unsqueeze(1) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(0, 1)


class QuantizedLinear(nn.Module):
    """x W + b where W is stored as codes of a few bits with a scale and a zero point for each group of inputs.

    Attributes:
        bits: of a code.
        group_size: inputs of a group, g.
        kernels: "torch" makes W anew at each call; "triton" multiplies by the packed codes, where x is on a GPU.

    Buffers: qweight int32 [in · bits / 32, out], as in the GPTQ format; scales [in / g, out]; zeros uint8
    [in / g, out], the code of zero; bias [out] or None.
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor
    bias: Tensor | None

    def __init__(self, qweight: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, bits: int):
        super().__init__()
        self.bits = bits
        self.group_size = qweight.shape[0] * WORD // bits // scales.shape[0]
        self.kernels: Kernels = "torch"
        self.register_buffer("qweight", qweight)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self.register_buffer("bias", bias)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights that the codes stand for [in, out]: exact in float32, then rounded to `dtype`."""
        codes = unpack(self.qweight, self.bits).unflatten(0, (-1, self.group_size))
        centred = codes.float() - self.zeros.unsqueeze(1)
        return (centred * self.scales.float().unsqueeze(1)).flatten(0, 1).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Projects the last dimension of x."""
        if self.kernels == "triton" and self.bits == 4:
            from export.torch_runtime.triton_kernels.int4_matmul import int4_matmul

            out = int4_matmul(x.reshape(-1, x.shape[-1]), self.qweight, self.scales, self.zeros)
            out = out.view(*x.shape[:-1], -1)
        else:
            out = x @ self.dequantize(x.dtype)
        return out if self.bias is None else out + self.bias
