"""Curation: documents in, better documents out."""
