"""Quantisation of trained weights: GPTQ without the first tokens, smoothing, rotation, layer by layer."""
