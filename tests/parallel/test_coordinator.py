"""Start of multi-process runs: unusable addresses and timeouts raise one-sentence errors."""

import runpy
import socket
import sys
import threading
import time

import pytest

from tttjax.cli import main
from tttjax.errors import UserError
from tttjax.parallel import coordinator, distributed
from tttjax.parallel.pod import TimeLimits
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


def meet(port, count=2, ids=(0, 1), counts=(), seconds=5.0):
    """Each process's host names, or its error, from threads that meet at a port."""
    results = [None] * len(ids)

    def join(i, process_id, count):
        try:
            results[i] = coordinator.call_roll(f"127.0.0.1:{port}", process_id, count, seconds)
        except UserError as error:
            results[i] = str(error)

    threads = [
        threading.Thread(target=join, args=(i, process_id, counts[i] if counts else count))
        for i, process_id in enumerate(ids)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_processes_meet_whatever_their_order():
    hosts = [socket.gethostname()] * 4
    assert meet(free_port(), 4, (3, 1, 0, 2)) == [hosts] * 4


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"ids": (0, 1, 1), "count": 3}, "--process-id=1 was given twice"),
        ({"counts": (2, 3)}, "--process-count=3, and process 0"),
        ({"ids": (0, 2), "count": 4, "seconds": 1.5}, "processes 1, 3 of 4 did not join"),
    ],
)
def test_every_process_reports_a_start_that_cannot_work(options, phrase):
    errors = meet(free_port(), **options)
    assert all(phrase in error for error in errors)


def connect(port):
    """A connection to a port that is about to open."""
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"nothing at {port}")


def test_a_process_that_ends_while_others_wait_may_come_again():
    port, hosts = free_port(), [socket.gethostname()] * 3
    results = []
    first = threading.Thread(target=lambda: results.extend(meet(port, 3, (0,), seconds=20)))
    first.start()
    with connect(port) as leaves:
        leaves.sendall(b'{"process": 1, "count": 3, "host": "b"}\n')
    with connect(port) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n\n")
        assert stranger.recv(100) == b""
    assert meet(port, 3, (1, 2)) == [hosts] * 2
    first.join()
    assert results == [hosts]


def test_process_0_reports_a_used_port(used_port):
    with pytest.raises(UserError, match=f"port {used_port} .* is used by another program"):
        coordinator.call_roll(f"localhost:{used_port}", 0, 2, 5)


def test_a_process_id_beyond_the_count_is_refused():
    with (
        pytest.raises(UserError, match="--process-id=2 must be from 0 to 1"),
        distributed.start_distributed("localhost:1234", 2, 2),
    ):
        pass


def test_time_limits_are_a_second_or_more(capsys):
    with pytest.raises(UserError, match="--heartbeat-timeout=0"):
        TimeLimits(heartbeat=0)
    words = ["train", "--config=quickstart", "--workdir=run", "--init-timeout=5"]
    assert main.main(words) == 2
    assert "--init-timeout needs several processes" in capsys.readouterr().err


def test_other_processes_report_no_answer(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    port = free_port()
    with (
        progress.show_activity(sys.stderr),
        pytest.raises(UserError, match=f"answered at --coordinator=localhost:{port} "),
    ):
        coordinator.call_roll(f"localhost:{port}", 1, 2, 0.5)
    assert f"waiting for process 0 at localhost:{port}" in capsys.readouterr().err


@pytest.mark.parametrize("answer", [b"\0\0\x06\x04 HTTP/2 of a run under way", b"x\n"])
def test_other_processes_report_another_program_at_the_port(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)

        def serve():
            connection = server.accept()[0]
            with connection:
                connection.sendall(answer)
                connection.recv(1000)

        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        with pytest.raises(UserError, match="another program answers"):
            coordinator.call_roll(f"127.0.0.1:{port}", 1, 2, 0.5)
        thread.join()


def test_an_unknown_host_raises_at_once(monkeypatch):
    def unknown(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    with pytest.raises(UserError, match="there is no host 'nowhere'"):
        coordinator.call_roll("nowhere:1", 1, 2, 100)


def test_lm_eval_without_the_harness_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "tttjax.evaluation.lm_eval", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("tttjax.lm_eval", run_name="__main__")
    assert stop.value.code == 2
    assert "error: tttjax.lm_eval needs lm-evaluation-harness" in capsys.readouterr().err
