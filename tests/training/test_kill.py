"""`kill_and_resume.py` with two kills; its default is twenty."""

import re

import pytest
from absl import logging as absl_logging
from training import kill_and_resume

pytestmark = pytest.mark.slow


@pytest.mark.exhaustive
def test_two_kills_leave_results_bit_identical(one_device, capsys):
    verbosity = absl_logging.get_verbosity()
    try:
        # By this seed both kills fall at about a third of the steps, after some checkpoints.
        options = ["--kills=2", "--steps=100", "--checkpoint-every=10", "--seed=9"]
        assert kill_and_resume.main(options) == 0
    finally:
        absl_logging.set_verbosity(verbosity)
    out = capsys.readouterr().out
    assert "exit code -9" in out
    assert re.search("2 kills, [12] resumes", out)
    assert "records of 100 steps bit-identical, final states bit-identical" in out
