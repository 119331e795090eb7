"""Quantisation of trained weights: GPTQ and P-GPTQ, smoothing, rotation, layer by layer."""
