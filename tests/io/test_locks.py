"""Lock files: one writer at a time, on one host and across hosts."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tttjax.errors import UserError
from tttjax.io import lock_holder, locks
from tttjax.io.lock_holder import LockHolder
from tttjax.io.locks import FOLDER_LOCK, hold, living_holder

QUICK = {"heartbeat_s": 0.02, "watch_s": 0.3}
HOLDER = """
import sys, time
from tttjax.io.locks import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(**values):
    return dataclasses.replace(LockHolder.me(), **values)


def left_behind(folder, **values):
    """The lock file of a killed process."""
    folder.mkdir(exist_ok=True)
    (folder / FOLDER_LOCK).write_text(json.dumps(dataclasses.asdict(holder(**values))))
    return folder


@pytest.fixture
def process(tmp_path):
    """A process that holds `run` in the test's folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_held_folder_error_names_the_holder(tmp_path):
    with hold(tmp_path / "run"):
        with pytest.raises(
            UserError, match=rf"run is being written .*process {os.getpid()} on .*20"
        ):
            hold(tmp_path / "run").__enter__()
        with hold(tmp_path / "other"), hold(tmp_path / "run", beside=True):
            pass
    assert not any(tmp_path.iterdir())
    with hold(tmp_path / "run"):
        pass


def test_folders_created_for_a_lock_are_removed(tmp_path):
    with hold(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
    with pytest.raises(KeyboardInterrupt), hold(tmp_path / "c" / "d.session", beside=True):
        raise KeyboardInterrupt
    assert not (tmp_path / "c").exists()


def test_a_killed_holder_is_replaced_at_once(tmp_path, process):
    with pytest.raises(UserError, match=f"process {process.pid}"):
        hold(tmp_path / "run").__enter__()
    process.send_signal(signal.SIGKILL)
    while process.poll() is None:  # also as a zombie
        time.sleep(0.01)
    logged = []
    with hold(tmp_path / "run", log=logged.append, watch_s=60):
        pass
    assert len(logged) == 1
    assert f"taking over {tmp_path / 'run'} from process {process.pid}" in logged[0]


def test_sigterm_releases_the_lock(tmp_path, process):
    process.terminate()
    assert process.wait() == 143
    assert not (tmp_path / "run").exists()


def test_a_reused_pid_does_not_hold_the_lock(tmp_path):
    left_behind(tmp_path / "run", started="1")
    assert living_holder(tmp_path / "run") is None
    with hold(tmp_path / "run", log=lambda line: None, watch_s=60):
        pass


@pytest.mark.parametrize("where", [{"host": "node3"}, {"boot": "b"}, {"namespace": "pid:[1]"}])
def test_a_dead_holder_on_another_host_is_replaced(tmp_path, where):
    left_behind(tmp_path / "run", **where)
    assert living_holder(tmp_path / "run", QUICK["watch_s"]) is None
    logged = []
    with hold(tmp_path / "run", log=logged.append, **QUICK):
        pass
    assert [line.split()[1] for line in logged] == [str(tmp_path / "run"), "taking"]
    assert "looking for 0.3 s" in logged[0]


def test_a_live_holder_on_another_host_is_respected(tmp_path, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(lock_holder.socket, "gethostname", lambda: "node3")
        held = hold(tmp_path / "run", **QUICK)
        held.__enter__()
    assert "on node3, since" in living_holder(tmp_path / "run", QUICK["watch_s"])
    with pytest.raises(UserError, match="on node3, since"):
        hold(tmp_path / "run", log=lambda line: None, **QUICK).__enter__()
    held.__exit__(None, None, None)
    with hold(tmp_path / "run", **QUICK):  # released
        pass


def test_an_incomplete_lock_file_is_replaced(tmp_path):
    (tmp_path / FOLDER_LOCK).write_text('{"host": ')
    with hold(tmp_path, log=lambda line: None, **QUICK):
        assert locks._read_lock(tmp_path / FOLDER_LOCK).holder.pid == os.getpid()


def test_one_of_many_processes_takes_over(tmp_path):
    left_behind(tmp_path, started="1")
    start, end, results = threading.Barrier(8), threading.Barrier(8), []

    def newcomer():
        start.wait()
        try:
            with hold(tmp_path, log=lambda line: None):
                results.append("held")
                end.wait(30)
        except UserError:
            results.append("refused")
            end.wait(30)

    threads = [threading.Thread(target=newcomer) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["held"] + 7 * ["refused"]
    assert not any(tmp_path.iterdir())


def test_a_replaced_holder_notices(tmp_path):
    with hold(tmp_path, **QUICK) as lock:
        lock.check()
        left_behind(tmp_path, host="node3", token="another")
        assert lock.lost.wait(10)
        with pytest.raises(UserError, match="took over"):
            lock.check()
    assert (tmp_path / FOLDER_LOCK).exists()  # it belongs to the other process
