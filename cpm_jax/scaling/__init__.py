"""Strategies found on small models: runs, sweeps, laws, and what they predict for a large one."""
