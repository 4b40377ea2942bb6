"""`tttjax status`: what it says of runs that live, ended or were killed, from their files alone."""

import json
import os
import time

import pytest

from tttjax.cli.main import main
from tttjax.errors import UserError
from tttjax.exit_codes import DONE, INTERRUPTED, LOST, SAVED, USER_ERROR
from tttjax.io.locks import hold
from tttjax.runs.status import run_status
from tttjax.training.failed_starts import FAILED_STARTS
from tttjax.training.ledger import STARTS, USES

HOST = {"name": "node-a", "devices": "4 x H100", "tttjax": "1", "jax": "2"}
FIGURES = {
    **{"step": 30, "seconds": 10.0, "step_seconds": 0.5, "input": 0.01, "other": 0.02, "age": 0.0},
    **{"memory_bytes": 2**30, "peak_bytes": 2**31, "memory_of": "device"},
}


def write_start(workdir, number, **fields):
    """A file of a start that lasted 100 s of 1000 s since the first one began."""
    spent = dict.fromkeys(USES, 0.0) | {"start": 10.0, "steps": 70.0, "input": 20.0}
    start = {
        **{"number": number, "began": time.time() - 1000 + 200 * number, "seconds": 100.0},
        **{"phase": "device", "recorded_before": 0, "furthest": 0, "steps_before": 0},
        **{"step": 30, "steps": 40, "spent": spent},
        "hosts": [{**HOST, **FIGURES}, {**HOST, **FIGURES, "name": "node-b", "input": 0.99}],
    }
    (workdir / STARTS).mkdir(exist_ok=True)
    (workdir / STARTS / f"{number:04}.json").write_text(json.dumps(start | fields))


@pytest.fixture
def workdir(make_run, request):
    """A run whose metrics end at step 3, with a checkpoint of it."""
    return make_run(f"status/{request.node.name}")


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({"code": DONE}, "finished"),
        ({"code": SAVED}, "stopped"),
        ({"code": INTERRUPTED}, "stopped"),
        ({"code": LOST}, "failed"),
        ({"code": USER_ERROR}, "failed"),
        ({"error": "OSError"}, "failed"),
        ({}, "killed"),
    ],
)
def test_the_state_of_a_run_that_no_process_holds(fields, state, workdir):
    write_start(workdir, 1, code=LOST)
    write_start(workdir, 2, **fields)
    status = run_status(workdir)
    assert (status.state, status.holder, status.phase, status.eta_seconds) == (state, *[None] * 3)
    assert status.quiet_seconds == pytest.approx(500, abs=20)


def test_a_living_run_has_phase_and_eta(workdir):
    write_start(workdir, 1)
    with hold(workdir):
        status = run_status(workdir)
    assert (status.state, status.phase) == ("running", "steps")
    assert f"process {os.getpid()} on " in status.holder
    assert status.eta_seconds == (40 - 3) * 0.5
    assert status.tokens_per_second == 32.0 * 2.0 / 0.5  # at the last speed of process 0
    assert (status.checkpoint_step, status.loss) == (3, 1.0)
    (workdir / "metrics.jsonl").unlink()  # as before the first upload into a bucket
    with hold(workdir):
        status = run_status(workdir)
    assert (status.eta_seconds, status.tokens_per_second) == (40 * 0.5, None)


def test_steps_and_time_over_all_starts(workdir):
    write_start(workdir, 1)
    write_start(workdir, 2, recorded_before=34, steps_before=20, step=32, furthest=34, code=LOST)
    write_start(workdir, 3, recorded_before=33, steps_before=30, step=40, furthest=34, code=DONE)
    (workdir / FAILED_STARTS).write_text('{"starts": 2, "last_step": 34}')
    (workdir / "hangs").mkdir()
    for process in (0, 1):
        (workdir / "hangs" / f"20261129-1200-process-{process}.txt").touch()
    status = run_status(workdir)
    assert [start.step for start in status.starts] == [34, 33, 40]
    assert status.lost_steps == (33 - 20) + (34 - 30)
    assert status.goodput["down"] == pytest.approx(200, abs=1)
    assert sum(status.goodput.values()) == pytest.approx(500, abs=1)
    assert (status.failed_starts, status.hangs) == (2, ["20261129-1200"])


@pytest.mark.parametrize(("last_step", "living", "dead"), [(3, 1, 2), (2, 0, 0)])
def test_a_start_without_a_new_step_counts_as_failed(last_step, living, dead, workdir):
    (workdir / FAILED_STARTS).write_text(json.dumps({"starts": 2, "last_step": last_step}))
    assert run_status(workdir).failed_starts == dead
    with hold(workdir):
        assert run_status(workdir).failed_starts == living


def test_the_command_prints_lines_and_tables(workdir, capsys):
    write_start(workdir, 1, hosts=[{**HOST, **FIGURES, "input": 0.99}, HOST])
    write_start(workdir, 2, steps_before=None, step=0, phase="compile", hosts=[], code=LOST)
    assert main(["status", str(workdir)]) == 0
    out = capsys.readouterr().out
    assert f"{workdir}: failed: lost a process, or hung (76); last sign of life " in out
    assert "step 3 of 40, loss 1.0000, 32 tokens/s\n" in out
    assert "newest checkpoint: step 3, " in out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert sum(row.startswith("| 1 | ") and row.endswith(" | killed |") for row in rows) == 1
    assert "| waiting for input | 40.0 | 13.3% |" in rows
    write_start(workdir, 2)
    write_start(workdir, 3, hosts=[{**HOST, **FIGURES, "input": 0.99}, HOST])
    assert main(["status", str(workdir)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "node-a" in line]
    assert [row.split("|")[6].strip() for row in rows] == ["99%", "-"]


def test_json_has_all_of_it(workdir, capsys):
    write_start(workdir, 1)
    assert main(["status", str(workdir), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["state"], values["step"], values["steps"]) == ("killed", 3, 40)
    assert values["starts"][0]["hosts"][1]["input"] == 0.99


def test_a_run_of_an_earlier_version_has_no_starts(workdir, capsys):
    assert run_status(workdir).state == "finished"
    assert main(["status", str(workdir)]) == 0
    assert "step 3 of 3" in capsys.readouterr().out


def test_other_folders_are_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"is no run: give the --workdir"):
            run_status(folder)
