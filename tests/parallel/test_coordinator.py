"""Start of multi-process runs: unusable addresses and timeouts raise one-sentence errors."""

import runpy
import socket
import sys
import threading

import pytest

from tttjax.cli import main
from tttjax.errors import UserError
from tttjax.parallel import coordinator, distributed
from tttjax.runtime import progress


@pytest.fixture
def used_port():
    """A port that a program of this host listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("address", "expected"),
    [("node1:8476", ("node1", 8476)), ("[::1]:1", ("::1", 1)), ("10.0.0.1:65535", None)],
)
def test_an_address_is_host_and_port(address, expected):
    assert coordinator.split_address(address) == (expected or ("10.0.0.1", 65535))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "host:",
        ":1",
        "host:0",
        "host:65536",
        "host:x",
        "host:\uff11\uff12",
        "a:b:1",
        "::1:1",
        "",
    ],
)
def test_train_rejects_invalid_addresses(address, tmp_path, capsys):
    config = tmp_path / "mine.py"
    config.write_text("from tttjax.config import default_config as get_config\n")
    words = ["train", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    flags = [f"--coordinator={address}", "--process-id=0", "--process-count=1"]
    assert main.main([*words, *flags]) == 2
    assert "must be HOST:PORT" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_process_0_reports_a_used_port(used_port):
    with pytest.raises(UserError, match=f"port {used_port} .* is used by another program"):
        distributed.start_distributed(f"localhost:{used_port}", 0, 2)
    coordinator.check_port(free_port())


def test_a_process_id_beyond_the_count_is_refused():
    with pytest.raises(UserError, match="--process-id=2 must be from 0 to 1"):
        distributed.start_distributed("localhost:1234", 2, 2)


def test_other_processes_report_no_answer(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "JOIN_SECONDS", 0.5)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    port = free_port()
    with (
        progress.show_activity(sys.stderr),
        pytest.raises(UserError, match=f"nothing answered at --coordinator=localhost:{port} "),
    ):
        distributed.start_distributed(f"localhost:{port}", 1, 2)
    assert f"waiting for process 0 at localhost:{port}" in capsys.readouterr().err


def test_other_processes_continue_on_answer(used_port):
    coordinator.await_coordinator("localhost", used_port, 5)


def test_an_unknown_host_raises_at_once(monkeypatch):
    def unknown(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    with pytest.raises(UserError, match="there is no host 'nowhere'"):
        coordinator.await_coordinator("nowhere", 1, 100)


def test_join_timeout_exits_the_program(monkeypatch, capsys):
    """From a thread, because JAX's runtime cannot be interrupted."""
    exited, codes = threading.Event(), []

    def end(code):
        codes.append(code)
        exited.set()

    monkeypatch.setattr(coordinator.os, "_exit", end)
    with coordinator.exit_on_timeout(0.2, "they did not join"):
        assert exited.wait(5)
    assert codes[0] == 2
    assert "error: they did not join\n" in capsys.readouterr().err


def test_lm_eval_without_the_harness_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "tttjax.evaluation.lm_eval", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("tttjax.lm_eval", run_name="__main__")
    assert stop.value.code == 2
    assert "error: tttjax.lm_eval needs lm-evaluation-harness" in capsys.readouterr().err
