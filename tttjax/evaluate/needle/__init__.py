"""Needle tests: is what was read once still known, by context length and by needle distance?

RULER's three single-needle tasks, with learning on and off. docs/evaluation.md says how.
"""

from tttjax.evaluate.needle.asked import NeedleSettings, needle_tests
from tttjax.evaluate.needle.files import write_needle
from tttjax.evaluate.needle.results import NeedleResults
from tttjax.evaluate.needle.tables import sentence, table

__all__ = ["NeedleResults", "NeedleSettings", "needle_tests", "sentence", "table", "write_needle"]
