"""Fixtures of all tests of evaluation."""

from helpers.shapes import cheap_shapes  # noqa: F401 (of every module)
