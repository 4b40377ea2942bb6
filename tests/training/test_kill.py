"""`kill_and_resume.py` with two kills; its default is twenty."""

import os
import re

import jax
import pytest
from absl import logging as absl_logging
from training import kill_and_resume

from tttjax.parallel.mesh import make_mesh
from tttjax.training import loop

pytestmark = pytest.mark.slow


@pytest.fixture
def one_device(monkeypatch):
    """Runs use one device, in this process and in others: that is faster."""
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(loop, "_make_mesh", lambda config: mesh)
    # This process has its devices by now; the others read their number here.
    flags = re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"])
    monkeypatch.setenv("XLA_FLAGS", flags)


def test_two_kills_leave_results_bit_identical(one_device, capsys):
    verbosity = absl_logging.get_verbosity()
    try:
        options = ["--kills=2", "--steps=200", "--checkpoint-every=20", "--seed=9"]
        assert kill_and_resume.main(options) == 0
    finally:
        absl_logging.set_verbosity(verbosity)
    out = capsys.readouterr().out
    assert "exit code -9" in out
    assert "records of 200 steps bit-identical, final states bit-identical" in out
