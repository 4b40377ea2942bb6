"""Which steps are profiled: those of the configuration, and those that a file asks for."""

import time
from types import SimpleNamespace

import jax
import pytest

from tttjax.training import profiler as profiler_module
from tttjax.training.hosts import Hosts
from tttjax.training.profiler import PROFILE_DIR, REQUEST, Profiler
from tttjax.training.start_account import StartAccount


@pytest.fixture
def traced(monkeypatch):
    """The folders of traces that were begun, and None for each end."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", calls.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(None))
    return calls


def run_steps(profiler, first, last, traced):
    """The steps after which a trace has begun or ended, and how many calls there were then."""
    seen = []
    for step in range(first, last + 1):
        profiler.before(step)
        profiler.after(step, ())
        seen.append((step, len(traced)))
    return seen


def test_the_steps_of_the_configuration(tmp_path, traced):
    with Profiler((2, 3), tmp_path, Hosts(StartAccount()), print) as profiler:
        assert run_steps(profiler, 1, 4, traced) == [(1, 0), (2, 1), (3, 2), (4, 2)]
    assert traced == [str(tmp_path / PROFILE_DIR), None]


def test_an_unfinished_trace_ends_with_the_run(tmp_path, traced):
    with Profiler((2, 9), tmp_path, Hosts(StartAccount()), print) as profiler:
        run_steps(profiler, 1, 4, traced)
    assert traced[-1] is None


def test_each_request_file_traces_the_next_steps(tmp_path, traced, monkeypatch):
    monkeypatch.setattr(profiler_module, "LOOK_SECONDS", 0.01)
    lines, hosts = [], Hosts(StartAccount())
    with Profiler((), tmp_path, hosts, lines.append) as profiler:
        for done in (0, 20):
            hosts.account.finish(done)
            (tmp_path / REQUEST).touch()
            while (tmp_path / REQUEST).exists() or profiler._message == profiler._seen:
                time.sleep(0.01)
            traced.clear()
            first = done + 2
            seen = run_steps(profiler, done + 1, done + 10, traced)
            assert [step for step, calls in seen if calls == 1] == [*range(first, first + 4)]
            assert len(traced) == 2
    assert lines[0] == f"profiling steps 2 to 6 into {tmp_path / PROFILE_DIR}"


def test_a_late_message_traces_as_many_steps(tmp_path, traced):
    with Profiler((), tmp_path, Hosts(StartAccount()), print) as profiler:
        profiler._pod = SimpleNamespace(heartbeats=SimpleNamespace(message="3"))
        assert run_steps(profiler, 7, 13, traced)[:6] == [
            (7, 1),
            (8, 1),
            (9, 1),
            (10, 1),
            (11, 2),
            (12, 2),
        ]
