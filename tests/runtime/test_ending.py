"""A sudden end runs the clean-ups of the open blocks, and nothing else."""

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
