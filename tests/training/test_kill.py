"""`kill_and_resume.py` with two kills; its default is twenty."""

import pytest
from absl import logging as absl_logging
from training import kill_and_resume

pytestmark = pytest.mark.slow


def test_two_kills_leave_results_bit_identical(one_device, capsys):
    verbosity = absl_logging.get_verbosity()
    try:
        options = ["--kills=2", "--steps=100", "--checkpoint-every=20", "--seed=9"]
        assert kill_and_resume.main(options) == 0
    finally:
        absl_logging.set_verbosity(verbosity)
    out = capsys.readouterr().out
    assert "exit code -9" in out
    assert "records of 100 steps bit-identical, final states bit-identical" in out
