"""What a slow part of a command says while it is silent, on a terminal and in a file."""

import io
import time

import pytest

from tttjax import progress
from tttjax.evaluate.progress import Progress


@pytest.fixture
def stream():
    stream = io.StringIO()
    with progress.speaking(stream):
        yield stream


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_slow_work_is_named_with_its_seconds(stream):
    with progress.doing("compiling", last_seconds=41.6, quiet_seconds=0.02):
        wait_for(stream.getvalue)
    assert stream.getvalue().startswith("compiling: 0 s (the last time it took 42 s)\n")


def test_pauses_grow_in_a_file(stream):
    with progress.doing("compiling", quiet_seconds=0.02):
        wait_for(lambda: stream.getvalue().count("\n") >= 4)
        started = time.monotonic()
        wait_for(lambda: stream.getvalue().count("\n") >= 5)
    assert time.monotonic() - started > 0.08


def test_terminal_line_is_renewed_and_erased(stream):
    stream.isatty = lambda: True
    with progress.doing("compiling", quiet_seconds=0.02):
        wait_for(lambda: stream.getvalue().count("compiling") >= 2)
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_fast_work_says_nothing(stream):
    with progress.doing("compiling"):
        pass
    assert stream.getvalue() == ""


def test_progress_shown_elsewhere_restarts_the_silence(stream):
    with progress.doing("steps", quiet_seconds=0.5):
        started = time.monotonic()
        while time.monotonic() - started < 0.7:
            time.sleep(0.01)
            progress.shown()
        assert stream.getvalue() == ""


def test_part_goes_on_under_another_name(stream):
    with progress.doing("first", quiet_seconds=0.02):
        progress.now("second")
        wait_for(stream.getvalue)
    assert stream.getvalue().startswith("second: 0 s\n")


def test_part_without_a_name_is_mute(stream):
    with progress.doing("", quiet_seconds=0.01):
        time.sleep(0.1)
    assert stream.getvalue() == ""


def test_only_the_innermost_speaks(stream):
    with (
        progress.doing("outer", quiet_seconds=0.02),
        progress.doing("inner", quiet_seconds=0.02),
    ):
        wait_for(lambda: stream.getvalue().count("inner") >= 2)
    assert "outer" not in stream.getvalue()


def test_silent_unless_the_command_line_asks(capsys):
    with progress.doing("compiling", quiet_seconds=0.001):
        time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_eta_of_an_evaluation_leaves_compilation_out(monkeypatch):
    clock = iter([60.0, 61.0, 161.0, 162.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stream = io.StringIO()
    stream.isatty = lambda: True
    bar = Progress(total=80, stream=stream)
    for what in ("one program", "another"):
        bar.doing(what, cost=1)
        bar.add(10)  # compiled first
        bar.add(10)
    lines = stream.getvalue().split("\r\x1b[K")[1:]
    assert lines[0] == "evaluate  12%  one program"
    assert lines[1].endswith("10 tok/s  eta 0:00:06")
    assert lines[3].endswith("10 tok/s  eta 0:00:04")
