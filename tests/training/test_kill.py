"""`kill_and_resume.py` with two kills; by hand it does twenty."""

from training import kill_and_resume


def test_two_kills_change_nothing(capsys, monkeypatch):
    # One device is enough for the killed processes, and quicker.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    assert kill_and_resume.main(["--kills=2", "--steps=600"]) == 0
    out = capsys.readouterr().out
    assert "exit code -9" in out
    assert "loss streams of 600 steps equal bit for bit, final states equal" in out
