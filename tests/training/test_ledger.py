"""The ledger of a run's starts: its arithmetic, its files, what the next start makes of them."""

import json
import time
from types import SimpleNamespace

import pytest

from tttjax.errors import UserError
from tttjax.exit_codes import DONE, FAILED, LOST, SAVED, USER_ERROR
from tttjax.io.locks import Lock
from tttjax.io.paths import storage_path
from tttjax.runtime import ending
from tttjax.training import ledger as ledger_module
from tttjax.training.hosts import Hosts
from tttjax.training.ledger import STARTS, USES, Ledger, goodput, read_starts
from tttjax.training.start_account import StartAccount


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def do_step(account, clock, step, waited=1.0, device=5.0):
    with account.phase("input"):
        clock.pass_(waited)
    with account.phase("device"):
        clock.pass_(device)
    clock.pass_(0.5)
    account.finish(step)


def record(workdir, step):
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")


def test_every_second_belongs_to_one_phase(clock):
    account = StartAccount(time.time() - 100, clock)
    clock.pass_(3)
    with account.phase("restore"):
        clock.pass_(4)
        with account.phase("compile"):
            clock.pass_(7)
        clock.pass_(1)
    account.begin_steps(2)
    do_step(account, clock, 3, waited=0.25, device=11)  # compiles
    do_step(account, clock, 4)
    with account.phase("save"):
        clock.pass_(20)
        assert account.current == "save"
        assert account.spent()["save"] == 20
    account.end_steps()
    clock.pass_(2)
    spent = account.spent()
    assert sum(spent.values()) == pytest.approx(103 + 12 + 11.75 + 6.5 + 20 + 2, abs=0.1)
    assert spent.pop("start") == pytest.approx(103, abs=0.1)
    assert spent == {
        **{"compile": 18.5, "restore": 5, "input": 1.25, "steps": 5.5, "lost": 0},
        **{"save": 20, "evaluate": 0, "other": 2},
    }


def test_steps_of_earlier_starts_are_lost_with_their_input(clock):
    account = StartAccount(clock=clock)
    account.furthest = 4
    account.begin_steps(1)
    do_step(account, clock, 2, waited=0)
    do_step(account, clock, 3)
    with account.phase("save"):
        clock.pass_(20)
    do_step(account, clock, 4, waited=3)
    do_step(account, clock, 5, waited=2)
    spent = account.spent()
    assert (spent["lost"], spent["input"], spent["steps"]) == (6.5 + 8.5, 2, 5.5)
    with account.phase("input"):
        clock.pass_(1)
    with account.phase("device"):  # of a process that is dead
        clock.pass_(30)
    assert account.spent()["lost"] == 15
    spent = account.spent(has_ended=True)
    assert (spent["lost"], spent["input"], spent["steps"]) == (15 + 31, 2, 5.5)


def run_start(workdir, before, steps, error=None, code=None, kill=False):
    """A start that resumes after `before` steps and records some; the file says how it ended."""
    account = StartAccount()
    ledger = Ledger(workdir, Lock(workdir), 100, Hosts(account))
    ledger.__enter__()
    record(workdir, before)
    account.begin_steps(before)
    for step in steps:
        if kill and step == steps[-1]:
            ledger._write()  # what is recorded after it is not in the file
        record(workdir, step)
        account.finish(step)
    if kill:
        ledger._closed.set()
        ledger._exit_stack.close()
        return
    ledger.code = code
    ledger.__exit__(None if error is None else type(error), error, None)


def test_lost_steps_are_counted_exactly_over_kills(tmp_path):
    """Each start computes what no checkpoint holds again; 14 + 1 + 6 + 3 steps give 17."""
    run_start(tmp_path, 0, range(1, 15), kill=True)
    run_start(tmp_path, 8, [9], kill=True)
    run_start(tmp_path, 8, range(9, 15), error=SystemExit(LOST))
    run_start(tmp_path, 14, range(15, 18), code=DONE)
    starts = read_starts(tmp_path)
    assert [(s.number, s.steps_before, s.step, s.lost_steps, s.code) for s in starts] == [
        (1, 0, 14, 0, None),
        (2, 8, 9, 1, None),
        (3, 8, 14, 6, LOST),
        (4, 14, 17, 0, DONE),
    ]
    assert sum(s.step - s.steps_before - s.lost_steps for s in starts) == 17


def test_metrics_complete_the_last_start_of_a_run(tmp_path):
    run_start(tmp_path, 0, range(1, 6), kill=True)
    assert json.loads((tmp_path / STARTS / "0001.json").read_text())["step"] == 4
    assert read_starts(tmp_path)[0].step == 5


@pytest.mark.parametrize(
    ("error", "code", "written"),
    [
        (None, SAVED, (SAVED, "")),
        (UserError("mend it"), None, (USER_ERROR, "UserError")),
        (ValueError("a bug"), None, (FAILED, "ValueError")),
        (OSError("a disk"), None, (None, "OSError")),
    ],
)
def test_the_file_says_how_a_start_ended(error, code, written, tmp_path):
    run_start(tmp_path, 0, [1, 2], error, code)
    (start,) = read_starts(tmp_path)
    assert (start.code, start.error) == written


def test_a_sudden_end_is_written_with_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr(ending.os, "_exit", lambda code: None)
    account = StartAccount()
    with Ledger(tmp_path, Lock(tmp_path), 100, Hosts(account)):
        account.begin_steps(0)
        account.finish(1)
        ending.end_process(LOST)
        assert read_starts(tmp_path)[0].code == LOST


def test_a_user_error_before_a_step_leaves_no_file(tmp_path):
    run_start(tmp_path, 0, [1], code=SAVED)
    run_start(tmp_path, 1, [], UserError("mend it"))
    assert [start.number for start in read_starts(tmp_path)] == [1]


def test_a_start_without_its_lock_writes_nothing(tmp_path):
    lock = Lock(tmp_path)
    with Ledger(tmp_path, lock, 100, Hosts(StartAccount())) as ledger:
        lock.lost.set()
        ledger.code = DONE
    assert read_starts(tmp_path)[0].code is None


@pytest.mark.parametrize("error", [OSError(28, "disk full"), UserError("credentials expired")])
def test_a_failed_write_is_left_to_those_that_need_it(error, tmp_path, monkeypatch):
    def fail(path):
        raise error

    with Ledger(tmp_path, Lock(tmp_path), 100, Hosts(StartAccount())):
        monkeypatch.setattr(ledger_module, "atomic_write", fail)
    assert read_starts(tmp_path)[0].code is None


def test_a_bucket_that_does_not_answer_hides_no_error(bucket, monkeypatch):
    from gcsfs.retry import HttpError

    def fail(path, missing_ok=False):
        raise HttpError({"code": 503})

    folder, mend_it = storage_path(bucket), pytest.raises(UserError, match="mend it")
    with mend_it, Ledger(folder, Lock(folder), 100, Hosts(StartAccount())):
        monkeypatch.setattr(type(folder), "unlink", fail)
        raise UserError("mend it")


def test_goodput_adds_up_to_all_time(tmp_path):
    began = time.time() - 1000
    for number, (offset, seconds) in enumerate([(0, 100.0), (150, 300.0), (440, 60.0)], start=1):
        account = StartAccount(began + offset)
        account.begin_steps(0)
        with Ledger(tmp_path, Lock(tmp_path), 100, Hosts(account)):
            pass
        path = tmp_path / STARTS / f"{number:04}.json"
        start = json.loads(path.read_text())
        start["spent"] |= {"start": 10.0, "steps": seconds - 10}
        path.write_text(json.dumps(start | {"seconds": seconds}))
    table = goodput(read_starts(tmp_path))
    assert (table["start"], table["steps"], table["down"]) == pytest.approx((30, 430, 50), abs=0.1)
    assert goodput([])["down"] == 0


def test_input_is_of_the_host_that_waits_longest(tmp_path):
    account = StartAccount()
    hosts = Hosts(account)
    figures = [SimpleNamespace(input_of_start=share) for share in (0.0, 0.75, 0.5)]
    hosts.figures = lambda: [*figures, None]
    spent = {**dict.fromkeys(USES, 0.0), "start": 5.0, "input": 10.0, "steps": 70.0, "lost": 9.0}
    account.spent = lambda has_ended: dict(spent)
    with Ledger(tmp_path, Lock(tmp_path), 100, hosts):
        (start,) = read_starts(tmp_path)
    assert start.spent == spent | {"input": 60, "steps": 20}
    assert start.seconds == 94


def test_a_damaged_file_is_refused(tmp_path):
    run_start(tmp_path, 0, [1], code=DONE)
    path = tmp_path / STARTS / "0001.json"
    start = json.loads(path.read_text())
    changed = [{"spent": {}}, {"began": "noon"}, {"step": None}, {"hosts": [1]}]
    for text in ("{", "[]", '{"number": 1}', *(json.dumps(start | fields) for fields in changed)):
        path.write_text(text)
        with pytest.raises(UserError, match=r"0001.json is damaged"):
            read_starts(tmp_path)
