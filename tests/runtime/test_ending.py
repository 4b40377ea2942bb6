"""A sudden end runs the clean-ups of the open blocks, and nothing else."""

import threading

from tttjax.runtime import ending


def test_clean_ups_run_innermost_first(monkeypatch):
    calls = []
    monkeypatch.setattr(ending.os, "_exit", calls.append)

    def fails(code):
        calls.append("fails")
        raise OSError("a disk that is gone")

    with ending.at_sudden_end(lambda _: calls.append("closed")):
        pass
    with ending.at_sudden_end(lambda code: calls.append(code + 1)), ending.at_sudden_end(fails):
        ending.end_process(76)
    assert calls == ["fails", 77, 76]


def test_a_clean_up_that_hangs_does_not_keep_the_process(monkeypatch):
    calls, released = [], threading.Event()
    monkeypatch.setattr(ending.os, "_exit", calls.append)
    monkeypatch.setattr(ending, "CLEAN_UP_SECONDS", 0.01)
    with ending.at_sudden_end(lambda _: released.wait(60)):
        ending.end_process(76)
    assert calls == [76]
    released.set()
