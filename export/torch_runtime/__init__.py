"""Runs exported folders in PyTorch, on GPUs and CPUs, without JAX: docs/torch_runtime.md."""
