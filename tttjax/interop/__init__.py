"""Checkpoints and reference numbers of other implementations."""
