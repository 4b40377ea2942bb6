"""`kill_and_resume.py` with two kills; its default is twenty."""

import pytest
from training import kill_and_resume

pytestmark = pytest.mark.slow


def test_two_kills_leave_results_bit_identical(capsys, monkeypatch):
    # One device is enough for the killed processes, and faster.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert kill_and_resume.main(["--kills=2", "--steps=600"]) == 0
    out = capsys.readouterr().out
    assert "exit code -9" in out
    assert "records of 600 steps bit-identical, final states bit-identical" in out
