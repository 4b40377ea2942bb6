"""`soak.py` with one fault of each kind; its default is 24 faults."""

import pytest
from absl import logging as absl_logging
from pod import soak

pytestmark = pytest.mark.slow


@pytest.mark.exhaustive
def test_a_run_survives_every_kind_of_fault_bit_identical(capsys):
    verbosity, count = absl_logging.get_verbosity(), len(soak.FAULTS)
    try:
        code = soak.main([f"--faults={count}", "--seed=1"])
    finally:
        absl_logging.set_verbosity(verbosity)
    out = capsys.readouterr().out
    assert code == 0, out
    assert out.count(": fault ") == count
    assert f"{count} faults: records and final states of " in out


def test_the_faults_are_drawn_by_the_seed():
    first, again, other = (soak.draw_faults(20, soak.random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert set(first[: len(soak.FAULTS)]) == set(soak.FAULTS)
