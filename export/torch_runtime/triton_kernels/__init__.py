"""Triton kernels for what takes the time on a GPU; each computes what a function of plain PyTorch beside it does."""
