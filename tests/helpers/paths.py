"""Paths that tests need."""

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the checkout
TINY = Path(__file__).parent / "tiny_run.py"  # a recipe
