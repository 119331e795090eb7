"""Attention of a few new queries over chosen blocks of a KV cache."""
