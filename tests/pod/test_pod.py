"""Processes of `tttjax train` that cannot work together all say why, and end with the same code.

Training is left out where the scenario does not need it (`helpers/pod_server.py`).
"""

import json
import shutil
import signal

import pytest
from helpers.exhaustive import only
from helpers.pod import PodServer

from tttjax.data.preparation import prepare
from tttjax.exit_codes import DONE, FAILED, INTERRUPTED, LOST, SAVED, USER_ERROR

pytestmark = pytest.mark.slow

SOON = 40  # seconds for what takes two, on a busy machine
BEATS = 8  # seconds of the heartbeat limit; shorter ones are missed on a busy machine
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with PodServer(tmp_path_factory.mktemp("compiled")) as server:
        yield server


@pytest.fixture(scope="module")
def other_data(data, tmp_path_factory):
    """A data set with other content in a folder of the same name."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("other words " * 100)
    return prepare([text], tmp_path_factory.mktemp("other") / "data", num_workers=0).folder


# Agreement ---------------------------------------------------------------------------------------

DIFFERENT = {  # flags of the second process, or what it sees; words of the sentence
    "learning rate": ("--config.optim.peak_lr=0.001", ["optim.peak_lr is 0.001 here and 0.01 in"]),
    "seed": ("--config.train.seed=7", ["train.seed is 7 here and 0 in"]),
    "batch": ("--config.train.batch_size=16", ["train.batch_size is 16 here and 8 in"]),
    "steps": ("--config.train.steps=60", ["train.steps is 60 here and 400 in"]),
    "cadence": ("--config.train.checkpoint_every=30", ["checkpoint_every is 30 here and 4 in"]),
    "stop": ("--stop-after=5", ["--stop-after is 5 here and None in"]),
    "missing data": ("--config.data.sources=/nowhere", ["/nowhere does not exist"]),
    "bad field": ("--config.optim.peek_lr=1", ["no configuration field 'optim.peek_lr'"]),
    "bad recipe": ("--config=nothing.py", ["no experiment file nothing.py"]),
    "bad code": ("--code=nothing.py", ["no file nothing.py"]),
}
SHOWN = ("learning rate", "missing data")


@pytest.mark.parametrize("case", only(SHOWN, DIFFERENT))
def test_a_different_command_on_one_host_is_refused_on_all(case, server, data, tmp_path):
    flag, phrases = DIFFERENT[case]
    pod = server.pod(tmp_path, data)
    pod.start([0], fault="waits")
    pod.start([1], fault="waits", words=[flag])
    assert pod.wait(SOON) == [USER_ERROR, USER_ERROR]
    pod.check_sentence("process 1 on ", *phrases)
    assert not pod.workdir.exists()


def test_other_content_of_the_data_is_refused(server, data, other_data, tmp_path):
    """In a folder of the same path, as the disks of two hosts may have it."""
    pod = server.pod(tmp_path, tmp_path / "data")
    shutil.copytree(data, tmp_path / "data")
    pod.start([0], fault="waits")
    pod.wait_for_line(0, "waiting for process 1", SOON)
    shutil.copytree(other_data, tmp_path / "elsewhere" / "data")
    pod.start([1], fault=f"other data {tmp_path / 'elsewhere' / 'data'}")
    assert pod.wait(SOON) == [USER_ERROR, USER_ERROR]
    pod.check_sentence("process 1 on ", "the content of the data in ")


@pytest.mark.parametrize(
    ("fault", "env", "phrases"),
    only(
        [],
        [
            ("other code", {}, ["the code of tttjax is 0123 here and "]),
            ("waits", {"XLA_FLAGS": "--xla_cpu_a=1"}, ["XLA_FLAGS is '--xla_cpu_a=1' here and "]),
            ("waits", {"JAX_ENABLE_X64": "1"}, ["JAX_ENABLE_X64 is '1' here and missing in "]),
        ],
    ),
)
def test_other_code_or_environment_is_refused(fault, env, phrases, server, data, tmp_path):
    pod = server.pod(tmp_path, data)
    pod.start([0], fault="waits")
    pod.start([1], fault=fault, **env)
    assert pod.wait(SOON) == [USER_ERROR, USER_ERROR]
    pod.check_sentence("process 1 on ", *phrases)


def test_another_work_directory_is_refused(server, data, tmp_path):
    pod = server.pod(tmp_path, data)
    pod.start([0], fault="waits")
    pod.start([1], fault="waits", workdir=tmp_path / "another")
    assert pod.wait(SOON) == [USER_ERROR, USER_ERROR]
    pod.check_sentence("process 1 on ", "another is not the folder that it is in process 0")
    assert not pod.workdir.exists()


def test_a_checkpoint_that_one_host_does_not_see_is_refused(server, data, tmp_path):
    pod = server.pod(tmp_path, data)
    newest = pod.workdir / "checkpoints" / "8"
    newest.mkdir(parents=True)
    (newest / "checksums.json").write_text(json.dumps({}))
    pod.start([0], fault="waits")
    pod.start([1], fault="stale disk")
    assert pod.wait(SOON) == [USER_ERROR, USER_ERROR]
    pod.check_sentence("process 1 on ", "newest checkpoint in --workdir is none here and 8 (")
    assert [path.name for path in pod.workdir.iterdir()] == ["checkpoints"]


# Codes -------------------------------------------------------------------------------------------

CODES = {  # what a process does: (its code, that of the others, words of the sentence)
    "done": (DONE, DONE, []),
    "saved": (SAVED, SAVED, []),
    "user error": (USER_ERROR, USER_ERROR, ["the planned sentence"]),
    "full device": (USER_ERROR, USER_ERROR, ["Out of memory on the device"]),
    "bug": (FAILED, LOST, ["ValueError: the planned bug"]),
    "error of JAX": (FAILED, LOST, ["Gloo failed: the planned error"]),
    "hangs": (LOST, LOST, ["no step for 60 s"]),
    "Ctrl-C": (INTERRUPTED, LOST, ["interrupted"]),
}
TABLE = [(fault, rank) for fault in CODES for rank in (0, 1)]


@pytest.mark.parametrize(
    ("fault", "rank"), only([("done", 0), ("user error", 0), ("bug", 1)], TABLE)
)
def test_exit_codes(fault, rank, server, data, tmp_path):
    own, others, phrases = CODES[fault]
    is_end = own in (DONE, SAVED)
    pod = server.pod(tmp_path, data, heartbeat=BEATS)
    pod.start([rank], fault=fault)
    pod.start([1 - rank], fault=fault if is_end else "waits")
    assert pod.wait(SOON) == ([own, others] if rank == 0 else [others, own])
    if is_end:
        assert pod.errors(0) == pod.errors(1) == []
    else:
        pod.check_sentence(f"process {rank} on ", *phrases, ranks=[1 - rank])
        assert pod.errors(rank)[0] == pod.errors(1 - rank)[0]
    assert ("Traceback" in pod.read(rank, "err")) == (own == FAILED)


# Lost processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "rank"), only([(2, 0), (2, 1)], [(2, 0), (2, 1), (4, 0), (4, 3)])
)
def test_a_killed_process_ends_the_others(count, rank, server, data, tmp_path):
    pod = server.pod(tmp_path, data, count, heartbeat=BEATS)
    pod.start(fault="waits")
    pod.wait_until(lambda: pod.are_agreed(), SOON)
    killed = pod.signal(rank)
    others = [other for other in range(count) if other != rank]
    assert pod.wait(SOON, others) == [LOST] * (count - 1)
    pod.check_sentence(f"lost process {rank} on ", ranks=others)
    assert max(pod.ended[other] for other in others) < killed + BEATS + 5
    assert pod.wait(SOON, [rank]) == [KILLED]


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_suspended_process_ends_the_others_and_itself(rank, server, data, tmp_path):
    pod = server.pod(tmp_path, data, heartbeat=BEATS)
    pod.start(fault="waits")
    pod.wait_until(lambda: pod.are_agreed(), SOON)
    pod.signal(rank, signal.SIGSTOP)
    assert pod.wait(SOON, [1 - rank]) == [LOST]
    pod.check_sentence(f"lost process {rank} on ", ranks=[1 - rank])
    pod.signal(rank, signal.SIGCONT)
    assert pod.wait(SOON) == [LOST, LOST]
    assert len(pod.errors(rank)) == 1


@pytest.mark.exhaustive
def test_a_process_that_never_starts_is_named(server, data, tmp_path):
    pod = server.pod(tmp_path, data, 3, init=4)
    pod.start([0, 1])
    assert pod.wait(SOON) == [LOST, LOST]
    for rank in (0, 1):
        assert "error: process 2 of 3 did not join within 4 s" in pod.read(rank, "err")
        assert "waiting for process 2: " in pod.read(rank, "err")


@pytest.mark.exhaustive
def test_a_second_process_of_one_id_leaves_a_run_alone(server, data, tmp_path):
    pod = server.pod(tmp_path, data)
    pod.start(fault="waits")
    pod.wait_until(lambda: pod.are_agreed(), SOON)
    late = server.pod(tmp_path / "late", data, init=3)
    late.folder.mkdir()
    late.start([1], words=[f"--coordinator=127.0.0.1:{pod.port}"])
    assert late.wait(SOON) == [LOST]
    late.check_sentence("a run that goes on without this process")
    assert not pod.codes


# Training ----------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 3])
def test_a_host_killed_in_training_ends_all_of_four(rank, server, data, tmp_path):
    pod = server.pod(tmp_path, data, 4, heartbeat=20)
    pod.start(words=["--config.train.log_every=1"])
    pod.wait_for_line(0, "2/400", 300)
    killed = pod.signal(rank)
    others = [other for other in range(4) if other != rank]
    assert pod.wait(60, others) == [LOST] * 3
    pod.check_sentence(f"lost process {rank} on ", ranks=others)
    assert max(pod.ended[other] for other in others) < killed + 20 + 5


@pytest.mark.exhaustive
def test_an_error_ends_a_process_in_a_collective(server, data, tmp_path):
    """The first process waits for the second in its first step, and has created files."""
    pod = server.pod(tmp_path, data)
    pod.start([0])
    pod.start([1], fault="user error at a batch")
    assert pod.wait(200) == [USER_ERROR, USER_ERROR]
    pod.check_sentence("process 1 on ", "the planned sentence")
    assert not pod.workdir.exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_host_that_hangs_ends_all_with_their_stacks(is_stopped, server, data, tmp_path):
    """By its own limit, or soon after SIGTERM, which JAX's preemption service receives."""
    pod = server.pod(tmp_path, data)
    pod.start([0], words=[limit := f"--config.watchdog.next_step={600 if is_stopped else 20}"])
    pod.start([1], words=[limit], fault="sleeps")
    pod.wait_for_line(1, "sleeping", 200)
    if is_stopped:
        pod.signal(0, signal.SIGTERM)
    assert pod.wait(120) == [LOST, LOST]
    sentences = {pod.errors(rank)[0] for rank in (0, 1)}
    assert len(sentences) == 1
    assert "no step ended in 20 s (watchdog.next_step)" in sentences.pop()
    stacks = {path.name[-5]: path.read_text() for path in (pod.workdir / "hangs").iterdir()}
    assert sorted(stacks) == ["0", "1"]
    assert "in sleeping_next" in stacks["1"]
    assert "in _loop" in stacks["0"]
