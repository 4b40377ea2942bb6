"""Activity messages of slow commands, on a terminal and in a file."""

import contextlib
import io
import sys
import time

import pytest

from tttjax.evaluation.progress import Progress
from tttjax.runtime import progress


@pytest.fixture
def stream():
    stream = io.StringIO()
    with progress.show_activity(stream):
        yield stream


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_slow_activity_is_reported_with_its_seconds(stream):
    with progress.report_activity("compiling", last_seconds=41.6, quiet_seconds=0.02):
        wait_for(stream.getvalue)
    assert stream.getvalue().startswith("compiling: 0 s (the last time it took 42 s)\n")


def test_pauses_grow_in_a_file(stream):
    with progress.report_activity("compiling", quiet_seconds=0.02):
        wait_for(lambda: stream.getvalue().count("\n") >= 4)
        started = time.monotonic()
        wait_for(lambda: stream.getvalue().count("\n") >= 5)
    assert time.monotonic() - started > 0.08


def test_fast_activity_prints_nothing(stream):
    with progress.report_activity("compiling"):
        pass
    assert stream.getvalue() == ""


def test_output_restarts_the_quiet_period():
    with printing() as stream, progress.report_activity("steps", quiet_seconds=0.5):
        started = time.monotonic()
        while time.monotonic() - started < 0.7:
            time.sleep(0.01)
            print(".", end="")
        assert set(stream.getvalue()) == {"."}


def test_activity_can_be_renamed(stream):
    with progress.report_activity("first", quiet_seconds=0.02):
        progress.rename_activity("second")
        wait_for(stream.getvalue)
    assert stream.getvalue().startswith("second: 0 s\n")


def test_activity_without_a_name_prints_nothing(stream):
    with progress.report_activity("", quiet_seconds=0.01):
        time.sleep(0.1)
    assert stream.getvalue() == ""


def test_only_the_innermost_activity_reports(stream):
    with (
        progress.report_activity("outer", quiet_seconds=0.02),
        progress.report_activity("inner", quiet_seconds=0.02),
    ):
        wait_for(lambda: stream.getvalue().count("inner") >= 2)
    assert "outer" not in stream.getvalue()


@contextlib.contextmanager
def printing(**methods):
    """A stream for all output; entered within the test, because pytest changes sys.stdout."""
    stream = io.StringIO()
    vars(stream).update(methods)
    with (
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        progress.show_activity(stream),
    ):
        yield stream


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of twenty columns; a context, as `printing`."""
    monkeypatch.setenv("COLUMNS", "20")
    return lambda: printing(isatty=lambda: True)


def screen(terminal):
    """The visible lines, if nothing wraps."""
    return [line.rpartition("\r\x1b[K")[2] for line in terminal.getvalue().split("\n")]


def says(terminal, what):
    return screen(terminal)[-1].startswith(f"{what}: ")


def test_terminal_line_is_renewed_and_erased(terminal):
    with terminal() as shown, progress.report_activity("compiling", quiet_seconds=0.02):
        wait_for(lambda: shown.getvalue().count("compiling") >= 2)
    assert "\n" not in shown.getvalue()
    assert shown.getvalue().endswith("\r\x1b[K")


def test_output_has_its_own_line(terminal):
    with terminal() as shown, progress.report_activity("reading", quiet_seconds=0.02):
        wait_for(lambda: says(shown, "reading"))
        print("a line")
        wait_for(lambda: says(shown, "reading"))
        progress.rename_activity("writing")
        wait_for(lambda: says(shown, "writing"))
        print("error: another", file=sys.stderr)
    assert screen(shown) == ["a line", "error: another", ""]


def test_unfinished_line_is_restored(terminal):
    with terminal() as shown, progress.report_activity("reading", quiet_seconds=0.02):
        print("\r\x1b[Kstep 1/3", end="")
        wait_for(lambda: says(shown, "reading"))
        print("  loss 2.5", end="")
        wait_for(lambda: says(shown, "reading"))
    assert screen(shown) == ["step 1/3  loss 2.5"]


def test_wrapped_unfinished_line_is_not_erased(terminal):
    with terminal() as shown, progress.report_activity("reading", quiet_seconds=0.02):
        print("x" * 20, end="")
        wait_for(lambda: says(shown, "reading"))
    assert screen(shown) == ["x" * 20, ""]


def test_line_is_never_wider_than_the_terminal(terminal):
    with (
        terminal() as shown,
        progress.report_activity("compiling for " + "x" * 30, last_seconds=3, quiet_seconds=0.02),
    ):
        wait_for(lambda: screen(shown)[-1])
    lines = shown.getvalue().split("\r\x1b[K")
    assert max(len(line) for line in lines) < 20


def test_stream_to_another_output_is_not_wrapped(terminal):
    with (
        terminal() as shown,
        contextlib.redirect_stdout(io.StringIO()),
        progress.show_activity(shown),
        progress.report_activity("reading", quiet_seconds=0.02),
    ):
        wait_for(lambda: says(shown, "reading"))
        print("to a file")
        assert says(shown, "reading")


def test_silent_without_show_activity(capsys):
    with progress.report_activity("compiling", quiet_seconds=0.001):
        time.sleep(0.05)
    assert capsys.readouterr() == ("", "")


def test_eta_of_an_evaluation_excludes_compilation(monkeypatch):
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
